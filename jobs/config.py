"""Experiment: composes the settings that lower files own, checks across them, and words errors by dotted key."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from cluster.runtime import ClusterSettings
from cluster.storage import read_uri
from cluster.streams import StreamSettings
from cluster.tracking import TrackingSettings
from jobs.affinity_settings import AffinitySettingsOfAKind, AffinityStageSettings
from jobs.cam_worker import CamStageSettings
from jobs.choose_round import ChoiceSettings
from jobs.evaluate import EvaluationSettings
from jobs.extract_features import FeatureSettings
from jobs.make_pseudo_masks import PseudoMaskStageSettings
from jobs.predict import PredictSettings
from jobs.prepare import PrepareSettings
from jobs.report import ReportSettings
from jobs.self_training import SelfTrainingSettings
from jobs.train_classifier import ClassifierSettings
from jobs.train_segmenter import SegmenterStageSettings
from jobs.train_supervised import SupervisedSettings
from subcat_core.backbones import check_output_stride
from subcat_core.kmeans_settings import KMeansSettings
from subcat_core.settings import Settings

# The sections a round may override, as [round.2] classifier.optimiser.epochs = 12
ROUND_SECTIONS = ("classifier", "features", "kmeans", "cams")


class ConfigError(ValueError):
    """Everything wrong with a config, a line each: dotted key, value, rule, nearest valid key."""


class Experiment(Settings):
    """All settings of one run. Each section's class stands beside the code that it configures."""

    name: str = Field(min_length=1)
    """Name of the MLflow run and of the report."""
    output: str = Field(min_length=1)
    """Folder or s3:// prefix that takes everything the run writes."""
    rng_seed: int = Field(default=0, ge=0)
    """Seeds batches, augmentation, heads, dropout and k-means."""
    rounds: int = Field(default=3, ge=0, le=20)
    """R: sub-category rounds after round 0."""
    prepare: PrepareSettings
    """Where images and tags come from, and how they are checked."""
    classifier: ClassifierSettings = ClassifierSettings()
    """The classifier of every round; [round.N] may override it."""
    features: FeatureSettings = FeatureSettings()
    """What is stored of each image for clustering; [round.N] may override it."""
    kmeans: KMeansSettings = KMeansSettings()
    """How each parent class is split; [round.N] may override it."""
    cams: CamStageSettings = CamStageSettings()
    """How maps are made and scored; [round.N] may override it."""
    affinity: AffinityStageSettings | None = None
    """A net that spreads CAMs by a random walk before they become masks (`kind`: "psa", the paper's, or "irn"); none:
    masks come straight from the CAMs."""
    choice: ChoiceSettings = ChoiceSettings()
    """How the round that masks are made from is chosen."""
    pseudo_masks: PseudoMaskStageSettings = PseudoMaskStageSettings()
    """How maps become masks."""
    segmenter: SegmenterStageSettings = SegmenterStageSettings()
    """The segmenter and its training."""
    predict: PredictSettings = PredictSettings()
    """How the segmenter is applied, and to which splits."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Words for the protocol of the scores."""
    self_training: SelfTrainingSettings | None = None
    """`{}` or a section trains the segmenter again on its own masks of the training images, within their tags; null
    does not."""
    supervised: SupervisedSettings | None = None
    """`{}` or a section trains the same segmenter on full masks too, as a yardstick; null does not."""
    report: ReportSettings = ReportSettings()
    """How much the report shows."""
    stream: StreamSettings = StreamSettings()
    """How stages that go shard by shard are spread."""
    cluster: ClusterSettings = ClusterSettings()
    """Where Ray runs."""
    tracking: TrackingSettings = TrackingSettings()
    """Where MLflow is."""
    round: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides by round: {"2": {"classifier": {"optimiser": {"epochs": 12}}}}."""

    @model_validator(mode="after")
    def _rounds_exist(self) -> Experiment:
        names = [str(index) for index in range(self.rounds + 1)]
        for key, sections in self.round.items():
            if key not in names:
                raise ValueError(f"round.{key}: this run has rounds 0 to {self.rounds}; name one of them")
            for section in sections:
                if key == names[-1] and section in ("features", "kmeans"):
                    raise ValueError(f"round.{key}.{section}: the last round makes no features and no clusters")
                if section not in ROUND_SECTIONS:
                    near = _nearest(section, ROUND_SECTIONS)
                    raise ValueError(f"round.{key}.{section}: a round may override {', '.join(ROUND_SECTIONS)}{near}")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Experiment:
        parts: dict[str, ClassifierSettings | SegmenterStageSettings | AffinitySettingsOfAKind | None] = {
            "classifier": self.classifier,
            "segmenter": self.segmenter,
            "affinity": self.affinity,
        }
        for key, part in parts.items():
            if part is None:
                continue
            if problem := part.compute.batch_problem(part.optimiser.batch_size):
                raise ValueError(f"{key}.optimiser.batch_size = {part.optimiser.batch_size}: {problem}")
            if part.compute.input == "ray" and not part.compute.num_workers:
                raise ValueError(f"{key}.compute.input = ray: needs {key}.compute.num_workers of 1 or more")
        stride = self.segmenter.model.backbone.output_stride
        if stride == 32:
            raise ValueError("segmenter.model.backbone.output_stride = 32: too coarse for masks; use 8 or 16")
        if self.segmenter.loss == "confidence" and not self.pseudo_masks.write_confidence:
            raise ValueError(
                "segmenter.loss = confidence: needs the confidence of every pixel; set pseudo_masks.write_confidence = "
                "true"
            )
        if self.affinity is not None:
            self._affinity_fits()
        if self.self_training is not None and self.prepare.segmenter_sees_tiles:
            raise ValueError(
                '[self_training] with prepare.tiles.segmenter_sees = "tiles": its masks are of whole images; '
                'give "images", or leave [self_training] out'
            )
        if self.classifier.subcategory_targets == "soft" and (self.kmeans.spherical or self.kmeans.pca_dims):
            raise ValueError(
                'classifier.subcategory_targets = "soft" with kmeans.spherical or kmeans.pca_dims: soft targets are '
                "distances between features as they are and the centroids; leave one of the two out"
            )
        if self.cams.output_stride is not None:
            check_output_stride(self.classifier.backbone.name, self.cams.output_stride, "cams.output_stride")
        return self

    def _affinity_fits(self) -> None:
        """The walk spreads maps of whole images over a background."""
        if self.prepare.tiles is not None:
            raise ValueError(
                "[affinity] with prepare.tiles: the affinity net and its walk work on whole images; "
                "leave one of the two out"
            )
        if not getattr(self.prepare.source, "has_background", True):
            raise ValueError(
                "[affinity] with a source without background: the affinity net learns from background and its walk "
                "has one; leave [affinity] out"
            )

    def for_round(self, round_index: int) -> Experiment:
        """The settings of one round: this experiment with the overrides of [round.N] applied.

        Raises ConfigError naming the dotted key below round.N.
        """
        overrides = self.round.get(str(round_index))
        if not overrides:
            return self
        values = _merged(self.model_dump(mode="json"), {**overrides, "round": {}})
        return parse_experiment(values, prefix=f"round.{round_index}.")

    def flattened(self) -> dict[str, str]:
        """Dotted key -> value as text, for MLflow and for the report."""
        return flattened(self.model_dump(mode="json"))


def load_experiment(path: str, overrides: Iterable[str] = ()) -> Experiment:
    """Read a TOML config (path or s3:// URI) and apply `a.b=c` overrides. Raises ConfigError."""
    try:
        text = read_uri(path if "://" in path else str(Path(path).absolute())).decode()
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the path of a TOML config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for text in overrides:
        values = _merged(values, _override(text))
    return parse_experiment(values, origin=path)


def parse_experiment(values: Mapping[str, Any], *, origin: str = "config", prefix: str = "") -> Experiment:
    """Validate plain values (as from TOML). Raises ConfigError with every problem at once."""
    try:
        experiment = Experiment.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(_worded(error, origin, prefix)) from error
    except TypeError as error:
        raise ConfigError(f"{origin}: {error}; dates and times are not settings") from error
    for round_index in range(experiment.rounds + 1):
        experiment.for_round(round_index)
    return experiment


def _override(text: str) -> dict[str, Any]:
    """`a.b=c` -> {"a": {"b": c}}; c is a TOML value, or a string when it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected KEY=VALUE, such as --set classifier.optimiser.epochs=4")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return typing.cast(dict[str, Any], parsed)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of tables; `over` wins."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = (
            _merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) and value else value
        )
    return result


def flattened(values: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> value as text of nested settings; a list or an empty table is a value."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows |= {f"{key}.{inner}": text for inner, text in flattened(value).items()}
        else:
            rows[key] = value if isinstance(value, str) else json.dumps(value)
    return rows


def _nearest(word: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; nearest: {near[0]}" if near else ""


def _worded(error: ValidationError, origin: str, prefix: str) -> str:
    lines = []
    for problem in error.errors():
        location = _without_union_tag(problem["loc"])
        key = prefix + ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            valid = _fields_at(location[:-1])
            line = f"{key}: unknown key{_nearest(str(location[-1]), valid)} (valid: {', '.join(sorted(valid))})"
        elif problem["type"] == "missing":
            line = f"{key}: required, but not given"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(problem["input"], dict) else f" = {json.dumps(problem['input'], default=str)}"
            line = f"{key}{shown}: {message}" if key else message
        lines.append(line)
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return f"{origin}: {count} in the settings\n" + "\n".join(f"  {line}" for line in lines)


def _without_union_tag(location: tuple[str | int, ...]) -> list[str | int]:
    """pydantic puts the tag of the union of sources into the location; it is no key of the config."""
    parts = list(location)
    sources = ("voc", "coco", "folders", "table", "glas")
    if parts[:2] == ["prepare", "source"] and len(parts) > 2 and parts[2] in sources:
        del parts[2]
    if parts[:1] == ["affinity"] and len(parts) > 1 and parts[1] in ("psa", "irn"):
        del parts[1]
    return parts


def _fields_at(location: list[str | int]) -> set[str]:
    """The valid keys of the table at a location; all members' keys where it is a union."""
    models: list[type[BaseModel]] = [Experiment]
    for part in location:
        models = [
            inner
            for model in models
            if part in model.model_fields
            for inner in _models_in(model.model_fields[str(part)].annotation)
        ]
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []

"""The section [affinity]: a net of PSA's or IRNet's kind, from its labels to its walk, with its authors' values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from cluster.training import OptimiserSettings, TrainComputeSettings
from subcat_core.affinity_crop import AffinityCropSettings, ScaledCropSettings
from subcat_core.affinity_labels import IrnLabelSettings, PsaLabelSettings
from subcat_core.affinity_net import AffinityNetSettings
from subcat_core.affinity_walk import IrnWalkSettings, PsaWalkSettings
from subcat_core.irn import STRIDE_PX, IrnSettings
from subcat_core.settings import Settings


class PsaOptimiserSettings(OptimiserSettings):
    """As the classifier's, with PSA's numbers."""

    epochs: int = Field(default=8, ge=1)
    """Passes over the training images (value of the authors' code)."""
    batch_size: int = Field(default=8, ge=1)
    """Images of one step over all workers together (value of the authors' code)."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Of the backbone's weights at step 0; the new layers take ten times as much. What users of PSA's ResNet-38 take;
    its code has 0.1, for VGG."""
    momentum: float = Field(default=5e-4, ge=0, lt=1)
    """What the authors' runs have, for their weight decay lands in it (schedule.py); with 0.9 take a tenth of the
    learning rate."""


class IrnOptimiserSettings(OptimiserSettings):
    """As the classifier's, with IRNet's numbers."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the training images (value of the authors' code)."""
    batch_size: int = Field(default=32, ge=1)
    """Images of one step over all workers together (value of the authors' code)."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Of the boundary branch at step 0; the displacement branch takes ten times as much (value of the authors' code).
    """
    momentum: float = Field(default=1e-4, ge=0, lt=1)
    """What the authors' runs have, for their weight decay lands in it (schedule.py); with 0.9 take a tenth of the
    learning rate."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """L2 penalty on weights and biases (value of the authors' code)."""


class PsaStageSettings(Settings):
    """AffinityNet and its random walk (Ahn & Kwak 2018), the one of the paper."""

    kind: Literal["psa"] = "psa"
    labels: PsaLabelSettings = PsaLabelSettings()
    net: AffinityNetSettings = AffinityNetSettings()
    augment: AffinityCropSettings = AffinityCropSettings()
    optimiser: PsaOptimiserSettings = PsaOptimiserSettings()
    compute: TrainComputeSettings = TrainComputeSettings()
    walk: PsaWalkSettings = PsaWalkSettings()

    @model_validator(mode="after")
    def _whole_cells(self) -> PsaStageSettings:
        return _with_whole_cells(self, self.net.backbone.output_stride)


class IrnStageSettings(Settings):
    """IRNet's boundaries and their random walk (Ahn et al. 2019)."""

    kind: Literal["irn"] = "irn"
    labels: IrnLabelSettings = IrnLabelSettings()
    net: IrnSettings = IrnSettings()
    augment: ScaledCropSettings = ScaledCropSettings()
    optimiser: IrnOptimiserSettings = IrnOptimiserSettings()
    compute: TrainComputeSettings = TrainComputeSettings()
    walk: IrnWalkSettings = IrnWalkSettings()

    @model_validator(mode="after")
    def _whole_cells(self) -> IrnStageSettings:
        return _with_whole_cells(self, STRIDE_PX)


AffinitySettingsOfAKind = PsaStageSettings | IrnStageSettings


def _kind(value: Any) -> Any:
    """What `kind` says; psa where nothing does."""
    return value.get("kind", "psa") if isinstance(value, dict) else getattr(value, "kind", None)


AffinityStageSettings = Annotated[
    Annotated[PsaStageSettings, Tag("psa")] | Annotated[IrnStageSettings, Tag("irn")], Discriminator(_kind)
]
"""What [affinity] holds: `kind` ("psa" or "irn") decides which settings there are, and their defaults."""


def _with_whole_cells(settings: Any, stride_px: int) -> Any:
    if settings.augment.crop_px % stride_px:
        raise ValueError(
            f"augment.crop_px = {settings.augment.crop_px} is no whole number of cells of {stride_px} px; "
            f"take {settings.augment.crop_px // stride_px * stride_px}"
        )
    return settings

"""A tiny data set and a tiny experiment: the whole pipeline in seconds, on real files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.storage import Storage
from jobs import cli
from jobs.config import parse_experiment
from jobs.execution import execute

TINY_CLASSES = ("disc", "square")
Tiny = Callable[..., dict[str, Any]]
"""The fixture `tiny`: changes of settings -> plain values of an experiment."""


def draw_tiny(folder: Path, num_train: int = 12, num_val: int = 4, side: int = 48) -> Path:
    """Discs and squares on noise, every third image with both; returns the CSV that lists them."""
    rng = np.random.default_rng(5)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    lines = ["image,labels,split,mask"]
    rows, columns = np.mgrid[:side, :side]
    for index in range(num_train + num_val):
        image = rng.integers(90, 130, (side, side, 3)).astype(np.uint8)
        mask = np.zeros((side, side), np.uint8)
        present = [0, 1] if index % 3 == 2 else [index % 3]
        for class_index in present:
            y, x = 14 + 18 * class_index, int(rng.integers(14, side - 14))
            if class_index == 0:
                inside = (rows - y) ** 2 + (columns - x) ** 2 <= 100
            else:
                inside = (abs(rows - y) <= 8) & (abs(columns - x) <= 8)
            image[inside] = (220, 60, 50) if class_index == 0 else (40, 80, 220)
            mask[inside] = class_index + 1
        Image.fromarray(image).save(folder / "images" / f"{index:03d}.png")
        Image.fromarray(mask, mode="L").save(folder / "masks" / f"{index:03d}.png")
        split = "train" if index < num_train else "val"
        names = ";".join(TINY_CLASSES[class_index] for class_index in present)
        lines.append(f"images/{index:03d}.png,{names},{split},masks/{index:03d}.png")
    path = folder / "labels.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_values(table: Path, output: str, **changes: Any) -> dict[str, Any]:
    """Plain values of a tiny experiment: two rounds of one epoch, in process unless `changes` says otherwise."""
    backbone = {"name": "torchvision:resnet18", "weights": "none", "output_stride": 16}
    augment = {"resize_min_px": 48, "resize_max_px": 48, "crop_px": 48}
    optimiser = {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "freeze_batch_norm": False}
    compute = {"num_workers": 0, "num_decode_workers": 0}
    values = {
        "name": "tiny",
        "output": output,
        "rounds": 1,
        "prepare": {"source": {"kind": "table", "path": str(table)}, "rows_per_shard": 4},
        "classifier": {"backbone": backbone, "augment": augment, "optimiser": optimiser, "compute": compute},
        "kmeans": {"num_clusters": 2, "num_restarts": 2},
        "cams": {"cam": {"scales": [1.0], "flip": False}},
        "pseudo_masks": {"mask": {"min_confidence": 0.0}},
        "segmenter": {
            "model": {"architecture": "deeplabv2", "backbone": backbone},
            "augment": augment,
            "optimiser": optimiser,
            "compute": compute,
        },
        "stream": {"num_actors": 0},
        "tracking": {"enabled": False},
    }
    return {**values, **changes}


def small_values(table: Path, output: str, **changes: Any) -> dict[str, Any]:
    """A tiny experiment with a network whose checkpoints are 7 MB and whose whole run takes seconds; one round."""
    values = tiny_values(table, output, **{"rounds": 0, **changes})
    backbone = {"name": "timm:mobilenetv2_050", "weights": "none", "output_stride": 16}
    values["classifier"]["backbone"] = backbone
    values["segmenter"]["model"]["backbone"] = backbone
    return values


def scores_of(output: str) -> dict[str, Any]:
    """Folder -> scores.json of every scored stage of a finished run: all that a run says that is no time or memory."""
    storage = Storage(output)
    rounds = [f"rounds/{name}/cams" for name in storage.list_folders("rounds")]
    return {folder: storage.read_json(f"{folder}/scores.json") for folder in [*rounds, "pseudo_masks", "evaluation"]}


def write_toml(path: Path, values: dict[str, Any]) -> str:
    """A config file of these values; returns its path."""
    path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in values.items()))
    return str(path)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)  # texts, numbers, booleans and lists of them are written alike in both


def call_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["subcat", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="session")
def tiny_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """labels.csv of the tiny data set, drawn once a session."""
    return draw_tiny(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def finished_run(tiny_table: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Output of a tiny run, in process, that nobody disturbed; tests only read it."""
    output = str(tmp_path_factory.mktemp("finished") / "out")
    execute(parse_experiment(tiny_values(tiny_table, output)), command="subcat run tiny.toml")
    return output


@pytest.fixture
def tiny(tiny_table: Path, tmp_path: Path) -> Tiny:
    """Makes the plain values of a tiny experiment whose output is a fresh folder."""

    def make(output: str | None = None, **changes: Any) -> dict[str, Any]:
        return tiny_values(tiny_table, output or str(tmp_path / "out"), **changes)

    return make

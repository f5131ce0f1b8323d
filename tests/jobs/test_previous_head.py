"""The sub-category head of the round before, in the order of this round's clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.artifacts import Artifact
from cluster.storage import Storage
from jobs.previous_head import PreviousRound, previous_head
from jobs.train_classifier import ClassifierSettings, ClassifierTrainee, _without_effect
from subcat_core.backbones import BackboneSettings
from subcat_core.schemas import SUBCATEGORIES

NAMES = ["part-00000", "part-00001"]


def write_round(folder: Storage, shards: list[list[tuple[str, list[int], list[int]]]], num_clusters: int = 2) -> None:
    folder.write_json("result.json", {"num_clusters": num_clusters})
    for name, rows in zip(NAMES, shards, strict=True):
        columns: dict[str, Any] = {"image_id": [row[0] for row in rows], "labels": [row[1] for row in rows]}
        columns |= {"cluster_ids": [row[2] for row in rows], "distances": [[0.0] * len(row[1]) for row in rows]}
        folder.write_table(f"{name}.parquet", pa.table(columns, schema=SUBCATEGORIES))


@pytest.fixture
def previous(tmp_path: Path) -> PreviousRound:
    """Round 1: a head of rows 0 to 5 for three classes of two clusters; round 0: its sub-categories."""
    storage = Storage(str(tmp_path))
    found = PreviousRound(Artifact(storage, "rounds/01/classifier", {}), Artifact(storage, "rounds/00/sub", {}))
    write_round(
        found.subcategories.folder,
        [[("a", [0, 2], [0, 1]), ("b", [0], [0]), ("gone", [0], [1])], [("c", [0], [1]), ("d", [1], [1])]],
    )
    found.classifier.folder.write_json("result.json", {})
    head = torch.arange(6.0)[:, None] * torch.ones(3)
    torch.save(
        {"sub_head.weight": head, "parent_head.weight": torch.zeros(3, 3)},
        tmp_path / found.classifier.name / "model.pt",
    )
    return found


def test_a_head_by_hand(previous: PreviousRound, tmp_path: Path) -> None:
    """Class 0 has its clusters swapped, class 1 too, class 2 not; one image is new, one is a row a class (region)."""
    newer = Storage(str(tmp_path / "newer"))
    rows = [("b", [0], [1]), ("a", [2], [1]), ("a", [0], [1]), ("new", [0], [0])]
    write_round(newer, [rows, [("d", [1], [0]), ("c", [0], [0])]])
    head = previous_head(previous, newer, NAMES, 3)
    assert head is not None
    assert head[:, 0].tolist() == [1, 0, 3, 2, 4, 5]
    assert head.shape == (6, 3)


def test_another_number_of_clusters_has_no_head(previous: PreviousRound, tmp_path: Path) -> None:
    newer = Storage(str(tmp_path / "newer"))
    write_round(newer, [[], []], num_clusters=3)
    assert previous_head(previous, newer, NAMES, 3) is None


def test_only_the_head_starts_from_it() -> None:
    backbone = BackboneSettings(name="timm:mobilenetv2_050", weights="none", output_stride=16)
    settings = ClassifierSettings(backbone=backbone)
    head = np.arange(4 * 1280, dtype=np.float32).reshape(4, 1280)
    states = []
    for start in (None, head):
        torch.manual_seed(3)
        states.append(ClassifierTrainee(settings, 2, 2, start).build_model().state_dict())
    new, kept = states
    assert np.array_equal(kept["sub_head.weight"].numpy(), head)
    assert [key for key in new if not torch.equal(new[key], kept[key])] == ["sub_head.weight"]
    with pytest.raises(ValueError, match=r"head of shape \(6, 1280\), expected \(4, 1280\); take the same backbone"):
        ClassifierTrainee(settings, 2, 2, np.zeros((6, 1280), np.float32)).build_model()


def test_the_setting_is_in_no_fingerprint_where_it_does_nothing() -> None:
    kept = ClassifierSettings(subcategory_head="previous")
    assert [("subcategory_head" in _without_effect(kept, index)) for index in range(4)] == [True, True, False, False]
    assert "subcategory_head" in _without_effect(ClassifierSettings(), 3)

"""Validate finds everything at once: in a table, in settings, and in a manifest."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.progress import Progress
from cluster.storage import Storage
from cluster.streams import StreamSettings
from jobs.importers import problems
from jobs.manifest import write_index, write_shards
from jobs.prepare import PrepareSettings
from jobs.validate import Problem, format_problems, validate
from subcat_core.classes import ClassTable


def _validate(source: PrepareSettings | str, **options: Any) -> list[Problem]:
    return validate(source, progress=Progress(io.StringIO()), **options)


def _told(found: list[Problem]) -> list[tuple[str, int | None]]:
    return [(problem.rule, problem.row) for problem in found]


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A table with one problem a row from line 3 on."""
    pixels = np.random.default_rng(1).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    Image.new("L", (16, 15)).save(tmp_path / "small.png")
    Image.new("L", (16, 16), 77).save(tmp_path / "grey.png")
    (tmp_path / "labels.csv").write_text(
        "image_id,image,labels,split,mask\n"
        "a,good.png,cat,train,\n"
        "b,gone.png,cat,train,\n"
        "c,cut.png,cat,train,\n"
        "d,good.png,cat,train,small.png\n"
        "e,good.png,cat,train,grey.png\n"
        "f,good.png,cat,train,cut.png\n"
        "g,good.png,,train,\n"
    )
    return str(tmp_path / "labels.csv")


DECODED = [
    (problems.NO_TAG, 8),
    (problems.MISSING_FILE, 3),
    (problems.BAD_IMAGE, 4),
    (problems.MASK_SIZE, 5),
    (problems.MASK_VALUES, 6),
    (problems.BAD_MASK, 7),
]


def test_without_decoding_files_need_only_be_there(broken: str) -> None:
    assert _told(_validate(broken)) == [(problems.NO_TAG, 8), (problems.MISSING_FILE, 3)]


def test_with_decoding_every_problem_is_told_with_its_row(broken: str) -> None:
    found = _validate(broken, decode=True)
    assert _told(found) == DECODED
    assert all(problem.is_error and problem.file == broken for problem in found)
    text = format_problems(found)
    assert text.startswith("6 errors, 0 warnings")
    for rule, row in DECODED:
        assert rule in text
        assert f"{broken}:{row}: " in text


def test_on_the_cluster_the_same_is_found(broken: str, ray_cluster: None) -> None:
    assert _told(_validate(broken, decode=True, stream=StreamSettings(num_actors=2))) == DECODED


def test_problems_of_files_are_bounded_counted_and_in_order(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    lines = "".join(f"i{row},gone{row}.png,cat,train\n" for row in range(1, 1300))
    (tmp_path / "labels.csv").write_text(f"image_id,image,labels,split\na,good.png,cat,train\n{lines}")
    found = _validate(str(tmp_path / "labels.csv"))
    assert [(problem.row, problem.number) for problem in found[:-1]] == [(row, 1) for row in range(3, 1003)]
    assert (found[-1].rule, found[-1].number) == (problems.MISSING_FILE, 299)
    assert format_problems(found).startswith("1299 errors, 0 warnings")


def test_sound_settings_have_no_problems(tiny: Callable[..., dict[str, Any]]) -> None:
    settings = PrepareSettings.model_validate_json(json.dumps(tiny()["prepare"]))
    assert _validate(settings, decode=True) == []
    assert format_problems([]) == "no problems"


def test_tables_that_cannot_be_opened_are_one_problem(tmp_path: Path) -> None:
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "wrong.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "wrong.parquet").read_bytes()[:-9])
    for name in ("wrong.parquet", "cut.parquet"):
        (found,) = _validate(str(tmp_path / name))
        assert found.rule == problems.BAD_TABLE
        assert name in str(found)
    (found,) = _validate(str(tmp_path / "gone.csv"))
    assert found.rule == problems.MISSING_FILE


def test_manifest_is_checked_by_the_same_rules(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    storage = Storage(str(tmp_path / "out"))
    folder = storage.child("manifest")
    rows = [
        {"image_id": "a", "uri": str(tmp_path / "good.png"), "split": "train", "labels": [0]},
        {"image_id": "a", "uri": str(tmp_path / "good.png"), "split": "train", "labels": [0]},
        {"image_id": "b", "uri": str(tmp_path / "gone.png"), "split": "train", "labels": [1]},
        {"image_id": "c", "uri": str(tmp_path / "good.png"), "split": "train", "labels": [2]},
    ]
    write_index(folder, ClassTable(("cat", "dog")), write_shards(folder, rows, 2))
    with pytest.raises(ValueError, match="no manifest here"):
        _validate(storage.root)
    folder.write_json("marker.json", {"inputs": {"stage": "prepare"}, "stats": {"fingerprint": "x"}})
    found = _validate(storage.root)
    assert [(problem.rule, Path(problem.file).name, problem.row) for problem in found] == [
        (problems.UNKNOWN_CLASS, "part-00001.parquet", 2),
        (problems.DUPLICATE_ID, "part-00000.parquet", 2),
        (problems.MISSING_FILE, "part-00001.parquet", 1),
    ]

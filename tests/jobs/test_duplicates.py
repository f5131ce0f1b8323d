"""Duplicate image_ids: both rows are named, exactly, whether the register fits memory or has gone to disk."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs.importers import duplicates, problems
from jobs.importers.duplicates import IdRegister, tell_duplicates
from jobs.importers.problems import ProblemLog
from jobs.importers.rows import ImportRow, ImportSource, RowCounts, checked_rows
from subcat_core.classes import ClassTable


def _rows(ids: list[str], file: str = "a.csv") -> list[ImportRow]:
    return [ImportRow(image_id, f"/{image_id}.png", "train", (0,), None, file, n) for n, image_id in enumerate(ids, 2)]


def _told(rows: list[ImportRow]) -> list[tuple[str, int | None, str]]:
    register, log = IdRegister(), ProblemLog()
    for row in rows:
        register.add(row.image_id)
    tell_duplicates(register, rows, log)
    register.close()
    return [(problem.file, problem.row, problem.message) for problem in log.kept]


def test_both_rows_are_named() -> None:
    assert _told(_rows(["x", "y", "x", "z", "x"])) == [
        ("a.csv", 4, "image_id 'x' appears again (first in row 2)"),
        ("a.csv", 6, "image_id 'x' appears again (first in row 2)"),
    ]
    assert _told(_rows(["x"]) + _rows(["x"], "b.csv")) == [
        ("b.csv", 2, "image_id 'x' appears again (first in a.csv:2)")
    ]
    assert _told(_rows(["x", "y"])) == []


@pytest.mark.parametrize("buffered", [1, 7, 64, 1000])
def test_on_disk_as_a_plain_dict(buffered: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BUFFERED", buffered)
    rows = _rows([f"i{number}" for number in rng.integers(0, 300, 500)])
    seen: dict[str, int] = {}
    expected = []
    for number, row in enumerate(rows, 2):
        if row.image_id in seen:
            message = f"image_id {row.image_id!r} appears again (first in row {seen[row.image_id]})"
            expected.append(("a.csv", number, message))
        seen.setdefault(row.image_id, number)
    assert len(expected) > 100
    assert _told(rows) == expected


def test_equal_hashes_of_other_ids_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hash:
        def __init__(self, data: bytes, digest_size: int) -> None:
            self._byte = len(data) % 2  # ids of one length collide

        def digest(self) -> bytes:
            return bytes([self._byte] * 8)

    monkeypatch.setattr(duplicates.hashlib, "blake2b", Hash)
    assert _told(_rows(["x", "y", "z"])) == []
    assert [row for _, row, _ in _told(_rows(["x", "y", "x", "y", "zz"]))] == [4, 5]


def test_more_than_are_named_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_MAX_NAMED", 2)
    register, log, rows = IdRegister(), ProblemLog(), _rows(["x", "y"] * 3)
    for row in rows:
        register.add(row.image_id)
    tell_duplicates(register, rows, log)
    assert [problem.row for problem in log.kept] == [4, 5]
    assert log.counts[problems.DUPLICATE_ID] == 4


def test_a_source_without_duplicates_is_read_once_and_nothing_stays_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_BUFFERED", 2)
    monkeypatch.setattr(duplicates.tempfile, "tempdir", str(tmp_path))
    reads = []

    def rows(log: ProblemLog) -> Iterator[ImportRow]:
        reads.append(1)
        yield from _rows(["a", "b", "c", "d", "e"])

    classes = ClassTable(("cat",))
    source = ImportSource(classes, (), {}, rows, "a.csv")
    assert [row.image_id for row in checked_rows(source, ProblemLog(), RowCounts(classes))] == ["a", "b", "c", "d", "e"]
    assert reads == [1]
    assert list(tmp_path.iterdir()) == []

"""The harness: turns, medians and fits by hand; one benchmark in its quick size."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import crf
from benchmarks.harness import Comparison, Sample, exponent, finish, in_child, interleave, line, table
from benchmarks.time_model import fit

FIRST = {"a": [Sample(1.0, 2.0), Sample(3.0, 3.0), Sample(2.0, 9.0)], "b": [Sample(2.0, 2.0)] * 3}


def test_medians_and_ratios_by_hand() -> None:
    both = Comparison(FIRST)
    assert (both.median("a"), both.median("a", "wall_s")) == (2.0, 3.0)
    assert both.ratio("a", "b") == 1.0  # of 0.5, 1.5 and 1
    assert both.ratio("a", "b", "wall_s") == 1.5  # of 1, 1.5 and 4.5
    assert both.to_json()["b"]["samples"] == [{"cpu_s": 2.0, "wall_s": 2.0}] * 3


def test_sides_take_turns_and_are_checked() -> None:
    order, results = [], []
    sides = {name: lambda name=name: order.append(name) or name.upper() for name in ("a", "b")}
    found = interleave(sides, 3, warm_up=1, check=lambda of_turn: results.append(dict(of_turn)))
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert results == [{"a": "A", "b": "B"}] * 3
    assert {name: len(samples) for name, samples in found.samples.items()} == {"a": 3, "b": 3}


def test_fits_give_back_what_they_were_made_from() -> None:
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert line(sizes, [2 + 0.5 * n for n in sizes]) == pytest.approx((2, 0.5))
    records = [
        {"num_images": n, "num_actors": p, "wall_s": 2 + 0.1 * n / p + 0.3 * log}
        for n in (10, 20)
        for log, p in enumerate((1, 2, 4))
    ]
    assert fit(records) == pytest.approx({"a_s": 2, "c_s": 0.1, "r_s": 0.3, "rms_s": 0}, abs=1e-9)


def test_tables() -> None:
    shown = table(["what", "n", "s"], [["a", 12_345, 0.12345], ["b", 1, 4321.5]])
    assert shown == "| what | n | s |\n| --- | --- | --- |\n| a | 12,345 | 0.123 |\n| b | 1 | 4322 |"


def test_limits_that_are_not_kept_end_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^not kept: too slow; too large$"):
        finish("x", {"ratio": 2.0}, "shown", ["too slow", "too large"], tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["ratio"] == 2.0
    assert capsys.readouterr().out == "shown\n"


def test_a_child_has_its_own_memory_and_its_error_comes_back() -> None:
    kept = bytearray(200_000_000)
    result, sample, peak = in_child(sorted, [3, 1, 2])
    assert result == [1, 2, 3]
    assert sample.cpu_s >= 0
    assert 1e6 < peak < len(kept)
    with pytest.raises(TypeError):
        in_child(sorted, 1)


def test_a_benchmark_in_its_quick_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["crf", "--quick", "--json", str(tmp_path / "crf.json")])
    crf.main()
    found = json.loads((tmp_path / "crf.json").read_text())
    assert [row["num_labels"] for row in found["rows"]] == [2, 3, 5, 21]
    assert all(len(row["subcat"]["samples"]) == 2 for row in found["rows"])
    assert re.search(r"^\| 21 \|", capsys.readouterr().out, re.MULTILINE)

"""The tables at the end of a run, at the width of a narrow terminal: nothing that a person looks for is broken."""

import io
import re

import pytest
from rich.console import Console

from cluster.storage import Storage
from jobs.config import parse_experiment
from jobs.pipeline import plan
from jobs.summary import print_summary
from tests.jobs.conftest import Tiny, scores_of


@pytest.fixture
def lines(tiny: Tiny, finished_run: str) -> list[str]:
    """What is printed of a finished run at 80 columns."""
    stream = io.StringIO()
    experiment = parse_experiment(tiny(output=finished_run))
    print_summary(Storage(finished_run), experiment, Console(width=80, file=stream))
    return stream.getvalue().splitlines()


def _with_all(lines: list[str], *words: str) -> list[str]:
    return [line for line in lines if all(re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.])", line) for word in words)]


def test_every_stage_stands_on_one_line_with_its_round_and_seconds(
    lines: list[str], tiny: Tiny, finished_run: str
) -> None:
    storage = Storage(finished_run)
    for step in plan(parse_experiment(tiny(output=finished_run))):
        if step.stage == "report":  # made again on every call: it has no line
            continue
        seconds = storage.read_json(f"{step.folder}/marker.json")["stats"]["seconds"]
        words = [step.stage, f"{seconds:.1f}", *([] if step.round_index is None else [str(step.round_index)])]
        assert len(_with_all(lines, *words)) == 1, (words, lines)


def test_every_miou_stands_on_one_line_with_its_split(lines: list[str], finished_run: str) -> None:
    num_scores = 0
    for scores in scores_of(finished_run).values():
        for split, score in scores["splits"].items():
            parts = [score["fixed"], score["best"]] if "best" in score else [score]
            for part in parts:
                threshold = [f"{part['threshold']:.2f}"] if "threshold" in part else []
                assert _with_all(lines, split, str(score["num_images"]), f"{part['miou']:.3f}", *threshold), lines
                num_scores += 1
    assert num_scores == 2 * 2 * 2 + 1 + 1  # CAMs of two rounds and splits at two thresholds, pseudo masks, segmenter


def test_the_tables_fit_and_cut_nothing(lines: list[str]) -> None:
    assert all(len(line) <= 80 for line in lines[1:])  # the first one names the output folder, however long
    assert not [line for line in lines if "…" in line]

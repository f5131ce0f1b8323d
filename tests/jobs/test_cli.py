"""The command line: its words are frozen, its errors one message with the right exit code, its commands real."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from jobs import cli
from jobs.config import parse_experiment
from jobs.execution import needs_ray
from tests.jobs.conftest import Tiny, call_cli


def _toml(folder: Path, table: Path, text: str = "") -> str:
    path = folder / "tiny.toml"
    path.write_text(
        f'name = "tiny"\noutput = {json.dumps(str(folder / "out"))}\n{text}\n'
        f'[prepare.source]\nkind = "table"\npath = {json.dumps(str(table))}\n'
        "[tracking]\nenabled = false\n[stream]\nnum_actors = 0\n"
    )
    return str(path)


def test_the_commands_are_frozen() -> None:
    """A new command needs a decision, not a patch."""
    group = typer.main.get_command(cli.app)
    commands = [
        "compare",
        "demo",
        "evaluate",
        "predict",
        "prepare",
        "report",
        "results",
        "run",
        "submission",
        "submit",
        "validate",
    ]
    assert sorted(group.commands) == commands  # type: ignore[attr-defined]


def test_config_errors_are_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_table: Path
) -> None:
    assert call_cli(monkeypatch, "run", str(tmp_path / "none.toml")) == 2
    assert "cannot be read" in capsys.readouterr().err
    config = _toml(tmp_path, tiny_table, "roundss = 1")
    assert call_cli(monkeypatch, "run", config) == 2
    told = capsys.readouterr().err
    assert "roundss: unknown key; nearest: rounds" in told
    assert "Traceback" not in told
    assert call_cli(monkeypatch, "run", _toml(tmp_path, tiny_table), "--stage", "train") == 2
    assert "no such stage" in capsys.readouterr().err


def test_dry_run_lists_stages_and_settings_and_does_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_table: Path
) -> None:
    assert call_cli(monkeypatch, "run", _toml(tmp_path, tiny_table), "--dry-run", "--set", "rounds=1") == 0
    told = capsys.readouterr().out
    assert told.count("to do") == 13
    assert "kmeans.num_clusters = 10" in told
    assert not (tmp_path / "out").exists()


def test_a_storage_that_cannot_be_written_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_table: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    blocked = json.dumps(str(tmp_path / "file" / "out"))
    assert call_cli(monkeypatch, "prepare", _toml(tmp_path, tiny_table), "--set", f"output={blocked}") == 1
    told = capsys.readouterr().err
    assert "file" in told
    assert "Traceback" not in told


def test_validate_prints_all_problems_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_table: Path
) -> None:
    assert call_cli(monkeypatch, "validate", _toml(tmp_path, tiny_table)) == 0
    capsys.readouterr()
    broken = tmp_path / "labels.csv"
    broken.write_text("image,labels\nnone.png,disc\nother.png,\n")
    assert call_cli(monkeypatch, "validate", str(broken)) == 2
    told = capsys.readouterr().out
    assert "none.png" in told
    assert "other" in told


def test_predict_evaluate_and_report_on_a_finished_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    finished_run: str,
    tiny_table: Path,
) -> None:
    masks = tmp_path / "masks"
    (tmp_path / "new").mkdir()
    for index, size in enumerate([(40, 30), (1, 1), (33, 64)]):
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(tmp_path / "new" / f"photo-{index}.png")
    (tmp_path / "new" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    arguments = [str(tmp_path / "new"), "--model", f"{finished_run}/segmenter", "--output", str(masks)]
    assert call_cli(monkeypatch, "predict", *arguments, "--max-bad-frac", "0.5") == 0
    told = capsys.readouterr().out
    assert "3 masks" in told
    assert "broken.jpg" in told
    with Image.open(masks / "png" / "photo-0.png") as mask:
        assert (mask.mode, mask.size) == ("P", (30, 40))
        assert int(np.asarray(mask).max()) <= 2

    (tmp_path / "new" / "photo-3.png").write_bytes((tmp_path / "new" / "photo-0.png").read_bytes())
    assert call_cli(monkeypatch, "predict", *arguments, "--max-bad-frac", "0.5") == 2, "other images, the same folder"
    assert "images" in capsys.readouterr().err

    assert call_cli(monkeypatch, "evaluate", finished_run) == 0
    told = capsys.readouterr().out
    scores = json.loads((Path(finished_run) / "evaluation" / "scores.json").read_text())
    assert f"{scores['splits']['val']['miou']:.3f}" in told
    assert "pixel accuracy" in told
    assert "all background" in told

    config = _toml(tmp_path, tiny_table)
    assert (
        call_cli(monkeypatch, "report", config, "--set", f"output={json.dumps(finished_run)}", "--set", "rounds=1") == 0
    )
    assert "index.html" in capsys.readouterr().out


def test_needs_ray_is_decided_by_the_settings(tiny: Tiny) -> None:
    assert not needs_ray(parse_experiment(tiny()))
    assert needs_ray(parse_experiment(tiny(stream={"num_actors": 1})))
    one_round = {"1": {"classifier": {"compute": {"num_workers": 2}}}}
    assert needs_ray(parse_experiment(tiny(round=one_round)))

"""`python -m benchmarks.study STUDY.toml`: what variants of one config do to the maps of its rounds, side by side.

A study names a config, settings that all variants share, and for each variant what differs. A variant goes up to the
last round's maps. What a variant has in common with the first one (the manifest, and round 0 where only later rounds
differ) is copied, not made again; markers refuse a copy that does not fit. The table has, for every round, the mIoU of
the plain maps at their best threshold, of the spread maps where there are some, and the score without ground truth.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from cluster.storage import Storage
from jobs.results import rank_correlations

_SHARED = {  # prefix of a setting that leaves these folders as they are
    "features.": ("manifest", "rounds/00/classifier", "rounds/00/cams"),
    "kmeans.": ("manifest", "rounds/00/classifier", "rounds/00/cams", "rounds/00/features"),
    "round.1.": ("manifest", "rounds/00"),
    "rounds=": ("manifest", "rounds/00"),
    "prepare.": (),
}


def main() -> int:
    """Run what is missing, print the table; 0 when every variant ended."""
    parser = argparse.ArgumentParser(description="Variants of one config, side by side.")
    parser.add_argument("study", help="TOML with config, folder, common and [variants]")
    parser.add_argument("--set", action="append", default=[], help="Override a setting of all variants")
    parser.add_argument("--only", action="append", default=[], help="Run this variant alone; may be repeated")
    arguments = parser.parse_args()
    study = tomllib.loads(Path(arguments.study).read_text())
    root = Path(study["folder"])
    done: list[str] = []
    for name, overrides in study["variants"].items():
        output = root / name
        if not arguments.only or name in arguments.only:
            if done:
                _share(root / done[0], output, overrides)
            every = [*study.get("common", []), *overrides, *arguments.set, f"output={output}"]
            command = [sys.executable, "-m", "jobs", "run", study["config"], "--stage", "make_cams"]
            code = subprocess.run([*command, *(word for text in every for word in ("--set", text))]).returncode
            if code:
                print(f"{name}: ended with exit code {code}", file=sys.stderr)
                return code
        if (output / "config.json").exists():
            done.append(name)
    print(table([(name, Storage(str(root / name))) for name in done]))
    print()
    print(rank_correlations([Storage(str(root / name)) for name in done]))
    return 0


def shared_folders(overrides: list[str]) -> tuple[str, ...]:
    """What a variant with these overrides has in common with the run that it differs from."""
    parts = [
        next((folders for prefix, folders in _SHARED.items() if text.startswith(prefix)), ("manifest",))
        for text in overrides
    ] or [("manifest", "rounds")]

    def inside(folder: str, others: tuple[str, ...]) -> bool:
        return any(folder == other or folder.startswith(f"{other}/") for other in others)

    every = dict.fromkeys(folder for part in parts for folder in part)
    return tuple(folder for folder in every if all(inside(folder, part) for part in parts))


def _share(base: Path, output: Path, overrides: list[str]) -> None:
    if output.exists():
        return
    for folder in shared_folders(overrides):
        if (base / folder).exists():
            shutil.copytree(base / folder, output / folder)


def table(runs: list[tuple[str, Storage]]) -> str:
    """One row a variant and round."""
    header = ["variant", "round", "split", "CAM", "at", "spread CAM", "at", "score without ground truth", "AP"]
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, storage in runs:
        for index in range(storage.read_json("config.json")["rounds"] + 1):
            folder = f"rounds/{index:02d}"
            if not storage.exists(f"{folder}/cams/scores.json"):
                continue
            cams = storage.read_json(f"{folder}/cams/scores.json")
            metrics = storage.read_json(f"{folder}/classifier/result.json")["metrics"]
            for split, score in cams["splits"].items():
                cells = [name, str(index), split, *_numbers(score), _label_free(cams), _number(metrics.get("map"))]
                rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _numbers(score: dict[str, Any]) -> list[str]:
    if "best" not in score:  # no background, so no threshold
        return [_number(score["miou"]), "", "", ""]
    kinds = [score["plain"]["best"], score["best"]] if "plain" in score else [score["best"], None]
    return [
        text for best in kinds for text in ((_number(best["miou"]), f"{best['threshold']:.2f}") if best else ("", ""))
    ]


def _label_free(cams: dict[str, Any]) -> str:
    scores = cams["label_free"]["score"]
    return _number(max(scores)) if scores else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())

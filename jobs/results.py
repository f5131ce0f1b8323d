"""`subcat results RUN RUN ...`: the scores of several runs of one config as a Markdown table, mean and spread.

Runs differ in rng_seed alone; docs/results.md holds what this prints. The spread is the sample standard deviation.
"""

from __future__ import annotations

import statistics

from cluster.storage import Storage

Line = tuple[str, str, str]
"""(what, split, which number)"""


def scores_of_run(storage: Storage) -> dict[Line, float | None]:
    """Every mIoU of one finished run. Raises ValueError when the run is not finished."""
    if not storage.exists("evaluation/marker.json"):
        raise ValueError(f"{storage.root}: not a finished run (no evaluation/marker.json); run its config to the end")
    config = storage.read_json("config.json")
    lines: dict[Line, float | None] = {}
    for index in range(config["rounds"] + 1):
        for split, score in storage.read_json(f"rounds/{index:02d}/cams/scores.json")["splits"].items():
            name = f"CAM, round {index}" + (" (parents only)" if index == 0 else "")
            lines[(name, split, f"at {score['fixed']['threshold']:.2f}")] = score["fixed"]["miou"]
            lines[(name, split, "at best threshold")] = score["best"]["miou"]
            lines[(name, split, "best threshold")] = score["best"]["threshold"]
    for split, score in storage.read_json("pseudo_masks/scores.json")["splits"].items():
        lines[("pseudo masks", split, "mIoU")] = score["miou"]
    evaluation = storage.read_json("evaluation/scores.json")
    for split, score in evaluation["splits"].items():
        lines[("segmenter", split, "mIoU")] = score["miou"]
        lines[("all background", split, "mIoU")] = evaluation["baselines"]["all_background"][split]["miou"]
    return lines


def markdown(runs: list[dict[Line, float | None]], names: list[str]) -> str:
    """One row a number, one column a run, then mean and sample standard deviation."""
    rows = [f"| what | split | number | {' | '.join(names)} | mean | spread |", "|---" * (len(names) + 5) + "|"]
    for key in runs[0]:
        values = [run.get(key) for run in runs]
        known = [value for value in values if value is not None]
        mean = f"{statistics.mean(known):.3f}" if known else ""
        spread = f"{statistics.stdev(known):.3f}" if len(known) > 1 else ""
        cells = [*key, *("" if value is None else f"{value:.3f}" for value in values), mean, spread]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def results_table(outputs: list[str]) -> str:
    """The table of the runs with these output folders. Raises ValueError for one that is not a finished run."""
    storages = [Storage(path) for path in outputs]
    missing = [storage.root for storage in storages if not storage.exists("config.json")]
    if missing:
        raise ValueError(f"not the output of a run: {', '.join(missing)}; give output folders of finished runs")
    seeds = [f"seed {storage.read_json('config.json')['rng_seed']}" for storage in storages]
    return markdown([scores_of_run(storage) for storage in storages], seeds)

"""The one way that benchmarks measure: sides that take turns, CPU time and wall time, one thread, peak memory.

A side is a function without arguments. `interleave` runs the sides A/B/A/B after a warm-up of each; a ratio is the
median over the pairs, and both raw medians stand beside it. CPU time is that of this process and of the children that
have ended. `in_child` runs a function in a fresh process, so that its peak memory is its own. Results go to a JSON file
and, as a table, to the terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One run of a side. cpu_s: user and system time."""

    cpu_s: float
    wall_s: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The samples of some sides that took turns: side -> one sample a turn."""

    samples: Mapping[str, Sequence[Sample]]

    def median(self, side: str, unit: str = "cpu_s") -> float:
        """unit: cpu_s or wall_s."""
        return statistics.median(getattr(sample, unit) for sample in self.samples[side])

    def ratio(self, side: str, peer: str, unit: str = "cpu_s") -> float:
        """Median over the turns of side / peer; below 1 the side takes less."""
        pairs = zip(self.samples[side], self.samples[peer], strict=True)
        return statistics.median(getattr(a, unit) / getattr(b, unit) for a, b in pairs)

    def to_json(self) -> dict[str, Any]:
        """Medians, and every sample."""
        return {
            name: {
                "cpu_s": self.median(name),
                "wall_s": self.median(name, "wall_s"),
                "samples": [dataclasses.asdict(sample) for sample in samples],
            }
            for name, samples in self.samples.items()
        }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for the libraries that are loaded."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        torch = sys.modules.get("torch")
        before = torch.get_num_threads() if torch is not None else 0
        if torch is not None:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch is not None:
                torch.set_num_threads(before)


def measure(side: Callable[[], _Result]) -> tuple[Sample, _Result]:
    """Run once."""
    cpu, wall = _cpu_seconds(), time.perf_counter()
    result = side()
    return Sample(_cpu_seconds() - cpu, time.perf_counter() - wall), result


def interleave(
    sides: Mapping[str, Callable[[], Any]],
    turns: int,
    *,
    warm_up: int = 1,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Comparison:
    """Every side in each turn, in order; `check` gets the results of a turn and raises where they do not agree."""
    for side in sides.values():
        for _ in range(warm_up):
            side()
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    with one_thread():
        for _ in range(turns):
            results = {}
            for name, side in sides.items():
                sample, results[name] = measure(side)
                samples[name].append(sample)
            if check is not None:
                check(results)
    return Comparison(samples)


def in_child(function: Callable[..., _Result], *arguments: Any) -> tuple[_Result, Sample, int]:
    """(result, time, peak resident bytes) of a function in a fresh Python process; all must pickle.

    Importing the function's module is not in the time, and is in the memory. Its error is raised here.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        error, result, sample, peak = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__}: its process died with exit code {process.exitcode}") from None
    process.join()
    if error is not None:
        raise error
    return result, sample, peak


def _child(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        with one_thread():
            sample, result = measure(lambda: function(*arguments))
    except Exception as error:
        sender.send((error, None, None, 0))
    else:
        sender.send((None, result, sample, peak_bytes()))


def peak_bytes() -> int:
    """The highest resident memory of this process since its start, shared libraries that it has loaded included."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage would count what the parent held when it started this process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """p of seconds = c * size ** p, by least squares of the logarithms: 1 is proportional."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, c) of seconds = a + c * size, each size weighted by its inverse, as errors grow with the time."""
    slope, start = np.polyfit(sizes, seconds, 1, w=1 / np.asarray(sizes, float))
    return float(start), float(slope)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown: numbers with three figures."""
    cells = [[_cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [[*header], ["---"] * len(header), *cells])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a small size, in less than half a minute")
    options.add_argument("--json", type=Path, help="write the numbers here too")
    return options


def finish(name: str, numbers: Mapping[str, Any], shown: str, failures: Sequence[str], path: Path | None) -> None:
    """Print the table and write the JSON; exit with 1 where a limit is not kept."""
    print(shown)
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    if path is not None:
        path.write_text(json.dumps({"benchmark": name, "machine": machine, **numbers}, indent=2) + "\n")
    if failures:
        raise SystemExit("not kept: " + "; ".join(failures))

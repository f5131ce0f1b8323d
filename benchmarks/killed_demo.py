"""`make killed-demo`: the demo killed with SIGKILL in the middle of every stage and called again, beside the whole one.

Each kill waits until a stage has begun to write and has no marker yet; the driver and its process group die at once,
and so do Ray's processes, which belong to its session. What is printed: where the kills fell, and whether every score
of the final table equals that of the run that nobody disturbed (made first, unless it is there).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from jobs.config import load_experiment
from jobs.pipeline import StagePlan, plan

_RECORDS = ("started.json", "marker.json", "segmenter.json")  # written before the work itself, or after it
_POLL_S = 0.05


def main() -> int:
    """Kill, go on, compare; 0 when the tables are the same."""
    whole, killed = Path("outputs/demo"), Path("outputs/killed-demo")
    if killed.exists():
        print(f"{killed} is there already: delete it to begin anew", file=sys.stderr)
        return 2
    if not (whole / "evaluation/marker.json").exists():
        _finish(_start(whole))
    for step in plan(load_experiment("configs/demo.toml")):
        if step.stage != "report":  # made again on every call, so it has no middle
            _kill_in(step, killed)
    _finish(_start(killed))
    different = [name for name in _scored(whole) if _read(whole / name) != _read(killed / name)]
    print(f"scores that differ from the undisturbed run: {', '.join(different) or 'none'}")
    return 1 if different else 0


def _start(output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs", "demo", "--output", str(output)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise SystemExit(f"the demo ended with exit code {process.returncode}")


def _kill_in(step: StagePlan, output: Path) -> None:
    """Start the run and kill it once the stage has written a part of its output."""
    folder, name = output / step.folder, _name(step)
    process, started = _start(output), time.monotonic()
    while not _has_begun(folder):
        if process.poll() is not None:
            raise SystemExit(f"the demo ended (exit code {process.returncode}) before {name} could be killed")
        time.sleep(_POLL_S)
    members = [each for each in psutil.process_iter() if _session(each.pid) == process.pid]
    for each in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(members, timeout=30)
    state = "already complete" if (folder / "marker.json").exists() else "half done"
    print(f"killed {len(members)} processes in {name} ({state}) after {time.monotonic() - started:.0f} s", flush=True)


def _has_begun(folder: Path) -> bool:
    """Whether anything but records lies in the folder: a shard, a checkpoint, a file of the import."""
    return any(path.is_file() and path.name not in _RECORDS for path in folder.rglob("*"))


def _session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


def _name(step: StagePlan) -> str:
    return step.stage if step.round_index is None else f"{step.stage} {step.round_index}"


def _scored(output: Path) -> list[str]:
    return sorted(str(path.relative_to(output)) for path in output.rglob("scores.json"))


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    raise SystemExit(main())

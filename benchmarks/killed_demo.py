"""`make killed-demo`: the demo killed with SIGKILL in the middle of every stage and called again, beside the whole one.

Each kill waits until a stage has begun (its first output, or a second and a half where it writes at its end) and has no
marker yet; the driver and its process group die at once, and so do Ray's processes, which belong to its session. What
is printed: where the kills fell, and whether every score of the final table equals that of the run that nobody
disturbed. The exit code is 1 where a stage was complete before it could be killed, or a score differs. `--set a.b=c` as
for the demo, say for fewer epochs.
"""

from __future__ import annotations

import argparse
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
_BEGUN_S = 1.5  # after its first record, a stage is at work


def main() -> int:
    """Kill, go on, compare; 0 when the tables are the same."""
    parser = argparse.ArgumentParser(description="The demo, killed in every stage, beside the whole one.")
    parser.add_argument("--set", action="append", default=[], help="Override a setting of both: --set rounds=1")
    overrides = parser.parse_args().set
    whole, killed = Path("outputs/demo" if not overrides else "outputs/whole-demo"), Path("outputs/killed-demo")
    if killed.exists():
        print(f"{killed} is there already: delete it to begin anew", file=sys.stderr)
        return 2
    _finish(_start(whole, overrides))  # skips what is complete, and refuses an output of other settings
    steps = [step for step in plan(load_experiment("configs/demo.toml", overrides)) if step.stage != "report"]
    missed = [_name(step) for step in steps if not _kill_in(step, killed, overrides)]  # the report has no middle
    _finish(_start(killed, overrides))
    scored = _scored(whole)
    different = [name for name in scored if _read(whole / name) != _read(killed / name)]
    print(f"stages: {len(steps)}; complete before they could be killed: {', '.join(missed) or 'none'}")
    print(f"files of scores: {len(scored)}; different from the undisturbed run: {', '.join(different) or 'none'}")
    return 1 if different or missed or not scored else 0


def _start(output: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs", "demo", "--output", str(output)]
    command += [word for override in overrides for word in ("--set", override)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise SystemExit(f"the demo ended with exit code {process.returncode}")


def _kill_in(step: StagePlan, output: Path, overrides: list[str]) -> bool:
    """Start the run and kill it once the stage has begun; whether its output was still unfinished then."""
    folder, name = output / step.folder, _name(step)
    process, started = _start(output, overrides), time.monotonic()
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
    half_done = not (folder / "marker.json").exists()
    state = "half done" if half_done else "already complete"
    print(f"killed {len(members)} processes in {name} ({state}) after {time.monotonic() - started:.0f} s", flush=True)
    return half_done


def _has_begun(folder: Path) -> bool:
    """Whether a shard, a checkpoint or a file of the import lies in the folder, or it was begun some time ago."""
    begun = folder / "started.json"
    if begun.exists() and time.time() - begun.stat().st_mtime > _BEGUN_S:
        return True
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

"""`make bench`: run the benchmarks, one after the other, each in its own process; all their numbers go to one folder.

`python -m benchmarks [NAME ...] [--quick] [--output FOLDER]`. FOLDER (outputs/bench) gets NAME.json, and NAME.md with
what was printed. One whose peer is not installed is not run, and told; the others go on.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

# Name -> module and options.
BENCHMARKS = {
    "crf": ("crf",),
    "kmeans": ("kmeans",),
    "image_steps": ("image_steps",),
    "training_input": ("training_input",),
    "manifest": ("manifest",),
    "growth": ("growth",),
    "growth_ray": ("growth", "--ray"),
    "stage_overhead": ("stage_overhead",),
    "time_model": ("time_model",),
    "ray_train": ("ray_train",),
}
# Peers that `pip install .[dev]` does not bring: benchmark -> (module, package, how to get it).
EXTRA_PEERS = {"crf": ("pydensecrf", "pydensecrf2", "make peers (a C++ compiler, Python 3.11 or 3.12)")}


def why_not(benchmark: str) -> str | None:
    """Why a benchmark cannot be run here, and what to do; None where it can."""
    if benchmark not in EXTRA_PEERS:
        return None
    module, package, remedy = EXTRA_PEERS[benchmark]
    if importlib.util.find_spec(module) is not None:
        return None
    return f"not run: its peer {package} is not installed; get it by {remedy}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: all of them")
    options.add_argument("--quick", action="store_true", help="small sizes, to see that they run")
    options.add_argument("--output", type=Path, default=Path("outputs/bench"))
    arguments = options.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        options.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.names or BENCHMARKS:
        print(f"== {name}", flush=True)
        reason = why_not(name)
        if reason is not None:
            print(reason, flush=True)
            continue
        numbers = (arguments.output / f"{name}.json").resolve()
        module, *fixed = BENCHMARKS[name]
        command = [sys.executable, "-m", f"benchmarks.{module}", *fixed, "--json", str(numbers)]
        command += ["--quick"] if arguments.quick else []
        done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        (arguments.output / f"{name}.md").write_text(done.stdout)
        if done.returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

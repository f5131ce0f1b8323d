"""`make bench`: run every benchmark of this folder, one after the other, each in its own process.

One whose peer is not installed is not run, and told; the others go on.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

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
    folder = Path(__file__).parent
    failed = []
    for path in sorted(folder.glob("[a-z]*.py")):
        print(f"== {path.stem}", flush=True)
        reason = why_not(path.stem)
        if reason is not None:
            print(reason, flush=True)
        elif subprocess.run([sys.executable, "-m", f"benchmarks.{path.stem}"], cwd=folder.parent).returncode:
            failed.append(path.stem)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

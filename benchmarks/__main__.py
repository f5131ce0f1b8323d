"""`make bench`: run every benchmark of this folder, one after the other, each in its own process."""

import subprocess
import sys
from pathlib import Path


def main() -> None:
    folder = Path(__file__).parent
    failed = []
    for path in sorted(folder.glob("[a-z]*.py")):
        print(f"== {path.stem}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{path.stem}"], cwd=folder.parent).returncode:
            failed.append(path.stem)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

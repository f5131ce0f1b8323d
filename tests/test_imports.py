"""The house of the design: folders import downwards only, libraries stand where they belong, importing does nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("subcat_core", "cluster", "jobs")  # each imports those before it, and itself
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALLOWED = {
    "ray": ("cluster/", "jobs/"),
    "mlflow": ("cluster/tracking",),  # one part in several files: tracking.py is its face
    "faiss": ("cluster/faiss_search.py",),
    "s3fs": ("cluster/storage.py",),
    "pyarrow.fs": ("cluster/storage.py",),
    "boto3": (),
    "torch": ("cluster/", "jobs/", "subcat_core/"),
}
ENVIRONMENT = ("cluster/runtime.py", "cluster/storage.py", "jobs/cli.py", "jobs/__main__.py")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_of(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}.")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_folders_import_downwards_only(path: Path) -> None:
    above = PACKAGES[PACKAGES.index(path.relative_to(ROOT).parts[0]) + 1 :]
    wrong = [f"{relative(path)}:{line}: {name}" for name, line in imports(path) if name.split(".")[0] in above]
    assert not wrong
    outside = {"tests", "benchmarks", "infra"}
    assert not [name for name, _ in imports(path) if name.split(".")[0] in outside]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_libraries_stand_where_they_belong(path: Path) -> None:
    wrong = [
        f"{relative(path)}:{line}: {name} belongs in {', '.join(places) or 'no file'}"
        for name, line in imports(path)
        for library, places in ALLOWED.items()
        if is_of(name, library) and not relative(path).startswith(places or ("nowhere",))
    ]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_environment_and_arguments_are_read_in_few_places(path: Path) -> None:
    if relative(path) in ENVIRONMENT:
        return
    wrong = [
        f"{relative(path)}:{node.lineno}: {node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {("os", "environ"), ("os", "getenv"), ("os", "putenv"), ("sys", "argv")}
    ]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_say_what_they_are_for(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, f"{relative(path)} has no docstring"
    assert path.stem not in {"utils", "helpers", "common"}


QUIET_IMPORT = """
import importlib, json, logging, os, random, sys
import numpy, ray, torch

names, packages = json.loads(sys.argv[1])
seeds = []

def watched(seed):
    def call(*arguments, **named):
        caller = os.path.relpath(sys._getframe(1).f_code.co_filename)
        if caller.split(os.sep)[0] in packages:
            seeds.append(caller)
        return seed(*arguments, **named)
    return call

random.seed, numpy.random.seed, torch.manual_seed = map(watched, (random.seed, numpy.random.seed, torch.manual_seed))
third_party = ("KMP_", "RAY_", "TORCH", "TRITON", "_MLFLOW")  # libraries set their own on import

def state():
    return {k: v for k, v in os.environ.items() if not k.startswith(third_party)}, list(logging.getLogger().handlers)

before = state()
for name in names:
    importlib.import_module(name)
assert state() == before, "the environment or logging has changed"
assert not seeds, f"seeded by {seeds}"
assert not ray.is_initialized(), "Ray has been started"
assert not torch.distributed.is_initialized(), "a process group has been made"
"""


def test_importing_every_module_starts_nothing_and_prints_nothing() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    # MLflow, not Python, executes tracking_model.py: it is the code of a logged model.
    names = [name for name in names if not name.endswith(("__main__", ".tracking_model"))]
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", QUIET_IMPORT, json.dumps([names, PACKAGES])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")

"""A finished output of a stage: a folder with a marker, written last, that names what it was made from."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.storage import Storage, StorageError

logger = logging.getLogger("subcat")

MARKER = "marker.json"
STARTED = "started.json"
_PACKAGES = ("subcat_core", "cluster", "jobs")
_MAX_SHOWN_CHARS = 60


class ArtifactMismatch(ValueError):  # noqa: N818 (the name says what it is)
    """An output was made from other inputs than those asked for now; names each differing key."""


def fingerprint(value: Any) -> str:
    """32 hex digits of anything JSON can hold; the same for any order of keys, and for tuples as for lists."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def code_version() -> str:
    """16 hex digits over the source files of the product, the same on every machine that has the same files."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Artifact:
    """One output folder of one stage, with what it is made from.

    storage: the run's. name: the folder below it ("rounds/00/features"). inputs: JSON-able; the stage name, its
    settings (`model_dump(mode="json")`) and the fingerprints of the artifacts it reads.

        artifact = Artifact(storage, "rounds/00/features", {"stage": ..., "settings": ..., "manifest": ...})
        if not artifact.is_complete():
            artifact.begin()
            ...  # write into artifact.folder; what an interrupted run left there is of the same inputs
            artifact.commit({"num_images": 640})
    """

    def __init__(self, storage: Storage, name: str, inputs: Mapping[str, Any]) -> None:
        self.storage = storage
        self.name = name
        self.folder = storage.child(name)
        self.inputs: dict[str, Any] = json.loads(json.dumps(dict(inputs), allow_nan=False))
        self.fingerprint = fingerprint(self.inputs)

    def is_complete(self) -> bool:
        """Whether the output is there, whole, and of these inputs.

        False where nothing is there, or a half-done output of the same inputs, which may be continued. ArtifactMismatch
        where the output, whole or half-done, is of other inputs.
        """
        marker = self._read(MARKER)
        if marker is not None:
            self._check(marker, "a finished output")
            return True
        started = self._read(STARTED)
        if started is not None:
            self._check(started, "a half-done output")
        return False

    def begin(self) -> None:
        """Record the inputs before the first output, so that a half-done folder tells what it is of.

        What lies in a folder without that record is of unknown inputs (a deletion was interrupted, say) and goes;
        StorageError where the folder is the root of a storage, which may hold what is not ours.
        """
        started = self._read(STARTED)
        if started is not None:
            self._check(started, "a half-done output")
            return
        if self.name:
            self.storage.delete_tree(self.name)
        elif any(name.startswith("part-") for name in self.folder.list_names()):
            raise StorageError(
                f"{self.folder.uri()} holds part-* files and no {STARTED} that tells what they are of; "
                "choose another output folder, or delete them"
            )
        self.folder.write_json(STARTED, self._record() | {"started_at": _now(), "making": secrets.token_hex(8)})

    def commit(self, stats: Mapping[str, Any]) -> None:
        """Write the marker: from here on the output counts as whole. stats: JSON-able, for tables and reports."""
        started = self._read(STARTED) or {}
        times = {"started_at": started.get("started_at"), "finished_at": _now()}
        output = {"output": fingerprint([self.fingerprint, started.get("making")])}
        self.folder.write_json(MARKER, self._record() | output | times | {"stats": dict(stats)})

    @property
    def output_fingerprint(self) -> str:
        """Of the finished output, for the inputs of what reads it: another one once the output is deleted and made
        anew, so that nothing made from the old one counts as made from the new. StorageError where it is not complete.
        """
        marker = self._read(MARKER)
        if marker is None:
            raise StorageError(f"{self.folder.uri(MARKER)}: the stage is not complete; run it first")
        return str(marker["output"])

    def stats(self) -> dict[str, Any]:
        """What `commit` was given; StorageError where the output is not complete."""
        marker = self._read(MARKER)
        if marker is None:
            raise StorageError(f"{self.folder.uri(MARKER)}: the stage is not complete; run it first")
        return dict(marker["stats"])

    def _record(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "inputs": self.inputs, "code_version": code_version()}

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            record = self.folder.read_json(name)
        except FileNotFoundError:
            return None
        if not isinstance(record, dict) or "inputs" not in record:
            raise StorageError(f"{self.folder.uri(name)}: not a record of this program; choose another output folder")
        return record

    def _check(self, record: dict[str, Any], what: str) -> None:
        if record["inputs"] != self.inputs:
            differences = "; ".join(_differences(record["inputs"], self.inputs))
            raise ArtifactMismatch(
                f"{self.folder.uri()} holds {what} made from other inputs ({differences}); "
                "choose another output folder, or delete this one to make it anew"
            )
        made_by = record.get("code_version")
        if made_by == code_version():
            return
        # No error: the digest covers every source file, and a mended docstring should not cost a finished run.
        logger.warning(
            "%s holds %s of code version %s, and this is %s; it is used as it is (delete it to make it anew)",
            *(self.folder.uri(), what, made_by, code_version()),
        )


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """'settings.epochs: 5 -> 8' for each leaf that differs; lists are leaves."""
    if isinstance(old, dict) and isinstance(new, dict):
        missing = object()
        lines = []
        for key in sorted(set(old) | set(new)):
            before, after = old.get(key, missing), new.get(key, missing)
            if before is missing or after is missing:
                before = {} if before is missing and isinstance(after, dict) else before
                after = {} if after is missing and isinstance(before, dict) else after
            if before is missing or after is missing:
                lines.append(f"{prefix}{key}: {_shown(before, missing)} -> {_shown(after, missing)}")
            else:
                lines += _differences(before, after, f"{prefix}{key}.")
        return lines
    return [] if old == new else [f"{prefix.rstrip('.')}: {_shown(old)} -> {_shown(new)}"]


def _shown(value: Any, missing: object = None) -> str:
    if missing is not None and value is missing:
        return "(none)"
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

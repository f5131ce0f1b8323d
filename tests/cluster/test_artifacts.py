"""Markers: complete, half done, of other inputs, of another code version."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from cluster import artifacts
from cluster.artifacts import Artifact, ArtifactMismatch, code_version, fingerprint
from cluster.storage import Storage, StorageError

INPUTS: dict[str, Any] = {
    "stage": "extract_features",
    "settings": {"batch_size": 16, "scales": [1.0, 0.5], "crop": {"px": 320}},
    "classifier": "0123abcd",
}


def changed(**settings: Any) -> dict[str, Any]:
    return {**INPUTS, "settings": {**INPUTS["settings"], **settings}}


def test_fingerprint_is_of_the_content_alone() -> None:
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    # echo -n '{"a":1}' | sha256sum
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad808"
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5}) != fingerprint({"a": "1"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"a": float("nan")})


def test_the_way_of_an_artifact(storage_root: str) -> None:
    storage = Storage(storage_root)
    artifact = Artifact(storage, "rounds/00/features", INPUTS)
    assert artifact.folder.root == storage.uri("rounds/00/features")
    assert not artifact.is_complete()
    with pytest.raises(StorageError, match=r"marker\.json: the stage is not complete; run it first"):
        artifact.stats()
    artifact.begin()
    artifact.folder.write_bytes("part-00000.parquet", b"half done")
    again = Artifact(storage, "rounds/00/features", dict(INPUTS))
    assert not again.is_complete()  # half done, of the same inputs: to be continued
    again.begin()
    again.commit({"num_images": 3})
    assert artifact.is_complete()
    assert artifact.stats() == {"num_images": 3}
    marker = artifact.folder.read_json("marker.json")
    assert marker["fingerprint"] == artifact.fingerprint == fingerprint(INPUTS)
    assert marker["code_version"] == code_version()
    assert marker["started_at"] <= marker["finished_at"]
    assert artifact.folder.read_bytes("part-00000.parquet") == b"half done"


@pytest.mark.parametrize("whole", [True, False])
def test_other_inputs_are_refused_by_name(storage_root: str, whole: bool) -> None:
    storage = Storage(storage_root)
    first = Artifact(storage, "features", INPUTS)
    first.begin()
    if whole:
        first.commit({})
    other = {**changed(batch_size=32, crop={"px": 448}, new={"deep": True}), "classifier": "ffff"}
    del other["settings"]["scales"]
    artifact = Artifact(storage, "features", other)
    with pytest.raises(ArtifactMismatch) as caught:
        artifact.is_complete()
    kind = "finished" if whole else "half-done"
    assert str(caught.value) == (
        f"{storage.uri('features')} holds a {kind} output made from other inputs ("
        'classifier: "0123abcd" -> "ffff"; settings.batch_size: 16 -> 32; settings.crop.px: 320 -> 448; '
        "settings.new.deep: (none) -> true; settings.scales: [1.0, 0.5] -> (none)); "
        "choose another output folder, or delete this one to make it anew"
    )
    assert isinstance(caught.value, ValueError)
    if not whole:
        with pytest.raises(ArtifactMismatch):
            artifact.begin()


def test_tuples_and_lists_are_the_same(storage_root: str) -> None:
    storage = Storage(storage_root)
    Artifact(storage, "a", changed(scales=(1.0, 0.5))).commit({})
    assert Artifact(storage, "a", INPUTS).is_complete()


def test_another_code_version_is_a_warning(
    storage_root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(storage_root)
    Artifact(storage, "a", INPUTS).commit({})
    monkeypatch.setattr(artifacts, "code_version", lambda: "feedfeedfeedfeed")
    with caplog.at_level(logging.WARNING, logger="subcat"):
        assert Artifact(storage, "a", INPUTS).is_complete()
    assert "of code version" in caplog.text
    assert "and this is feedfeedfeedfeed" in caplog.text


def test_a_strange_marker_is_an_error(storage_root: str) -> None:
    storage = Storage(storage_root)
    storage.write_bytes("a/marker.json", b'["of another program"]')
    with pytest.raises(StorageError, match=r"a/marker\.json: not a record of this program"):
        Artifact(storage, "a", INPUTS).is_complete()
    storage.write_bytes("a/marker.json", b"{")
    with pytest.raises(StorageError, match=r"a/marker\.json: not JSON"):
        Artifact(storage, "a", INPUTS).is_complete()


def test_code_version_is_of_the_source_files() -> None:
    assert len(code_version()) == 16
    assert code_version() == code_version.__wrapped__()

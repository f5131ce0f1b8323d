"""What makes an image bad, and what is an outage of its storage."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.image_reading import BadRow, iter_images
from cluster.storage import StorageError

UNREADABLE = "/proc/self/mem"  # its first page is mapped to nothing: EIO, as from a disk that fails


def test_a_storage_that_fails_is_no_bad_image(tmp_path: Path) -> None:
    def read(uri: str) -> object:
        return next(iter_images(pa.table({"image_id": ["a"], "uri": [uri]})))[1]

    assert isinstance(read(str(tmp_path / "gone.png")), BadRow)
    with pytest.raises(StorageError, match=r"^/proc/self/mem: cannot read: Input/output error$"):
        read(UNREADABLE)

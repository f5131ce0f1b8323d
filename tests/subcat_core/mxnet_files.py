"""MXNet's .params files written part by part, as NDArray's Save defines them, for the tests of their reader."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np

FLAGS = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}


def shape_bytes(shape: Sequence[int], form: str = "q") -> bytes:
    return struct.pack(f"<I{len(shape)}{form}", len(shape), *shape)


def body_bytes(array: np.ndarray) -> bytes:
    cpu = struct.pack("<ii", 1, 0)
    return cpu + struct.pack("<i", FLAGS[array.dtype.name]) + np.ascontiguousarray(array).tobytes()


def array_bytes(array: np.ndarray, version: int = 2) -> bytes:
    """version: 2 or 1, or 0 for what was before them."""
    if version == 0:
        return shape_bytes(array.shape, "I") + body_bytes(array)
    head = struct.pack("<Ii", 0xF993FAC9, 0) if version == 2 else struct.pack("<I", 0xF993FAC8)
    return head + shape_bytes(array.shape) + body_bytes(array)


def file_bytes(arrays: Sequence[bytes], names: Sequence[str | bytes]) -> bytes:
    raw = [name.encode() if isinstance(name, str) else name for name in names]
    return b"".join(
        [
            struct.pack("<QQQ", 0x112, 0, len(arrays)),
            *arrays,
            struct.pack("<Q", len(raw)),
            *(struct.pack("<Q", len(name)) + name for name in raw),
        ]
    )


def params_bytes(named: Mapping[str, np.ndarray], version: int = 2) -> bytes:
    return file_bytes([array_bytes(array, version) for array in named.values()], list(named))

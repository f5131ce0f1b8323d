"""Reads MXNet's .params files, lists of named arrays, without MXNet.

The format is what NDArray's Save and Load define in MXNet's src/ndarray/ndarray.cc. Numbers are little-endian:

    file    uint64 0x112; uint64 reserved; uint64 number of arrays; arrays; uint64 number of names; names
    name    uint64 number of bytes; bytes
    array   version 2:  uint32 0xF993FAC9; int32 storage type (0: dense); shape with int64; body
            version 1:  uint32 0xF993FAC8; shape with int64; body
            before:     shape with uint32; body
    shape   uint32 number of dimensions; each dimension
    body    int32 kind of device; int32 number of device; int32 type flag; values, the last dimension fastest

Model files name their arrays arg:NAME (learnt) and aux:NAME (statistics). Bytes after the names are ignored, as MXNet
ignores them. Left out: sparse arrays, and version 3 (numpy shapes, of MXNet 1.6 and later).
"""

from __future__ import annotations

import math
import struct

import numpy as np
import torch

_FILE_MAGIC = 0x112
_V1_MAGIC, _V2_MAGIC = 0xF993FAC8, 0xF993FAC9
_STORAGE = {1: "row-sparse", 2: "compressed sparse row"}
_DTYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")  # by type flag
_MAX_DIMENSIONS = 32


def read_params(data: bytes, source: str) -> dict[str, torch.Tensor]:
    """Name -> tensor of a whole .params file. source: how errors call it.

    Every size is checked against the bytes that are left before anything is made. Raises ValueError, naming source
    and offset, for what is no such file, is cut off, or holds something else than dense named arrays.
    """
    reader = _Reader(data, source)
    magic = reader.number("<Q", "the file's mark")
    if magic != _FILE_MAGIC:
        raise reader.error(0, f"got the mark {magic:#x}, expected {_FILE_MAGIC:#x}; give a file of mx.nd.save")
    reader.number("<Q", "the reserved word")
    num_arrays = reader.number("<Q", "the number of arrays")
    arrays: list[torch.Tensor] = []
    while len(arrays) < num_arrays:  # each takes bytes, so a false number soon meets the end of the file
        arrays.append(_read_array(reader))
    at = reader.offset
    num_names = reader.number("<Q", "the number of names")
    if num_names != num_arrays:
        raise reader.error(at, f"got {num_names} names for {num_arrays} arrays; save a dict of names and arrays")
    named: dict[str, torch.Tensor] = {}
    for array in arrays:
        at = reader.offset
        raw = reader.take(reader.number("<Q", "the length of a name"), "a name")
        try:
            name = str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise reader.error(at, "got a name that is not UTF-8; the file is damaged, fetch it again") from error
        if name in named:
            raise reader.error(at, f"got the name {name!r} twice; the file is damaged, fetch it again")
        named[name] = array
    return named


class _Reader:
    """Bytes with a place in them; no step leads past their end."""

    def __init__(self, data: bytes, source: str) -> None:
        self.data = memoryview(data)
        self.source = source
        self.offset = 0

    def error(self, offset: int, text: str) -> ValueError:
        return ValueError(f"MXNet file {self.source!r}, byte {offset}: {text}")

    def take(self, size: int, what: str) -> memoryview:
        left = len(self.data) - self.offset
        if size > left:
            raise self.error(
                self.offset,
                f"{what} takes {size} bytes, and {left} are left; the file is cut off or damaged, fetch it again",
            )
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def number(self, form: str, what: str) -> int:
        [value] = struct.unpack(form, self.take(struct.calcsize(form), what))
        return int(value)


def _read_array(reader: _Reader) -> torch.Tensor:
    start = reader.offset
    magic = reader.number("<I", "an array's version")
    form, num_dimensions = "q", magic
    if magic == _V2_MAGIC:
        storage = reader.number("<i", "a storage type")
        if storage != 0:
            kind = _STORAGE.get(storage, "unknown")
            raise reader.error(start, f"got an array of storage type {storage} ({kind}); save dense arrays")
    if magic in (_V1_MAGIC, _V2_MAGIC):
        num_dimensions = reader.number("<I", "a number of dimensions")
    else:
        form = "I"
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise reader.error(
            start,
            f"got {num_dimensions:#x} for a version or a number of dimensions; expected {_V2_MAGIC:#x}, {_V1_MAGIC:#x} "
            f"or 1 to {_MAX_DIMENSIONS}; save the arrays with MXNet 1.5 or earlier, or fetch the file again",
        )
    dimensions = f"<{num_dimensions}{form}"
    shape = struct.unpack(dimensions, reader.take(struct.calcsize(dimensions), "a shape"))
    if min(shape) < 1:
        raise reader.error(start, f"got the shape {shape}; expected dimensions of 1 or more")
    reader.take(8, "a device")
    flag = reader.number("<i", "a type flag")
    if not 0 <= flag < len(_DTYPES):
        raise reader.error(
            start,
            f"got type flag {flag}; expected 0 to {len(_DTYPES) - 1} (floats and integers); save the arrays as float32",
        )
    dtype = np.dtype(_DTYPES[flag])
    values = reader.take(math.prod(shape) * dtype.itemsize, f"an array of shape {shape}")
    return torch.from_numpy(np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("=")))

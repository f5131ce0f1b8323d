"""MXNet's files: every version and type of number, and nothing but ValueError from what is cut off or hostile."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import torch

from subcat_core.mxnet_params import read_params
from tests.subcat_core.mxnet_files import FLAGS, array_bytes, body_bytes, file_bytes, params_bytes, shape_bytes


def test_a_file_by_hand() -> None:
    data = bytes.fromhex(
        "1201000000000000 0000000000000000 0100000000000000"  # mark, reserved, one array
        "c9fa93f9 00000000 01000000 0200000000000000"  # version 2, dense, one dimension of 2
        "01000000 00000000 00000000 0000803f 000000c0"  # CPU 0, float32: 1, -2
        "0100000000000000 0500000000000000 6172673a77"  # one name of 5 bytes: arg:w
    )
    [(name, tensor)] = read_params(data, "hand.params").items()
    assert (name, tensor.dtype, tensor.tolist()) == ("arg:w", torch.float32, [1.0, -2.0])


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("dtype", FLAGS)
def test_every_version_and_type(version: int, dtype: str) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    named = {"arg:a": values, "aux:b": values[0, :1] + np.array(1, dtype)}
    found = read_params(params_bytes(named, version), "net.params")
    assert list(found) == list(named)
    for name, array in named.items():
        assert str(found[name].dtype) == f"torch.{dtype}"
        np.testing.assert_array_equal(found[name].numpy(), array)


def test_versions_may_be_mixed_and_what_follows_the_names_is_ignored() -> None:
    arrays = [array_bytes(np.full((2, 2), version, np.float32), version) for version in (1, 0, 2)]
    found = read_params(file_bytes(arrays, ["a", "b", "c"]) + b"more", "net.params")
    assert [int(tensor[0, 0]) for tensor in found.values()] == [1, 0, 2]


def test_tensors_own_their_memory() -> None:
    tensor = read_params(params_bytes({"a": np.zeros(3, np.float32)}), "net.params")["a"]
    tensor += 1
    assert tensor.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_file_cut_off_anywhere_is_refused(version: int) -> None:
    data = params_bytes({"a": np.ones((2, 3), np.float32), "b": np.ones(1, np.int8)}, version)
    for size in range(len(data)):
        with pytest.raises(ValueError, match=r"'cut\.params', byte \d+: .* left; the file is cut off or damaged"):
            read_params(data[:size], "cut.params")


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("value", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_a_wrong_byte_anywhere_is_read_or_refused(version: int, value: int) -> None:
    data = params_bytes({"a": np.ones((2, 3), np.float32), "b": np.ones(1, np.int8)}, version)
    refused = []
    for place in range(len(data)):
        try:
            read_params(data[:place] + bytes([value]) + data[place + 1 :], "net.params")
        except ValueError as error:
            refused.append(str(error))
    assert all(text.startswith("MXNet file 'net.params', byte ") for text in refused)
    assert 0 < len(refused) < len(data)


ONE = np.ones(1, np.float32)
HUGE = 2**62
V2 = struct.pack("<Ii", 0xF993FAC9, 0)


def of_shape(*shape: int) -> bytes:
    """An array whose shape tells of more values than follow."""
    return V2 + shape_bytes(shape) + body_bytes(ONE)


HOSTILE = {
    "no file of MXNet's": (b"PK\x03\x04" + bytes(60), r"byte 0: got the mark 0x4034b50, expected 0x112; give"),
    "arrays without end": (
        struct.pack("<QQQ", 0x112, 0, 2**64 - 1) + array_bytes(ONE),
        "byte 60: .* 4 bytes, and 0",
    ),
    "names without end": (
        struct.pack("<QQQ", 0x112, 0, 1) + array_bytes(ONE) + struct.pack("<QQ", 1, 2**64 - 1),
        "a name takes 18446744073709551615 bytes, and 0 are left",
    ),
    "huge dimension": (file_bytes([of_shape(HUGE)], ["a"]), rf"an array of shape \({HUGE},\) takes {4 * HUGE} bytes"),
    "huge product": (file_bytes([of_shape(2**32, 2**32, 2**32)], ["a"]), f"takes {2**98} bytes, and 21 are left"),
    "zero dimension": (file_bytes([of_shape(0, HUGE)], ["a"]), rf"byte 24: got the shape \(0, {HUGE}\); expected"),
    "negative dimension": (
        file_bytes([of_shape(-1, -1)], ["a"]),
        r"got the shape \(-1, -1\); expected dim",
    ),
    "no dimensions": (file_bytes([V2 + shape_bytes(())], ["a"]), "byte 24: got 0x0 for a version or a number of dim"),
    "too many dimensions": (file_bytes([of_shape(*[1] * 33)], ["a"]), "got 0x21 for .* or 1 to 32"),
    "version 3": (file_bytes([struct.pack("<I", 0xF993FACA)], ["a"]), "got 0xf993faca for .* MXNet 1.5 or earlier"),
    "row-sparse": (
        file_bytes([struct.pack("<Ii", 0xF993FAC9, 1)], ["a"]),
        r"storage type 1 \(row-sparse\); save",
    ),
    "CSR": (file_bytes([struct.pack("<Ii", 0xF993FAC9, 2)], ["a"]), r"type 2 \(compressed sparse row\); save dense"),
    "undefined storage": (file_bytes([struct.pack("<Ii", 0xF993FAC9, -1)], ["a"]), r"type -1 \(unknown\)"),
    "bfloat16": (
        file_bytes([V2 + shape_bytes((1,)) + struct.pack("<iiiH", 1, 0, 12, 0)], ["a"]),
        "byte 24: got type flag 12; expected 0 to 6 .*save the arrays as float32",
    ),
    "negative type": (file_bytes([V2 + shape_bytes((1,)) + struct.pack("<iii", 1, 0, -1)], ["a"]), "got type flag -1"),
    "list without names": (file_bytes([array_bytes(ONE)], []), "byte 60: got 0 names for 1 arrays; save a dict"),
    "a name twice": (file_bytes([array_bytes(ONE)] * 2, ["a", "a"]), "byte 113: got the name 'a' twice"),
    "a name that is no text": (file_bytes([array_bytes(ONE)], [b"\xff"]), "byte 68: got a name that is not UTF-8"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_file_and_place_before_anything_is_made(case: str) -> None:
    data, message = HOSTILE[case]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"(?s)MXNet file 'evil\.params', byte \d+: .*; .*") as error:
            read_params(data, "evil.params")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    error.match(message)

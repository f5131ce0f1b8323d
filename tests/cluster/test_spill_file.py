"""The file of rows beyond memory: what goes in comes out, and any number of arrays takes two descriptors."""

from pathlib import Path

import numpy as np

from cluster.spill_file import SpillFile, slot_bytes


def test_many_arrays_come_out_as_they_went_in_and_take_no_descriptors_of_their_own() -> None:
    arrays = [np.full((number, 3), number, np.float32) for number in range(20)]
    file = SpillFile(sum(slot_bytes(array.nbytes) for array in arrays))
    before = len(list(Path("/proc/self/fd").iterdir()))
    moves = [file.slot(array.nbytes) for array in arrays]
    moved = [move(array) for move, array in zip(moves, arrays, strict=True)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    for found, array in zip(moved, arrays, strict=True):
        np.testing.assert_array_equal(found, array)
        assert found.flags.aligned
    smaller = moves[5](arrays[5][:, :2])
    np.testing.assert_array_equal(smaller, arrays[5][:, :2])
    np.testing.assert_array_equal(moved[6], arrays[6])
    del file
    np.testing.assert_array_equal(moved[19], arrays[19])

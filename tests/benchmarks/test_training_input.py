"""Both sides of the training-input benchmark hand out the same number of the same crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.training_input import BATCH_SIZE, CROP_PX, OURS, PEER, Crops, compare, draw, our_batches


def test_sides_take_turns_and_ours_is_the_sample_that_a_row_gives(tmp_path: Path) -> None:
    rows = draw(tmp_path, BATCH_SIZE)
    found = compare(rows, num_processes=0, num_batches=1, turns=1)
    assert found["images_per_s"].keys() == {OURS, PEER}
    assert found["ratio"] > 0
    batches = our_batches([rows[0]] * BATCH_SIZE, 0)
    image = next(batches).numpy()
    batches.close()  # type: ignore[attr-defined]
    assert (image.shape, image.dtype) == ((BATCH_SIZE, 3, CROP_PX, CROP_PX), np.uint8)
    assert (image == image[:1]).all()  # one image_id: one crop in an epoch
    assert Crops().make_sample(rows[0], np.random.default_rng(0))["image"].shape == image.shape[1:]

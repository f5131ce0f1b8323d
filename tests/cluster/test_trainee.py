"""How long a training is: the published schedules by hand, and what does not fit together."""

from __future__ import annotations

import pytest

from cluster.trainee import OptimiserSettings
from subcat_core.schedule import poly_factor

VOC_TRAIN_AUG = 10_582


def test_epochs_alone() -> None:
    length = OptimiserSettings(epochs=3, batch_size=8).length(100)
    assert (length.steps_per_epoch, length.total_steps, length.num_steps, length.num_epochs) == (12, 36, 36, 3)
    assert [length.steps_of(epoch) for epoch in (1, 3)] == [range(12), range(24, 36)]
    assert [length.steps_until(epoch) for epoch in range(4)] == [0, 12, 24, 36]
    assert length.num_images == 300
    assert OptimiserSettings(epochs=2, batch_size=8).length(5).num_steps == 2  # few images fill one batch


@pytest.mark.parametrize(("stop", "rate"), [(31, 0.53), (41, 0.37), (51, 0.20)])
def test_the_authors_61_epochs_stopped_early(stop: int, rate: float) -> None:
    settings = OptimiserSettings(epochs=61, stop_after_epochs=stop, batch_size=16)
    length = settings.length(VOC_TRAIN_AUG)
    assert (length.total_steps, length.num_steps, length.num_epochs) == (40_321, 661 * stop, stop)
    assert poly_factor(length.num_steps, length.total_steps, settings.poly_power) == pytest.approx(rate, abs=0.005)
    assert length.num_images == VOC_TRAIN_AUG * stop


def test_deeplabs_20000_updates_end_within_an_epoch() -> None:
    length = OptimiserSettings(max_steps=20_000, batch_size=10).length(VOC_TRAIN_AUG)
    assert (length.total_steps, length.num_steps, length.num_epochs) == (20_000, 20_000, 19)
    assert length.steps_of(19) == range(18 * 1058, 20_000)
    assert length.steps_until(19) == 20_000
    assert length.num_images == round(VOC_TRAIN_AUG * 20_000 / 1058)


def test_max_steps_may_be_less_than_an_epoch() -> None:
    length = OptimiserSettings(max_steps=5, batch_size=8).length(100)
    assert (length.num_epochs, length.steps_of(1)) == (1, range(5))


def test_ends_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stop_after_epochs = 9 is beyond epochs = 8; lower it, or raise"):
        OptimiserSettings(epochs=8, stop_after_epochs=9)
    with pytest.raises(ValueError, match=r"stop_after_epochs = 3 and max_steps = 100: .* give one of them"):
        OptimiserSettings(stop_after_epochs=3, max_steps=100)

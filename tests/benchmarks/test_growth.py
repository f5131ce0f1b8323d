"""Which memory the growth benchmark judges."""

from __future__ import annotations

from benchmarks import growth
from benchmarks.__main__ import BENCHMARKS


def _run(driver_mb: float, worker_mb: float) -> dict:
    return {
        "seconds": {"predict": 1.0},
        "driver_bytes": driver_mb * 1e6,
        "worker_bytes": dict.fromkeys(growth.STREAMING, worker_mb * 1e6),
    }


def test_memory_is_that_of_the_driver_and_on_ray_of_every_worker() -> None:
    runs = [_run(100, 200), _run(101, 300)]
    assert growth.memory_mb(runs, on_ray=False) == {"the driver": [100, 101]}
    on_ray = growth.memory_mb(runs, on_ray=True)
    assert on_ray.pop("the driver") == [100, 101]
    assert set(on_ray) == {f"the worker, {stage}" for stage in growth.STREAMING}
    assert all(mb == [200, 300] for mb in on_ray.values())


def test_a_worker_that_grows_fails() -> None:
    memory = {"the driver": [100.0, 108.0, 110.0], "the worker, predict": [200.0, 219.0, 221.0]}
    assert growth.growing(memory) == ["the memory of the worker, predict grows from 200 to 221 MB"]


def test_make_bench_runs_it_both_ways() -> None:
    assert (BENCHMARKS["growth"], BENCHMARKS["growth_ray"]) == (("growth",), ("growth", "--ray"))

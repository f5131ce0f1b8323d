"""Compilation falls back to memory where numba finds no folder for its cache."""

from __future__ import annotations

from typing import Any

import numba
import pytest

from subcat_core.compiled import compiled


def test_compiles_without_a_writable_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def refuse_cache(*, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refuse_cache)

    def twice(value: float) -> float:
        return 2 * value

    assert compiled(twice)(1.5) == 3.0


def test_releases_the_gil_and_keeps_nan() -> None:
    def add(value: float) -> float:
        return value + 1.0

    function: Any = compiled(add)
    assert function.targetoptions["nogil"]
    assert function(float("nan")) != function(float("nan"))

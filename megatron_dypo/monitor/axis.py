"""Axes of the report's charts: value to pixel, rounded bounds, tick labels, and number formats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scale:
    """Linear map of [lo, hi] to pixels [start, end]."""

    lo: float
    hi: float
    start: float
    end: float

    def __call__(self, value: Any) -> Any:
        return self.start + (value - self.lo) / (self.hi - self.lo) * (self.end - self.start)


def linear_axis(values: np.ndarray, percent: bool, whole: bool = False) -> tuple[float, float, list[tuple[float, str]]]:
    """Return bounds, and (value, label) ticks on round numbers. Zero is shown unless the values are far from it.

    ``whole``: only ticks on whole numbers, for counts and ranks.
    """
    lo, hi = float(values.min()), float(values.max())
    if lo > 0 and lo < 0.6 * hi:
        lo = 0.0
    if hi - lo < 1e-9 * max(abs(lo), abs(hi)) or hi == lo:
        margin = 0.5 * abs(hi) or 1.0
        lo, hi = (lo - margin, hi + margin) if hi else (0.0, 1.0)
    size = round_step((hi - lo) / 5)
    if whole and size % 1:
        size = 5.0 if size > 1 else 1.0
    quarter = size / 4  # snapping to whole steps would waste a fifth of the height on values just below zero
    lo, hi = math.floor(lo / quarter + 1e-6) * quarter, math.ceil(hi / quarter - 1e-6) * quarter
    if whole and math.floor(hi) - math.ceil(lo) < 1:
        lo, hi = math.floor(lo), math.floor(lo) + max(1, math.ceil(hi) - math.floor(lo))
    marks = [index * size for index in range(math.ceil(lo / size - 1e-6), math.floor(hi / size + 1e-6) + 1)]
    return lo, hi, [(mark, _tick(mark, size, percent)) for mark in marks]


def log_axis(exponents: np.ndarray) -> tuple[float, float, list[tuple[float, str]]]:
    """Return bounds on powers of ten, in log10."""
    low, high = math.floor(exponents.min() + 1e-9), math.ceil(exponents.max() - 1e-9)
    high = max(high, low + 1)
    every = math.ceil((high - low) / 6)
    return low, high, [(power, _power(power)) for power in range(low, high + 1, every)]


def round_step(step: float) -> float:
    """Return the smallest round number (1, 2, 2.5 or 5 times a power of ten) not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 4 else f"1e{exponent}"


def _tick(value: float, size: float, percent: bool) -> str:
    if percent:
        return _decimals(100 * value, 100 * size) + "%"
    largest = max(abs(value), size)
    if largest < 1e-3 or largest >= 1e12:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+", "e")
    for bound, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if largest >= bound:
            unit = 1e3 if suffix == "k" else bound
            return _decimals(value / unit, size / unit) + suffix
    return _decimals(value, size)


def _decimals(value: float, size: float) -> str:
    """Format ``value`` with as many decimals as multiples of ``size`` need."""
    digits = max(0, -math.floor(math.log10(size)))
    if round(size, digits) != round(size, digits + 2):
        digits += 1  # steps of 2.5
    return f"{value + 0.0:,.{digits}f}"


def show(value: float, percent: bool) -> str:
    """Format a value for the legends; the page's script does the same."""
    if percent:
        return f"{100 * value:.1f}%"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{float(f'{value:.4g}'):g}"

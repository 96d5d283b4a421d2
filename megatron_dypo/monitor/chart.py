"""Line and stacked-area charts as inline SVG.

Drawn without a plotting library, because the report must be one small file that opens anywhere, with no script or font
to fetch; SVG paths suffice. Colours are CSS classes, so the page chooses light or dark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_dypo.monitor.axis import Scale, linear_axis, log_axis, round_step

WIDTH, HEIGHT = 440, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 424, 22, 202  # the plot area
MOST_RAW = 4  # most lines in a chart that also shows every step behind the means; more would hide each other
MAX_POINTS = 600  # per line: a page of 10,000 steps must still open on a phone


@dataclass(frozen=True)
class Series:
    """One curve: ``values[n]`` float64 over ``steps[n]``, NaN where missing.

    ``color`` is a CSS class that sets ``color``; one that dashes the line may follow it.
    """

    label: str
    color: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Chart:
    """One chart: ``layers`` are areas stacked bottom up over the same steps, ``lines`` are drawn on top."""

    lines: list[Series] = field(default_factory=list)
    layers: list[Series] = field(default_factory=list)
    unit: str = ""
    percent: bool = False
    log: bool = False
    band: bool = False  # shade one standard deviation of the rolling window on either side of a line
    points: bool = False  # few separate measurements: marked and joined, not smoothed
    exact: bool = False  # settings, counts, ranks: not smoothed
    count: bool = False  # ticks on whole numbers only
    extent: tuple[int, int] = (0, 1)  # first and last step of the axis
    limit: int = MAX_POINTS  # of a line


def draw(chart: Chart, title: str) -> tuple[str, dict[str, Any]]:
    """Return the SVG, and JSON-ready data for the value under the pointer.

    The data is ``{x: [lo, hi], y: [lo, hi], log, percent, series: [{x: [...], y: [...], top: [...]?}]}``, layers first;
    ``top`` is a layer's upper edge.
    """
    first, last = chart.extent
    across = Scale(first, last, LEFT, RIGHT) if last > first else Scale(first - 1, first + 1, LEFT, RIGHT)
    curves = [_prepare(chart, series) for series in chart.lines]
    layers = _stack(chart)
    unsmoothed = chart.points or chart.exact
    raw = len(curves) <= MOST_RAW and not layers
    drawn = ("raw", "low", "high") if raw or unsmoothed or layers else ("mean",)
    heights = [curve[part] for curve in curves for part in drawn]
    heights += [part for layer in layers for part in (layer["low"], layer["high"])]
    heights = np.concatenate([*heights, np.empty(0)])
    heights = heights[np.isfinite(heights)]
    if not len(heights):
        note = f'<text class="none" x="{(LEFT + RIGHT) / 2}" y="{(TOP + BOTTOM) / 2}">no values</text>'
        return _frame(chart, title, _x_ticks(across) + note), {}
    lo, hi, ticks = log_axis(heights) if chart.log else linear_axis(heights, chart.percent, chart.count)
    up = Scale(lo, hi, BOTTOM, TOP)

    areas = [f'<path class="layer {s["color"]}" d="{_area(across, up, s["x"], s["low"], s["high"])}"/>' for s in layers]
    light, strong = [], []
    for curve in curves:
        color = curve["color"]
        x, y = across(curve["x"]), up(curve["raw"])
        if chart.band and raw:
            light.append(
                f'<path class="band {color}" d="{_area(across, up, curve["at"], curve["low"], curve["high"])}"/>'
            )
        if raw and not unsmoothed:
            light.append(f'<path class="raw {color}" d="{_path(x, y)}"/>')
        line = _path(x, y) if unsmoothed else _path(across(curve["at"]), up(curve["mean"]))
        strong.append(f'<path class="line {color}" d="{line}"/>')
        if chart.points:
            strong.append(f'<path class="points {color}" d="{_dots(x, y)}"/>')
    body = _y_ticks(up, ticks) + _x_ticks(across) + "".join([*areas, *light, *strong])
    data = {
        "x": [across.lo, across.hi],
        "y": [_short(lo), _short(hi)],
        "log": chart.log,
        "percent": chart.percent,
        "series": [_hover(chart, item) for item in (*layers, *curves)],
    }
    return _frame(chart, title, body), data


def rolling(values: np.ndarray, at: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation ([len(at)] each) of ``window`` values centred on each index in ``at``.

    NaN is ignored; a window of only NaN gives NaN.
    """
    half = window // 2
    view = np.lib.stride_tricks.sliding_window_view(
        np.pad(values, (half, half + 1), constant_values=np.nan), 2 * half + 1
    )[at]
    present = np.isfinite(view)
    count = np.where(present.any(1), present.sum(1), np.nan)
    mean = np.where(present, view, 0.0).sum(1) / count
    spread = np.where(present, view - mean[:, None], 0.0)
    return mean, np.sqrt((spread**2).sum(1) / count)


def thin(values: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """Return at most ``limit`` indices of ``values``, in order: each bucket's minimum and maximum, to keep spikes.

    A bucket of NaN keeps one index, to leave a gap; the last index is always kept.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), (limit - 1) // 2 + 1).astype(int)
    kept = {len(values) - 1}
    for begin, end in pairwise(edges):
        bucket = values[begin:end]
        if np.isnan(bucket).all():
            kept.add(int(begin))
        else:
            kept.update((int(begin + np.nanargmin(bucket)), int(begin + np.nanargmax(bucket))))
    return np.array(sorted(kept))


def _prepare(chart: Chart, series: Series) -> dict[str, Any]:
    """Return thinned raw values and rolling statistics of a line, in the axis' unit (log10 on a log axis)."""
    values = np.clip(series.values, -1e30, 1e30)  # keeps squares and differences finite
    steps = series.steps
    if chart.log:
        values = np.log10(np.where(values > 0, values, np.nan))
    if chart.points:
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    kept = thin(values, chart.limit)
    at = np.unique(np.linspace(0, len(values) - 1, chart.limit // 2).round().astype(int)) if len(values) else kept
    known = np.flatnonzero(np.isfinite(values))
    at = at[(at >= known[0]) & (at <= known[-1])] if len(known) else at  # bridge gaps, but do not extend the ends
    mean, std = rolling(values, at, max(5, len(values) // 25))
    wide = std if chart.band else np.full_like(std, np.nan)
    lowest = np.nanmin(values, initial=np.inf)  # otherwise the band could show, say, negative norms
    return {
        "color": series.color,
        "x": steps[kept],
        "raw": values[kept],
        "at": steps[at],
        "mean": mean,
        "low": np.maximum(mean - wide, lowest),
        "high": mean + wide,
    }


def _stack(chart: Chart) -> list[dict[str, Any]]:
    """Return the lower and upper edge of each layer; steps without any value are gaps."""
    if not chart.layers:
        return []
    steps = chart.layers[0].steps
    count = len(steps)
    at = np.unique(np.linspace(0, count - 1, min(count, chart.limit)).round().astype(int))
    window = round(count / len(at))  # average over the steps between those kept; 1 except in long runs
    values = np.array([rolling(np.clip(layer.values, 0.0, 1e30), at, window)[0] for layer in chart.layers])
    nothing = np.isnan(values).all(0)
    tops = np.cumsum(np.nan_to_num(values), axis=0)
    tops[:, nothing] = np.nan
    bottoms = np.vstack([np.where(nothing, np.nan, 0.0), tops[:-1]])
    return [
        {"color": layer.color, "x": steps[at], "raw": value, "low": low, "high": high}
        for layer, value, low, high in zip(chart.layers, values, bottoms, tops, strict=True)
    ]


def _hover(chart: Chart, item: dict[str, Any]) -> dict[str, list[Any]]:
    values = 10.0 ** item["raw"] if chart.log else item["raw"]
    series = {"x": item["x"].tolist(), "y": [_short(value) for value in values]}
    if "at" not in item:
        series["top"] = [_short(value) for value in item["high"]]
    return series


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.5g}")
    return int(short) if short == int(short) and abs(short) < 1e6 else short


def _y_ticks(up: Scale, ticks: list[tuple[float, str]]) -> str:
    rows = [
        f'<path class="rule" d="M{LEFT} {up(value):.1f}H{RIGHT}"/>'
        f'<text class="tick y" x="{LEFT - 6}" y="{up(value) + 3.5:.1f}">{label}</text>'
        for value, label in ticks
    ]
    return "".join(rows)


def _x_ticks(across: Scale) -> str:
    size = max(1, round(round_step((across.hi - across.lo) / 5)))
    marks = range(math.ceil(across.lo / size) * size, math.floor(across.hi) + 1, size)
    texts = [
        f'<path class="notch" d="M{across(mark):.1f} {BOTTOM}v4"/>'
        f'<text class="tick x" x="{across(mark):.1f}" y="{BOTTOM + 16}">{mark:,}</text>'
        for mark in marks
    ]
    return "".join(texts)


def _frame(chart: Chart, title: str, body: str) -> str:
    dots = "".join(f'<path class="dot {series.color}" d="M0 0h0"/>' for series in (*chart.layers, *chart.lines))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<text class="axis" x="2" y="11">{escape(chart.unit)}</text>{body}'
        f'<path class="base" d="M{LEFT} {BOTTOM}H{RIGHT}"/>'
        f'<text class="axis end" x="{RIGHT}" y="{HEIGHT - 3}">step</text>'
        f'<path class="cursor" d="M0 {TOP}V{BOTTOM}"/>{dots}</svg>'
    )


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Return the path of a line with a gap at each NaN; ``h0`` draws a lone point as a dot (round line caps)."""
    parts, pen_down = [], False
    for across, up in zip(x.tolist(), y.tolist(), strict=True):
        if math.isnan(up):
            pen_down = False
            continue
        parts.append(f"L{across:.1f} {up:.1f}" if pen_down else f"M{across:.1f} {up:.1f}h0")
        pen_down = True
    return "".join(parts)


def _dots(x: np.ndarray, y: np.ndarray) -> str:
    return "".join(f"M{across:.1f} {up:.1f}h0" for across, up in zip(x.tolist(), y.tolist(), strict=True))


def _area(across: Scale, up: Scale, steps: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """Return closed outlines between ``low`` and ``high``, one per stretch without NaN; a lone step is a step wide."""
    known = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    if not len(known):
        return ""
    parts = []
    for run in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
        x = np.clip(across(steps[run]), LEFT, RIGHT)
        bottom, top = up(low[run]), up(high[run])
        if len(run) == 1:
            x = np.clip(across(steps[run[0]] + np.array([-0.5, 0.5])), LEFT, RIGHT)
            bottom, top = bottom.repeat(2), top.repeat(2)
        edge = zip([*x, *x[::-1]], [*top, *bottom[::-1]], strict=True)
        parts.append("M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in edge) + "Z")
    return "".join(parts)

"""The report's charts: each panel of one run, or each metric with several runs overlaid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_dypo.monitor.axis import show
from megatron_dypo.monitor.chart import MAX_POINTS, Chart, Series, draw
from megatron_dypo.monitor.panels import RUN_COLORS, Curve, Panel
from megatron_dypo.monitor.run_data import Run, finite, is_share
from megatron_dypo.monitor.sections import sections

FEWEST_POINTS = 60  # per line, regardless of the number of runs


@dataclass(frozen=True)
class Key:
    """One legend entry: colour class, label and last ``value``, which the page's script replaces."""

    color: str
    label: str
    value: str


@dataclass(frozen=True)
class Figure:
    """A chart with its legend; from ``data`` the page's script reads the value under the pointer."""

    title: str
    note: str
    keys: list[Key]
    svg: Markup
    data: dict[str, Any]


def chart_sections(runs: list[Run]) -> list[tuple[str, list[Figure]]]:
    """Return (heading, figures) of the sections that these runs have metrics for."""
    values = {key: np.concatenate([run.known(key) for run in runs]) for run in runs for key in run.columns}
    shares = {key for key, known in values.items() if is_share(known)}
    zeros = {key for key, known in values.items() if not known.any()}
    drawn = _one_run if len(runs) == 1 else _overlaid
    return [
        (heading, [figure for panel in panels for figure in drawn(panel, runs)])
        for heading, panels in sections(values, shares, zeros)
    ]


def run_color(place: int) -> str:
    """Return CSS classes for the run at this index: a colour and a dash, so that overlapping lines stay visible."""
    turn, color = divmod(place, len(RUN_COLORS))
    return f"{RUN_COLORS[color]} d{(place + turn) % 3}"  # 36 different ones


def _one_run(panel: Panel, runs: list[Run]) -> list[Figure]:
    (run,) = runs

    def series(curves: tuple[Curve, ...]) -> list[Series]:
        return [
            Series(curve.label, curve.color, run.steps, run.columns[curve.key])
            for curve in curves
            if _shows(run, curve, panel)
        ]

    layers = series(panel.layers)
    return [_figure(panel, series(panel.lines), _relative(layers) if panel.relative else layers, runs)]


def _shows(run: Run, curve: Curve, panel: Panel) -> bool:
    """Return whether to show the run's curve: a quiet panel hides those that are 0 throughout."""
    return curve.key in run.columns and (not panel.quiet or bool(run.known(curve.key).any()))


def _overlaid(panel: Panel, runs: list[Run]) -> list[Figure]:
    """Return a chart per metric of the panel, because colours already distinguish the runs."""
    present = [curve for curve in panel.curves if any(_shows(run, curve, panel) for run in runs)]
    empty = [
        curve for curve in panel.layers if curve in present and not any(run.known(curve.key).any() for run in runs)
    ]
    parts = [curve for curve in present if curve not in empty] or present[:1]
    figures = []
    for place, curve in enumerate(parts):
        lines = [
            Series(run.label, run_color(index), run.steps, _column(run, curve, panel))
            for index, run in enumerate(runs)
            if _shows(run, curve, panel)
        ]
        title = panel.title if len(present) == 1 else f"{panel.title}: {curve.label}"
        one = replace(panel, title=title, note="" if place else panel.note)
        figures.append(_figure(one, lines, [], runs))
    return figures


def _column(run: Run, curve: Curve, panel: Panel) -> np.ndarray:
    if not (panel.relative and curve in panel.layers):
        return run.columns[curve.key]
    layers = [
        Series(layer.key, "", run.steps, run.columns[layer.key]) for layer in panel.layers if layer.key in run.columns
    ]
    return next(layer.values for layer in _relative(layers) if layer.label == curve.key)


def _relative(layers: list[Series]) -> list[Series]:
    total = sum(np.nan_to_num(layer.values) for layer in layers)
    total = np.where(total > 0, total, np.nan)
    return [replace(layer, values=layer.values / total) for layer in layers]


def _figure(panel: Panel, lines: list[Series], layers: list[Series], runs: list[Run]) -> Figure:
    chart = Chart(
        lines=lines,
        layers=layers,
        unit=panel.unit,
        percent=panel.percent,
        log=panel.log,
        band=panel.band,
        points=panel.points,
        exact=panel.exact,
        count=panel.count,
        extent=(min(int(run.steps[0]) for run in runs), max(int(run.steps[-1]) for run in runs)),
        limit=max(FEWEST_POINTS, MAX_POINTS // len(runs)),
    )
    svg, data = draw(chart, panel.title)
    keys = [_legend(item, panel) for item in (*chart.layers, *chart.lines)]
    return Figure(panel.title, panel.note, keys, Markup(svg), data)


def _legend(series: Series, panel: Panel) -> Key:
    known = finite(series.values)
    return Key(series.color, series.label, show(float(known[-1]), panel.percent) if len(known) else "–")

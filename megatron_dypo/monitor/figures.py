"""The report's charts as markup: each panel of one run, or each metric of several runs over one another."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape

import numpy as np

from megatron_dypo.monitor.axis import show
from megatron_dypo.monitor.chart import MAX_POINTS, Chart, Series, draw
from megatron_dypo.monitor.panels import RUN_COLORS, Curve, Panel
from megatron_dypo.monitor.run_data import Run, finite, is_share
from megatron_dypo.monitor.sections import sections

FEWEST_POINTS = 60  # of a line, however many runs share the page


def chart_sections(runs: list[Run]) -> list[tuple[str, str]]:
    """(heading, markup) of the sections that these runs have metrics for."""
    values = {key: np.concatenate([run.known(key) for run in runs]) for run in runs for key in run.columns}
    shares = {key for key, known in values.items() if is_share(known)}
    zeros = {key for key, known in values.items() if not known.any()}
    drawn = _one_run if len(runs) == 1 else _overlaid
    return [
        (heading, f'<div class="grid">{"".join(drawn(panel, runs) for panel in panels)}</div>')
        for heading, panels in sections(values, shares, zeros)
    ]


def run_color(place: int) -> str:
    """The CSS classes of the run at this place: a colour and a dash, so that one line shows through another's gaps."""
    turn, color = divmod(place, len(RUN_COLORS))
    return f"{RUN_COLORS[color]} d{(place + turn) % 3}"  # 36 different ones


def _one_run(panel: Panel, runs: list[Run]) -> str:
    (run,) = runs

    def series(curves: tuple[Curve, ...]) -> list[Series]:
        return [
            Series(curve.label, curve.color, run.steps, run.columns[curve.key])
            for curve in curves
            if _shows(run, curve, panel)
        ]

    layers = series(panel.layers)
    return _figure(panel, series(panel.lines), _relative(layers) if panel.relative else layers, runs)


def _shows(run: Run, curve: Curve, panel: Panel) -> bool:
    """Whether the run has this curve: one of a quiet panel is none where it is 0 throughout."""
    return curve.key in run.columns and (not panel.quiet or bool(run.known(curve.key).any()))


def _overlaid(panel: Panel, runs: list[Run]) -> str:
    """A chart for each of the panel's metrics: colours tell runs apart, so they cannot tell metrics apart as well."""
    present = [curve for curve in panel.curves if any(_shows(run, curve, panel) for run in runs)]
    empty = [
        curve for curve in panel.layers if curve in present and not any(run.known(curve.key).any() for run in runs)
    ]
    parts = [curve for curve in present if curve not in empty] or present[:1]
    markup = []
    for place, curve in enumerate(parts):
        lines = [
            Series(run.label, run_color(index), run.steps, _column(run, curve, panel))
            for index, run in enumerate(runs)
            if _shows(run, curve, panel)
        ]
        title = panel.title if len(present) == 1 else f"{panel.title}: {curve.label}"
        one = replace(panel, title=title, note="" if place else panel.note)
        markup.append(_figure(one, lines, [], runs))
    return "".join(markup)


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


def _figure(panel: Panel, lines: list[Series], layers: list[Series], runs: list[Run]) -> str:
    chart = Chart(
        lines=lines,
        layers=layers,
        unit=panel.unit,
        percent=panel.percent,
        log=panel.log,
        band=panel.band,
        points=panel.points,
        exact=panel.exact,
        extent=(min(int(run.steps[0]) for run in runs), max(int(run.steps[-1]) for run in runs)),
        limit=max(FEWEST_POINTS, MAX_POINTS // len(runs)),
    )
    svg, data = draw(chart, panel.title)
    keys = "".join(_legend(item, panel) for item in (*chart.layers, *chart.lines))
    # "<" cannot be escaped as HTML inside a script: spell it so that no text can close the element.
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<figure><figcaption><h3>{escape(panel.title)}<span class="at"></span></h3><p>{escape(panel.note)}</p>'
        f'<div class="keys">{keys}</div></figcaption>{svg}<script type="application/json">{payload}</script></figure>'
    )


def _legend(series: Series, panel: Panel) -> str:
    """Swatch, label and last value; the page's script puts the value under the pointer in its place."""
    known = finite(series.values)
    value = show(float(known[-1]), panel.percent) if len(known) else "–"
    return f'<span class="key"><i class="{series.color}"></i>{escape(series.label)} <b>{value}</b></span>'

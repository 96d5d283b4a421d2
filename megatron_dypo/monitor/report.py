"""``report.html``: a run's curves, numbers, configuration and environment on one self-contained page."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.config.yaml_text import parse_yaml
from megatron_dypo.errors import UserError
from megatron_dypo.monitor.axis import show
from megatron_dypo.monitor.chart import Chart, Series, draw
from megatron_dypo.monitor.health import warnings_of
from megatron_dypo.monitor.metrics import read_metrics
from megatron_dypo.monitor.page import page
from megatron_dypo.monitor.panels import Panel, sections
from megatron_dypo.runtime.whole_file import write_whole

FINAL_STEPS = 10  # the final reward is a mean over up to so many steps: a single batch is noise
EVAL_TILES = 4


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into ``run_dir`` from its ``metrics.jsonl`` and, if there, ``config.yaml`` and
    ``environment.json``; return its path.

    Raises UserError if the metrics are missing, empty or unreadable, or the configuration is not YAML; OSError where
    the page cannot be written, and then the old one is still there.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir / "metrics.jsonl")
    if not rows:
        raise UserError(f"{run_dir / 'metrics.jsonl'}: no step has been written yet")
    steps, columns = _columns(rows)
    config_text = _text(run_dir / "config.yaml")
    environment_text = _text(run_dir / "environment.json")
    name = run_dir.resolve().name
    html = page(
        title=name,
        facts=_facts(_config(run_dir / "config.yaml", config_text)),
        tiles=_tiles(steps, columns),
        body="".join(_section(heading, panels, steps, columns) for heading, panels in _sections(columns)),
        details=[
            ("Warnings", "\n".join(warnings_of(rows))),
            ("Configuration", config_text),
            ("Environment", environment_text),
        ],
    )
    path = run_dir / "report.html"
    write_whole(path, html)  # whoever has the page open reloads the old one or the new one
    return path


def _text(path: Path) -> str:
    """What a file of the run folder says, for people; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _config(path: Path, text: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    return tree if isinstance(tree, dict) else {}


def _columns(rows: list[dict[str, Any]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps [n] and one float64 column [n] for each key, NaN where a step lacks it or has null."""
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    columns = {key: np.array([_float(row.get(key)) for row in rows]) for key in keys}
    return np.array([row["step"] for row in rows]), columns


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def _known(column: np.ndarray | None) -> np.ndarray:
    return np.empty(0) if column is None else column[np.isfinite(column)]


def _sections(columns: dict[str, np.ndarray]) -> list[tuple[str, list[Panel]]]:
    known = {key: _known(column) for key, column in columns.items()}
    shares = {key for key, values in known.items() if _is_share(values)}
    return sections(columns, shares, {key for key, values in known.items() if not values.any()})


def _is_share(values: np.ndarray) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _section(heading: str, panels: list[Panel], steps: np.ndarray, columns: dict[str, np.ndarray]) -> str:
    figures = "".join(_figure(panel, steps, columns) for panel in panels)
    return f'<h2>{escape(heading)}</h2><div class="grid">{figures}</div>'


def _figure(panel: Panel, steps: np.ndarray, columns: dict[str, np.ndarray]) -> str:
    def series(curves: tuple) -> list[Series]:
        return [Series(curve.label, curve.color, columns[curve.key]) for curve in curves if curve.key in columns]

    layers = series(panel.layers)
    chart = Chart(
        steps=steps,
        lines=series(panel.lines),
        layers=_relative(layers) if panel.relative else layers,
        unit=panel.unit,
        percent=panel.percent,
        log=panel.log,
        band=panel.band,
        points=panel.points,
        exact=panel.exact,
        extent=(int(steps[0]), int(steps[-1])),
    )
    svg, data = draw(chart, panel.title)
    keys = "".join(_legend(item, panel) for item in (*chart.layers, *chart.lines))
    # "<" cannot be escaped as HTML inside a script: spell it so that no text can close the element.
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<figure><figcaption><h3>{escape(panel.title)}<span class="at"></span></h3><p>{escape(panel.note)}</p>'
        f'<div class="keys">{keys}</div></figcaption>{svg}<script type="application/json">{payload}</script></figure>'
    )


def _relative(layers: list[Series]) -> list[Series]:
    total = sum(np.nan_to_num(layer.values) for layer in layers)
    total = np.where(total > 0, total, np.nan)
    return [replace(layer, values=layer.values / total) for layer in layers]


def _legend(series: Series, panel: Panel) -> str:
    """Swatch, label and last value; the page's script puts the value under the pointer in its place."""
    known = _known(series.values)
    value = show(float(known[-1]), panel.percent) if len(known) else "–"
    return f'<span class="key"><i class="{series.color}"></i>{escape(series.label)} <b>{value}</b></span>'


def _facts(config: dict[str, Any]) -> list[str]:
    """What one asks first about a run, as short texts, from whatever of it the configuration holds."""

    def get(section: str, key: str) -> Any:
        values = config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    prompts, samples = get("data", "prompts_per_step"), get("rollout", "samples_per_prompt")
    facts = [
        ("method", get("objective", "method")),
        ("model", get("model", "hf") or get("model", "preset")),
        ("data", get("data", "train")),
        ("batch", f"{prompts} prompts × {samples} responses" if prompts and samples else None),
        ("learning rate", get("optimizer", "lr")),
        ("seed", get("trainer", "seed")),
    ]
    return [f"{name} {value}" for name, value in facts if value is not None]


def _tiles(steps: np.ndarray, columns: dict[str, np.ndarray]) -> list[tuple[str, str, str]]:
    """(label, value, small print) of the headline numbers."""
    tiles = [("steps", f"{max(int(steps[-1]), 0):,}", "")]
    seconds = _known(columns.get("time/step"))
    if len(seconds):
        tiles.append(("training time", _duration(seconds.sum()), f"{np.median(seconds):.3g} s a step (median)"))
    rewards = _known(columns.get("reward/mean"))
    if len(rewards):
        count = max(1, min(FINAL_STEPS, len(rewards) // 2))
        small = f"last {count} steps; first {count}: {rewards[:count].mean():.3f}" if count > 1 else ""
        tiles.append(("final reward", f"{rewards[-count:].mean():.3f}", small))
    for key in [key for key in columns if key.startswith("eval/")][:EVAL_TILES]:
        known = np.flatnonzero(np.isfinite(columns[key]))
        if len(known):
            tiles.append(_eval_tile(key, steps[known], columns[key][known]))
    speed = _known(columns.get("perf/tokens_per_second"))
    if len(speed):
        tiles.append(("throughput", f"{np.median(speed):,.0f}", "tokens per second (median)"))
    for key, label, where in (
        ("train/skipped_steps", "skipped steps", "see “Left out”"),
        ("train/empty_steps", "empty steps", "see “Left out”"),
        ("train/warnings", "warnings", "listed below"),
    ):
        if _known(columns.get(key)).any():
            tiles.append((label, f"{_known(columns[key])[-1]:,.0f}", where))
    return tiles


def _eval_tile(key: str, steps: np.ndarray, values: np.ndarray) -> tuple[str, str, str]:
    percent = _is_share(values)
    label = key.removeprefix("eval/").replace("/", " ").replace("_", " ")
    before, after = show(float(values[0]), percent), show(float(values[-1]), percent)
    if len(values) == 1:
        return label, after, f"step {steps[0]:,}"
    return label, f"{before} → {after}", f"held out, step {steps[0]:,} → {steps[-1]:,}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

"""The report's tables: a run's facts and headline figures, and several runs side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from megatron_dypo.monitor.axis import show
from megatron_dypo.monitor.figures import run_color
from megatron_dypo.monitor.run_data import Run, is_share


@dataclass(frozen=True)
class Cell:
    """A value with small print below. ``share`` and its ``interval``, in [0, 1], are drawn on a bar.

    ``color``: classes of the swatch before the text.
    """

    text: str
    small: str = ""
    share: float | None = None
    interval: tuple[float, float] | None = None
    color: str = ""


@dataclass(frozen=True)
class Table:
    """A table; a row's first cell is its heading."""

    header: list[Cell]
    rows: list[list[Cell]]


ABSENT = Cell("–")


def share(value: float, interval: tuple[float, float] | None = None, small: str = "") -> Cell:
    """Return a share with its interval (all in [0, 1]), in percent and as a mark on a bar from 0 to 100%."""
    between = f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""
    return Cell(f"{value:.1%}{between}", small, value, interval)


FINAL_STEPS = 10  # a final figure is a mean over at most this many steps, because one batch is noisy
COMPARED = (
    ("loss/total", "final loss"),
    ("train/grad_norm", "final gradient norm"),
    ("policy/entropy", "final entropy"),
    ("rollout/response_tokens", "final response length"),
    ("rollout/mismatch_mean", "final mismatch"),
)


def facts(run: Run) -> list[str]:
    """Return a run's main settings as short texts, as far as its configuration has them."""
    prompts, samples = run.setting("data", "prompts_per_step"), run.setting("rollout", "samples_per_prompt")

    def of_stages(section: str, key: str) -> str | None:
        values = [str(value) for value in run.settings(section, key) if value is not None]
        return ", then ".join(dict.fromkeys(values)) or None

    known = [
        ("method", of_stages("objective", "method")),
        ("model", run.setting("model", "hf") or run.setting("model", "preset")),
        ("data", of_stages("data", "train")),
        ("batch", f"{prompts} prompts × {samples} responses" if prompts and samples else None),
        ("learning rate", of_stages("optimizer", "lr")),
        ("seed", run.setting("trainer", "seed")),
    ]
    return [f"{name} {value}" for name, value in known if value is not None]


def tiles(run: Run, evaluations: int | None = 4) -> list[tuple[str, str, str]]:
    """Return (label, value, small print) of the headline numbers, with at most ``evaluations`` (None: all)."""
    found = [("steps", f"{max(int(run.steps[-1]), 0):,}", "")]
    seconds = run.known("time/step")
    if len(seconds):
        found.append(("training time", _duration(seconds.sum()), f"{np.median(seconds):.3g} s a step (median)"))
    rewards = run.known("reward/mean")
    if len(rewards):
        count = _final(rewards)
        small = f"last {count} steps; first {count}: {rewards[:count].mean():.3f}" if count > 1 else ""
        found.append(("final reward", f"{rewards[-count:].mean():.3f}", small))
    for key in [key for key in run.columns if key.startswith("eval/")][:evaluations]:
        known = np.flatnonzero(np.isfinite(run.columns[key]))
        if len(known):
            found.append(_eval_tile(key, run.steps[known], run.columns[key][known]))
    speed = run.known("perf/tokens_per_second")
    if len(speed):
        found.append(("throughput", f"{np.median(speed):,.0f}", "tokens per second (median)"))
    for key, label, where in (
        ("train/skipped_steps", "skipped steps", "see “Left out”"),
        ("train/empty_steps", "empty steps", "see “Left out”"),
        ("train/warnings", "warnings", "listed below"),
    ):
        if run.known(key).any():
            found.append((label, f"{run.known(key)[-1]:,.0f}", where))
    return found


def final_figures(run: Run) -> list[tuple[str, str, str]]:
    """Return the tiles and further metrics' means over the last steps: (label, value, small print)."""
    found = tiles(run, evaluations=None)
    for key, label in COMPARED:
        values = run.known(key)
        if len(values):
            count = _final(values)
            small = f"last {count} steps" if count > 1 else "last step"
            found.append((label, show(float(values[-count:].mean()), False), small))
    for key, label in (("perf/host_memory_gib", "host memory"), ("perf/device_memory_gib", "device memory")):
        values = run.known(key)
        if len(values) and values.any():
            found.append((label, f"{values.max():.2f} GiB", "highest"))
    return found


def _final(values: np.ndarray) -> int:
    return max(1, min(FINAL_STEPS, len(values) // 2))


def _eval_tile(key: str, steps: np.ndarray, values: np.ndarray) -> tuple[str, str, str]:
    percent = is_share(values)
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


OWN = {"trainer.run_dir"}  # always differs


def figures_table(runs: list[Run]) -> Table:
    """Return a table with a column per run and a row per figure that any of them has."""
    figures = [{label: Cell(value, small) for label, value, small in final_figures(run)} for run in runs]
    labels = dict.fromkeys(label for column in figures for label in column)
    rows = [[Cell(label), *(column.get(label, ABSENT) for column in figures)] for label in labels]
    return Table(_header("", runs), rows)


@dataclass(frozen=True)
class DifferingKeys:
    """The configuration keys that differ: ``everywhere``, those that all runs have; ``partly``, the others.

    The latter mostly come from different versions of the program, which is rarely of interest.
    """

    everywhere: Table
    partly: Table


def differing_keys(runs: list[Run]) -> dict[str, list[str | None]]:
    """Return each run's value, as in YAML (None: absent), by ``section.key``, for keys whose values differ."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key not in OWN)
    compared = {key: [_written(values[key]) if key in values else None for values in flat] for key in keys}
    return {key: values for key, values in compared.items() if len(set(values)) > 1}


def keys_tables(runs: list[Run]) -> DifferingKeys | None:
    """Return ``differing_keys`` as tables; None if no run has a configuration."""
    if not any(run.config for run in runs):
        return None
    rows: dict[bool, list[list[Cell]]] = {True: [], False: []}
    for key, values in differing_keys(runs).items():
        cells = [ABSENT if value is None else Cell(value) for value in values]
        rows[None not in values].append([Cell(_breakable(key)), *cells])
    header = _header("key", runs)
    return DifferingKeys(Table(header, rows[True]), Table(header, rows[False]))


def _header(first: str, runs: list[Run]) -> list[Cell]:
    return [Cell(first), *(Cell(run.label, color=run_color(place)) for place, run in enumerate(runs))]


def _breakable(key: str) -> Markup:
    """Return the key as markup that may break after a dot or an underscore in a narrow column."""
    return escape(key).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return flat


def _written(value: Any) -> str:
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

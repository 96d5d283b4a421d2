"""The report's table of evaluations: those made during training, and results of ``evaluate`` in the run folder."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.errors import UserError
from megatron_dypo.monitor.run_data import Run
from megatron_dypo.monitor.tables import ABSENT, Cell, Table, share

HEADER = ["suite", "weights", "accuracy (pass@1)", "pass@n", "problems", "tokens", "truncated"]
_AVERAGE = re.compile(r"avg@\d+|pass@1|greedy_accuracy")
_BEST = re.compile(r"pass@(?!1$)\d+")


def evaluation_table(runs: list[Run]) -> Table | None:
    """Return the table, or None if no run was evaluated.

    Raises UserError for a results file that ``evaluate`` did not write.
    """
    several = len(runs) > 1
    rows = []
    for run in runs:
        for suite, weights, *figures in (*_during_training(run), *_afterwards(run)):
            rows.append([Cell(suite), *([Cell(run.name)] if several else []), Cell(weights), *figures])
    if not rows:
        return None
    rows.sort(key=lambda row: row[0].text)  # stable: groups rows by suite and keeps the order of runs
    header = [HEADER[0], *(["run"] if several else []), *HEADER[1:]]
    told = [place for place in range(len(header)) if any(row[place] != ABSENT for row in rows)]
    return Table([Cell(header[place]) for place in told], [[row[place] for place in told] for row in rows])


Figures = tuple[str, str, *tuple[Cell, ...]]  # suite, weights, and a cell for each further column of HEADER


def _during_training(run: Run) -> list[Figures]:
    """Return the first and last evaluation of each suite, in the columns of ``HEADER``."""
    suites: dict[str, dict[str, np.ndarray]] = {}
    for key, column in run.columns.items():
        family, _, rest = key.partition("/")
        suite, _, figure = rest.rpartition("/")
        if family == "eval" and suite:
            suites.setdefault(suite, {})[figure] = column
    rows: list[Figures] = []
    for suite, figures in suites.items():
        average = next((name for name in figures if _AVERAGE.fullmatch(name)), None)
        if average is None:
            continue
        evaluated = np.flatnonzero(np.isfinite(figures[average]))
        for index in dict.fromkeys([*evaluated[:1].tolist(), *evaluated[-1:].tolist()]):
            values = {name: float(column[index]) for name, column in figures.items() if np.isfinite(column[index])}
            best = next((name for name in values if _BEST.fullmatch(name)), None)
            rows.append(
                (
                    suite,
                    f"training, step {run.steps[index]:,}",
                    share(values[average], small=average.replace("_", " ")),
                    share(values[best], small=best) if best else ABSENT,
                    ABSENT,
                    _count(values.get("response_tokens")),
                    _percent(values.get("truncated_frac")),
                )
            )
    return rows


def _afterwards(run: Run) -> list[Figures]:
    return [row for path in sorted((run.folder / "evaluation").glob("*/results.json")) for row in _results(path)]


def _results(path: Path) -> list[Figures]:
    try:
        suites = json.loads(path.read_bytes())
        return [_result(path, suite, result) for suite, result in suites.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path}: not the results of an evaluation: {type(error).__name__}: {error}") from None


def _result(path: Path, suite: str, result: dict[str, Any]) -> Figures:
    figures = result["figures"]
    average = f"avg@{result['samples']}"
    best = next((name for name in figures if _BEST.fullmatch(name)), None)
    problems, samples = int(result["problems"]), int(result["samples"])
    return (
        suite,
        path.parent.name,
        _figure(figures[average], average),
        _figure(figures[best], best) if best else ABSENT,
        Cell(f"{problems:,}", f"× {samples}" if samples > 1 else ""),
        _count(float(result["response_tokens"])),
        _percent(float(result["truncated_frac"])),
    )


def _figure(figure: dict[str, float], name: str) -> Cell:
    low, value, high = (float(figure[key]) for key in ("low", "value", "high"))
    if not 0 <= low <= value <= high <= 1:
        raise ValueError(f"{name}: {low}, {value}, {high} is not a share with its interval")
    return share(value, (low, high), small=name)


def _count(value: float | None) -> Cell:
    return ABSENT if value is None or not math.isfinite(value) else Cell(f"{value:,.0f}")


def _percent(value: float | None) -> Cell:
    return ABSENT if value is None or not math.isfinite(value) else Cell(f"{value:.1%}")

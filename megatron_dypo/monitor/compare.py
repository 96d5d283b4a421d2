"""Several runs side by side: final figures, and the configuration keys in which they differ."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from megatron_dypo.monitor.facts import final_figures
from megatron_dypo.monitor.figures import run_color
from megatron_dypo.monitor.run_data import Run
from megatron_dypo.monitor.tables import cell, table

OWN = {"trainer.run_dir"}  # every run has its own
ABSENT = "–"


def figures_table(runs: list[Run]) -> str:
    """A column for each run, a row for each figure that one of them has."""
    figures = [{label: cell(value, small) for label, value, small in final_figures(run)} for run in runs]
    labels = dict.fromkeys(label for column in figures for label in column)
    rows = [[escape(label), *(column.get(label, "–") for column in figures)] for label in labels]
    return table(_header("", runs), rows)


def differing_keys(runs: list[Run]) -> dict[str, list[str]]:
    """``section.key`` to each run's value, as YAML would have it, where they are not all the same; – where absent."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key not in OWN)
    compared = {key: [_written(values[key]) if key in values else ABSENT for values in flat] for key in keys}
    return {key: values for key, values in compared.items() if len(set(values)) > 1}


def keys_table(runs: list[Run]) -> str:
    """Markup of ``differing_keys``; empty where no run has a configuration."""
    if not any(run.config for run in runs):
        return ""
    differing = differing_keys(runs)
    if not differing:
        return '<p class="lead">All configuration keys are the same, but for trainer.run_dir.</p>'
    rows = {key: [_breakable(key), *map(cell, values)] for key, values in differing.items()}
    everywhere = [row for key, row in rows.items() if ABSENT not in differing[key]]
    partly = [row for key, row in rows.items() if ABSENT in differing[key]]
    markup = table(_header("key", runs), everywhere) if everywhere else ""
    if partly:  # versions of the program differ in their keys, and that is seldom the question
        fold = table(_header("key", runs), partly)
        markup += f"<details><summary>{len(partly)} keys that only some of the runs have</summary>{fold}</details>"
    return markup


def _header(first: str, runs: list[Run]) -> list[str]:
    swatches = [f'<i class="{run_color(place)}"></i>{escape(run.name)}' for place, run in enumerate(runs)]
    return [escape(first), *swatches]


def _breakable(key: str) -> str:
    """The key as markup that a narrow column may break after a dot or an underscore."""
    return escape(key).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return flat


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

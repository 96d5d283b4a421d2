"""The panels for given metrics: the table's, extended by their families, evaluations and unknown metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle

from megatron_dypo.monitor.panels import EVALUATION, PALETTE, TABLE, Curve, Panel


def sections(keys: Iterable[str], shares: set[str], zeros: set[str]) -> list[tuple[str, list[Panel]]]:
    """Return (heading, panels) for a run with the metrics ``keys``, without empty panels and sections.

    ``shares``: the keys whose values all lie in [0, 1]; they decide how evaluations are drawn. ``zeros``: the keys that
    are 0 throughout. A key that is not in the table gets a panel of its own in the last section.
    """
    keys = set(keys)
    table = {heading: [_grown(panel, keys) for panel in panels] for heading, panels in TABLE.items()}
    known = {curve.key for panels in table.values() for panel in panels for curve in panel.curves}
    evals = {key for key in keys if key.startswith("eval/")}
    table["Learning"] += _eval_panels(evals, shares)
    table["Further metrics"] = [Panel(key, "", "", (Curve(key, key, "c1"),)) for key in sorted(keys - known - evals)]
    present = {
        heading: [
            panel
            for panel in panels
            if any(curve.key in (keys - zeros if panel.quiet else keys) for curve in panel.curves)
        ]
        for heading, panels in table.items()
    }
    return [(heading, panels) for heading, panels in present.items() if panels]


def _grown(panel: Panel, keys: set[str]) -> Panel:
    """Return the panel with a curve per further metric of its family, in colours that its own curves leave free."""
    if not panel.family:
        return panel
    own = {curve.key for curve in panel.curves}
    further = sorted(key for key in keys - own if key.startswith(panel.family))
    taken = {curve.color for curve in panel.curves if curve.key in keys}
    colors = cycle([color for color in PALETTE if color not in taken] or PALETTE)
    curves = tuple(
        Curve(key, _words(key.removeprefix(panel.family).strip("/")) or key, next(colors)) for key in further
    )
    if panel.layers:
        return replace(panel, layers=panel.layers + curves)
    return replace(panel, lines=panel.lines + curves)


def _eval_panels(keys: set[str], shares: set[str]) -> list[Panel]:
    """Return one panel for all shares (accuracies), and for each other metric a panel over all suites."""
    together = _eval_panel(EVALUATION, "share of problems", sorted(keys & shares), percent=True)
    others = sorted({key.rsplit("/", 1)[-1] for key in keys - shares})
    apart = [
        _eval_panel(
            f"Evaluation: {_words(name)}", _words(name), sorted(k for k in keys - shares if k.endswith(f"/{name}"))
        )
        for name in others
    ]
    return [together, *apart]


def _eval_panel(title: str, unit: str, keys: list[str], percent: bool = False) -> Panel:
    colors = cycle(PALETTE)
    curves = tuple(Curve(key, _words(key.removeprefix("eval/")), next(colors)) for key in keys)
    count = unit.endswith("tokens")
    return Panel(title, "On problems that are not trained on.", unit, curves, percent=percent, points=True, count=count)


def _words(name: str) -> str:
    return name.replace("/", " ").replace("_", " ")

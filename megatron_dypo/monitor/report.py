"""``report.html``: curves, numbers, samples and configuration of one run, or of several compared, on one page.

The markup is in ``page/``: Jinja2 templates, the style sheet and the script, all of which end up in the one file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_dypo.monitor.chart import BOTTOM, LEFT, RIGHT, TOP, WIDTH
from megatron_dypo.monitor.evaluations import evaluation_table
from megatron_dypo.monitor.figures import chart_sections
from megatron_dypo.monitor.health import warnings_of
from megatron_dypo.monitor.run_data import Run, read_runs
from megatron_dypo.monitor.samples import sample_rollouts
from megatron_dypo.monitor.tables import facts, figures_table, keys_tables, tiles
from megatron_dypo.runtime.fs import atomic_write

GEOMETRY = {"LEFT": LEFT, "RIGHT": RIGHT, "TOP": TOP, "BOTTOM": BOTTOM, "WIDTH": WIDTH}
DETAILS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("Warnings", lambda run: "\n".join(warnings_of(run.rows))),
    ("Configuration", lambda run: run.config_text),
    ("Environment", lambda run: run.environment_text),
)


@cache
def environment() -> Environment:
    """Return the template environment; templates escape every value that is not already markup."""
    found = Environment(
        loader=PackageLoader("megatron_dypo.monitor", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return found


def render(**content: Any) -> str:
    """Return the whole HTML document; ``page/report.html`` lists the names in ``content``."""
    page = resources.files("megatron_dypo.monitor").joinpath("page")
    style, script = (Markup(page.joinpath(name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    template = environment().get_template("report.html")
    text = template.render(style=style, script=script, geometry=GEOMETRY, **content)
    return text.encode(errors="replace").decode()  # JSON may spell half a surrogate pair, which is not valid UTF-8


def write_report(*run_dirs: str | Path, out: str | Path | None = None) -> Path:
    """Write the page for these run folders; return its path.

    Reads each folder's ``metrics.jsonl`` and, if present, configuration, environment, evaluations and recorded
    rollouts. ``out``: by default ``report.html``, in the run folder for one run and in the current folder for several.
    Raises UserError if metrics are missing, empty or unreadable, a file is not what its name says, or a run is given
    twice; OSError if the page cannot be written, in which case the old one stays.
    """
    runs = read_runs([Path(folder) for folder in run_dirs])
    if len(runs) == 1:
        html, default = _of_one(runs[0]), runs[0].folder / "report.html"
    else:
        html, default = _of_several(runs), Path("report.html")
    path = default if out is None else Path(out)
    atomic_write(path, html)  # reloading an open page never shows half a file
    return path


def _of_one(run: Run) -> str:
    samples = sample_rollouts(run)
    return render(
        title=run.name,
        facts=facts(run),
        tiles=tiles(run),
        sections=chart_sections([run]),
        evaluations=evaluation_table([run]),
        samples=[("", samples)] if samples else [],
        details=[(name, text(run)) for name, text in DETAILS if text(run)],
        final_figures=None,
        differing_keys=None,
    )


def _of_several(runs: list[Run]) -> str:
    samples = [(run.label, sample_rollouts(run, last_only=True)) for run in runs]
    return render(
        title=f"{len(runs)} runs compared",
        facts=[fact for fact in facts(runs[0]) if all(fact in facts(run) for run in runs)],
        tiles=[],
        sections=chart_sections(runs),
        evaluations=evaluation_table(runs),
        samples=[(label, found) for label, found in samples if found],
        details=[(f"{name}: {run.label}", text(run)) for name, text in DETAILS for run in runs if text(run)],
        final_figures=figures_table(runs),
        differing_keys=keys_tables(runs),
    )

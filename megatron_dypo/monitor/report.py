"""``report.html``: curves, numbers, samples and configuration of one run, or of several compared, on one page."""

from __future__ import annotations

from html import escape
from pathlib import Path

from megatron_dypo.monitor.compare import figures_table, keys_table
from megatron_dypo.monitor.evaluations import evaluation_table
from megatron_dypo.monitor.facts import facts, tiles
from megatron_dypo.monitor.figures import chart_sections
from megatron_dypo.monitor.health import warnings_of
from megatron_dypo.monitor.page import page
from megatron_dypo.monitor.run_data import Run, read_runs
from megatron_dypo.monitor.samples import sample_rollouts
from megatron_dypo.runtime.whole_file import write_whole


def write_report(*run_dirs: str | Path, out: str | Path | None = None) -> Path:
    """Write the page about these run folders, from each one's ``metrics.jsonl`` and whatever else it has
    (configuration, environment, evaluations, recorded rollouts); return its path.

    ``out``: by default ``report.html``, in the run folder for one run and in the current folder for several. Raises
    UserError if metrics are missing, empty or unreadable, a file is not what its name says, or a run is given twice;
    OSError where the page cannot be written, and then the old one is still there.
    """
    runs = read_runs([Path(folder) for folder in run_dirs])
    if len(runs) == 1:
        html, default = _of_one(runs[0]), runs[0].folder / "report.html"
    else:
        html, default = _of_several(runs), Path("report.html")
    path = default if out is None else Path(out)
    write_whole(path, html)  # whoever has the page open reloads the old one or the new one
    return path


def _of_one(run: Run) -> str:
    details = [
        ("Warnings", "\n".join(warnings_of(run.rows))),
        ("Configuration", run.config_text),
        ("Environment", run.environment_text),
    ]
    body = _body([run], sample_rollouts(run))
    return page(title=run.name, facts=facts(run), tiles=tiles(run), body=body, details=details)


def _of_several(runs: list[Run]) -> str:
    common = [fact for fact in facts(runs[0]) if all(fact in facts(run) for run in runs)]
    named = [(run, sample_rollouts(run, last_only=True)) for run in runs]
    samples = "".join(f"<h4>{escape(run.name)}</h4>{markup}" for run, markup in named if markup)
    texts = (
        ("Warnings", lambda run: "\n".join(warnings_of(run.rows))),
        ("Configuration", lambda run: run.config_text),
        ("Environment", lambda run: run.environment_text),
    )
    return page(
        title=f"{len(runs)} runs compared",
        facts=common,
        tiles=[],
        body=_section("Final figures", figures_table(runs))
        + _section("Configuration keys that differ", keys_table(runs))
        + _body(runs, samples),
        details=[(f"{name}: {run.name}", text(run)) for name, text in texts for run in runs],
    )


def _body(runs: list[Run], samples: str) -> str:
    first, *rest = chart_sections(runs) or [("", "")]
    parts = [first, ("Evaluation", evaluation_table(runs)), *rest, ("Sample rollouts", samples)]
    return "".join(_section(heading, markup) for heading, markup in parts)


def _section(heading: str, markup: str) -> str:
    return f"<h2>{escape(heading)}</h2>{markup}" if markup else ""

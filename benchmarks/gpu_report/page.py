"""Render the results as one markdown page."""

from __future__ import annotations

from benchmarks.gpu_report.results import ABSENT, DONE, FAILED, Found, Report
from benchmarks.gpu_report.stages import PARTS, STAGES
from benchmarks.gpu_report.targets import NOT_MEASURED, TARGETS, Target, measured, verdict
from benchmarks.markdown import table

STATES = {DONE: "done", FAILED: "**failed**", ABSENT: "not here"}


def page(report: Report) -> str:
    """Return the page: targets first, then every stage that has run, in the table's order."""
    stages = {name: report["stages"][name] for name in STAGES if name in report["stages"]}
    title = f"GPU report: {report['gpu']}" if report["measured"] else "GPU report: CPU, no measurement"
    latest = max(stages.values(), key=lambda found: (bool(found["versions"]), found["date"]))
    parts = [f"# {title}", _intro(report, stages, latest), "## Numbers to reach", target_table(report)]
    parts += ["## Stages", stage_table(stages, latest["commit"])]
    for name, found in stages.items():
        if found["figures"] or found["tables"] or found["notes"]:
            parts += _stage(name, found, shows_versions=found["versions"] != latest["versions"])
    return "\n\n".join(parts) + "\n"


def _intro(report: Report, stages: dict[str, Found], latest: Found) -> str:
    hardware = dict.fromkeys(found["hardware"] for found in stages.values() if found["versions"])
    done = sum(found["state"] == DONE for found in stages.values())
    said = "Written by `make gpu-report` ([what it measures, and how](../../docs/gpu-report.md))."
    if not report["measured"]:
        said = "Tiny sizes on a CPU: every stage's code has run, and no time or size below means anything."
    listed = [f"- {each}" for each in hardware] + [f"- {versions(latest)}"]
    return f"{said} {done} of {len(stages)} stages are done.\n\n" + "\n".join(listed)


def versions(found: Found) -> str:
    return ", ".join(f"{package} {version}" for package, version in found["versions"].items())


def target_table(report: Report) -> str:
    rows = [
        [target.what, _limit(target), _value(target, report), verdict(target, report), f"`{target.stage}`"]
        for target in TARGETS
    ]
    return table(["what", "limit", "measured", "verdict", "stage"], rows)


def _limit(target: Target) -> str:
    return f"{'at most' if target.at_most else 'at least'} {target.limit:g} {target.unit}"


def _value(target: Target, report: Report) -> str:
    value = measured(target, report)
    return NOT_MEASURED if value is None else shown(value, target.unit)


def stage_table(stages: dict[str, Found], commit: str) -> str:
    """Return the table of stages, each with its commit and date: a stage may have been measured again at ``commit``."""
    rows = []
    for name, found in stages.items():
        older = "" if found["commit"] == commit else " (an earlier commit)"
        rows.append(
            [
                f"`{name}`",
                STAGES[name].title,
                f"{STATES[found['state']]}{': ' if found['says'] else ''}{cell(found['says'])}",
                f"{found['seconds']:.0f}",
                f"{found['commit']}{older}",
                found["date"],
            ]
        )
    return table(["stage", "what", "state", "s", "commit", "date (UTC)"], rows)


def _stage(name: str, found: Found, shows_versions: bool) -> list[str]:
    parts = [f"## `{name}`: {STAGES[name].title}"]
    if found["says"]:
        parts.append(f"{STATES[found['state']]}: {cell(found['says'])}")
    if shows_versions:
        parts.append(f"With other versions: {versions(found)}.")
    if found["notes"]:
        parts.append("\n".join(f"- {cell(note)}" for note in found["notes"]))
    if found["figures"]:
        rows = [[figure["label"], shown(figure["value"], figure["unit"])] for figure in found["figures"].values()]
        parts.append(table(["figure", "value"], rows))
    for each in found["tables"]:
        parts += [f"### {each['title']}", table(each["header"], [[cell(text) for text in row] for row in each["rows"]])]
    return parts


def shown(value: float | bool | str, unit: str) -> str:
    """Format a value with its unit: at least three significant digits, integers in full."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, str):
        return cell(value)
    large = isinstance(value, int) or abs(value) >= 1000
    return f"{value:,.0f} {unit}".rstrip() if large else f"{value:.3g} {unit}".rstrip()


def cell(text: str) -> str:
    """Escape text for a table cell."""
    return " ".join(text.replace("|", "\\|").split())


assert set(PARTS) >= {stage.part for stage in STAGES.values()}

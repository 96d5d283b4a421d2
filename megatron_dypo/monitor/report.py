"""``report.html``: curves, numbers, samples and configuration of one run, or of several compared, on one page.

Everything is inline, and a content security policy forbids the browser to fetch anything at all.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from megatron_dypo.monitor.chart import BOTTOM, LEFT, RIGHT, TOP, WIDTH
from megatron_dypo.monitor.evaluations import evaluation_table
from megatron_dypo.monitor.figures import chart_sections
from megatron_dypo.monitor.health import warnings_of
from megatron_dypo.monitor.run_data import Run, read_runs
from megatron_dypo.monitor.samples import sample_rollouts
from megatron_dypo.monitor.style import STYLE
from megatron_dypo.monitor.tables import facts, figures_table, keys_table, tiles
from megatron_dypo.runtime.fs import atomic_write

SCRIPT = """
"use strict";
const write = (v, percent) => {
  if (v == null) return "–";
  if (percent) return (100 * v).toFixed(1) + "%";
  const a = Math.abs(v);
  if (a && (a < 1e-3 || a >= 1e9)) return v.toExponential(2).replace("+", "");
  return a >= 1000 ? Math.round(v).toLocaleString("en-US") : String(Number(v.toPrecision(4)));
};
const place = (v, [lo, hi], from, to) => from + (v - lo) / (hi - lo) * (to - from);
const inside = y => Math.min(Math.max(y, TOP), BOTTOM);  // an axis of means does not hold every step
const figures = [...document.querySelectorAll("figure")].map(f => ({
  f, svg: f.querySelector("svg"), at: f.querySelector(".at"), cursor: f.querySelector(".cursor"),
  dots: [...f.querySelectorAll(".dot")], values: [...f.querySelectorAll(".key b")],
  last: [...f.querySelectorAll(".key b")].map(b => b.textContent), d: JSON.parse(f.querySelector("script").textContent),
})).filter(g => g.d.series);
// Every chart shows the same step: the latest value at or before it.
const point = step => figures.forEach(({f, at, cursor, dots, values, d}) => {
  f.classList.add("live");
  at.textContent = "step " + step.toLocaleString("en-US");
  cursor.setAttribute("transform", `translate(${place(step, d.x, LEFT, RIGHT)})`);
  d.series.forEach((s, k) => {
    let lo = 0, hi = s.x.length;
    while (lo < hi) { const mid = (lo + hi) >> 1; s.x[mid] <= step ? lo = mid + 1 : hi = mid; }
    const y = lo ? s.y[lo - 1] : null;
    values[k].textContent = write(y, d.percent);
    dots[k].classList.toggle("on", y != null && !s.top);
    if (y == null) return;
    const up = inside(place(d.log ? Math.log10(y) : y, d.y, BOTTOM, TOP));
    dots[k].setAttribute("transform", `translate(${place(s.x[lo - 1], d.x, LEFT, RIGHT)} ${up})`);
  });
});
const leave = () => figures.forEach(({f, at, values, last}) => {
  f.classList.remove("live"); at.textContent = ""; values.forEach((b, k) => b.textContent = last[k]);
});
figures.forEach(({svg, d}) => {
  const move = e => {
    const box = svg.getBoundingClientRect(), x = (e.clientX - box.left) * WIDTH / box.width;
    const step = d.x[0] + (x - LEFT) / (RIGHT - LEFT) * (d.x[1] - d.x[0]);
    point(Math.round(Math.min(Math.max(step, d.x[0]), d.x[1])));
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", leave);
});
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(
    title: str,
    facts: list[str],
    tiles: list[tuple[str, str, str]],
    body: str,
    details: list[tuple[str, str]],
) -> str:
    """The whole HTML document. ``body`` is markup; all else is text and escaped here. What is empty is left out."""
    geometry = f"const LEFT={LEFT},RIGHT={RIGHT},TOP={TOP},BOTTOM={BOTTOM},WIDTH={WIDTH};"
    chips = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    cards = "".join(
        f'<div class="tile"><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>'
        for label, value, small in tiles
    )
    folds = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        for name, text in details
        if text
    )
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · megatron_dypo</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1>{_within('ul', 'facts', chips)}{_within('dl', 'tiles', cards)}</header>{body}"
        f"{'<h2>Set-up</h2>' if folds else ''}{folds}"
        "<footer>Light lines: every step (of at most four lines); strong lines: rolling mean. Point at a chart to read "
        f"all at that step. Made by megatron_dypo.</footer></main><script>{geometry}{SCRIPT}</script></body></html>\n"
    )
    return text.encode(errors="replace").decode()  # half a surrogate pair, which JSON can spell, is no UTF-8


def _within(tag: str, name: str, content: str) -> str:
    return f'<{tag} class="{name}">{content}</{tag}>' if content else ""


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
    atomic_write(path, html)  # whoever has the page open reloads the old one or the new one
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
    samples = "".join(f"<h4>{escape(run.label)}</h4>{markup}" for run, markup in named if markup)
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
        details=[(f"{name}: {run.label}", text(run)) for name, text in texts for run in runs],
    )


def _body(runs: list[Run], samples: str) -> str:
    first, *rest = chart_sections(runs) or [("", "")]
    parts = [first, ("Evaluation", evaluation_table(runs)), *rest, ("Sample rollouts", samples)]
    return "".join(_section(heading, markup) for heading, markup in parts)


def _section(heading: str, markup: str) -> str:
    return f"<h2>{escape(heading)}</h2>{markup}" if markup else ""

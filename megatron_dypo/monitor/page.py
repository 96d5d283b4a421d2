"""The report's page: markup, style and the few lines of script that show the value under the pointer.

Everything is inline, and a content security policy forbids the browser to fetch anything at all.
"""

from __future__ import annotations

from html import escape

from megatron_dypo.monitor.chart import BOTTOM, LEFT, RIGHT, TOP, WIDTH

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#5b6675;--line:#e3e7ec;--easy:#009e73;--mid:#0072b2;--hard:#d55e00;
--c1:#0072b2;--c2:#d55e00;--c3:#009e73;--c4:#b0508f;--c5:#d18b00;--c6:#3a9fd8;
--s1:#d8ecd9;--s2:#a9dcc4;--s3:#6cc5c0;--s4:#3aa3c2;--s5:#2f78b5;--s6:#3b4a9b;--s7:#472a73;--s8:#2b0b36;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#11151b;--card:#1a2029;--ink:#e6eaf0;--soft:#9aa6b5;--line:#2c3440;
--easy:#35c99b;--mid:#56a8e8;--hard:#ff8a47;--c1:#56a8e8;--c2:#ff8a47;--c3:#35c99b;--c4:#e08cc0;--c5:#f0b53c;--c6:#8fd0f5;
--s1:#2b2f57;--s2:#36498b;--s3:#2f70ad;--s4:#2f99b5;--s5:#45bca5;--s6:#8fd67e;--s7:#dde26a;--s8:#fff7c2}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1480px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:26px;line-height:1.2;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:13px;letter-spacing:.08em;text-transform:uppercase;color:var(--soft);margin:34px 0 10px;font-weight:600}
h3{font-size:15px;margin:0;display:flex;justify-content:space-between;gap:8px;font-weight:600;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:6px;margin:0;padding:0;list-style:none;font-size:13px;color:var(--soft)}
.facts li{border:1px solid var(--line);background:var(--card);border-radius:99px;padding:2px 10px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(178px,1fr));gap:12px;margin:20px 0 0}
.tile,figure,details{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 14px}.tile dt,.tile small{color:var(--soft);font-size:13px}
.tile dd{margin:2px 0 0;font-size:19px;font-weight:600;line-height:1.4;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile small{display:block;font-weight:400;white-space:normal}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:14px}
figure{margin:0;padding:14px 14px 8px;display:flex;flex-direction:column;min-width:0}
figcaption{flex:1}figcaption p{margin:2px 0 6px;color:var(--soft);font-size:13px}
.at{color:var(--soft);font-weight:400;font-size:13px;white-space:nowrap}
.keys{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;margin-bottom:6px}
.key i{display:inline-block;width:10px;height:10px;border-radius:3px;background:currentColor;margin-right:5px}
.key b{font-weight:600;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;display:block;overflow:visible;touch-action:pan-y;font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg path{fill:none;stroke-linecap:round;stroke-linejoin:round}
.tick,.axis,.none{fill:var(--soft)}.tick{font-variant-numeric:tabular-nums}.y,.end{text-anchor:end}.x,.none{text-anchor:middle}
.rule{stroke:var(--line)}.base,.notch{stroke:var(--soft);stroke-width:.8}
.raw,.line,.points,.dot{stroke:currentColor}.raw{stroke-width:1;opacity:.3}.line{stroke-width:2}.points{stroke-width:6}
svg .band,svg .layer{fill:currentColor}.band{opacity:.16}.layer{opacity:.72}[class^="layer s"]{opacity:.92}
.cursor{stroke:var(--soft);stroke-dasharray:3 3}.dot{stroke-width:7}.cursor,.dot{visibility:hidden}
.live .cursor,.live .dot.on{visibility:visible}
.easy{color:var(--easy)}.mid{color:var(--mid)}.hard{color:var(--hard)}.ink{color:var(--ink)}.c1{color:var(--c1)}
.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}
.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}.s4{color:var(--s4)}.s5{color:var(--s5)}.s6{color:var(--s6)}
.s7{color:var(--s7)}.s8{color:var(--s8)}
details{margin-top:12px;padding:10px 16px}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media (max-width:480px){main{padding:18px 12px 32px}.tiles{grid-template-columns:1fr 1fr;gap:8px}.tile{padding:9px 11px}
.tile dd{font-size:17px}}
footer{margin-top:26px;color:var(--soft);font-size:13px}
"""

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
    if (y != null) dots[k].setAttribute("transform",
      `translate(${place(s.x[lo - 1], d.x, LEFT, RIGHT)} ${place(d.log ? Math.log10(y) : y, d.y, BOTTOM, TOP)})`);
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
    """The whole HTML document. ``body`` is markup; all else is text and escaped here. Empty details are left out."""
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
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · megatron_dypo</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><ul class="facts">{chips}</ul><dl class="tiles">{cards}</dl></header>{body}'
        f"{'<h2>Set-up</h2>' if folds else ''}{folds}"
        "<footer>Light lines: every step; strong lines: rolling mean. Point at a chart to read all of them at that step."
        f" Made by megatron_dypo.</footer></main><script>{geometry}{SCRIPT}</script></body></html>\n"
    )

// Shows the values of one step in all charts, the one under the pointer. The page defines LEFT, RIGHT, TOP, BOTTOM, WIDTH.
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

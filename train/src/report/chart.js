"use strict";
// The curves: runs to lines, lines to SVG. The numbers are the JSON of the page; texts of runs go in as text nodes only,
// never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/* What is drawn first, in this order; every other metric of the runs is under "All other metrics". */
const CURVES = [
  ["reward", "Reward", "mean over the responses"],
  ["eval_pass_rate", "Held-out pass rate", "fraction solved"],
  ["pass_rate", "Pass rate in training", "fraction solved"],
  ["entropy", "Entropy", "nats per token"],
  ["response_length_mean", "Response length", "tokens, mean"],
  ["truncated", "Responses cut", "fraction"],
  ["clip_frac_pos", "Clipped, advantage > 0", "fraction of the tokens"],
  ["clip_frac_neg", "Clipped, advantage < 0", "fraction of the tokens"],
  ["ratio_max", "Largest importance ratio", "π / π_old"],
  ["approx_kl", "KL(π_old ‖ π)", "nats per token, estimated"],
  ["grad_norm", "Gradient norm", "before clipping"],
  ["frac_reward_zero_std", "Groups without signal", "fraction, all rewards equal"],
  ["rollout_train_prob_diff_mean", "Probability, generation − training", "absolute, mean"],
  ["rollout_train_prob_corr", "Probability, generation and training", "1 − Pearson correlation"],
  ["rollout_tokens_per_s", "Sampling speed", "tokens per second"],
  ["train_tokens_per_s", "Training speed", "tokens per second"],
  ["loss", "Loss", ""],
];
/* Drawn on a logarithmic axis where they span more than two powers of ten. */
const LOG = /^(grad_norm|ratio_max|approx_kl|lr|rollout_train_prob_.*)$/;
/* The distance from 1 is what changes: 0.9999999 and 0.99999 look alike. */
const FROM_ONE = new Set(["rollout_train_prob_corr"]);
/* Rows of the table of final values. */
const ENDS = [
  ["eval_pass_rate", "held-out pass rate"],
  ["pass_rate", "pass rate in training"],
  ["reward", "reward"],
  ["entropy", "entropy (nats)"],
  ["response_length_mean", "response length (tokens)"],
  ["truncated", "responses cut"],
  ["ratio_max", "largest ratio"],
  ["clip_frac_pos", "clipped, advantage > 0"],
  ["clip_frac_neg", "clipped, advantage < 0"],
  ["grad_norm", "gradient norm"],
  ["rollout_train_prob_corr", "1 − correlation of probabilities"],
  ["rollout_tokens_per_s", "tokens sampled per second"],
  ["train_tokens_per_s", "tokens trained per second"],
  ["loss", "loss"],
];
const DASHES = ["", "8 3", "3 2", "10 3 3 3"];
const HIGHER = new Set(["eval_pass_rate", "pass_rate", "reward"]);

const arms = [];
for (const run of data.runs) {
  let arm = arms.find((a) => a.name === run.arm);
  if (!arm) arms.push((arm = { name: run.arm, runs: [], index: arms.length, shown: true }));
  arm.runs.push(run);
}
for (const arm of arms) {
  arm.colour = "a" + (arm.index % 8);
  // The form of the line tells arms apart where the colour does not: in print, or past eight.
  arm.dash = DASHES[(arm.index + Math.floor(arm.index / 8)) % DASHES.length];
}
const many = data.runs.length > arms.length;

/* --- small helpers --- */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child);
  return element;
}
const finite = (values) => values.filter((v) => Number.isFinite(v));
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const deviation = (values) => {
  const m = mean(values);
  return values.length > 1 ? Math.sqrt(values.reduce((a, b) => a + (b - m) ** 2, 0) / (values.length - 1)) : 0;
};
function short(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + " M";
  if (size >= 1e3 && size < 1e4) return String(Math.round(value));
  if (size >= 1e4) return Math.round(value).toLocaleString("en").replace(/,/g, "\u202f");
  if (size < 1e-4) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}
function clock(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 90) return Number(seconds.toPrecision(3)) + " s";
  if (seconds < 5400) return (seconds / 60).toFixed(1) + " min";
  return (seconds / 3600).toFixed(2) + " h";
}
/* A mean and its deviation, the latter with two digits and the former with as many places. */
function meanAndDeviation(m, d) {
  if (!(d > 0) || d < 1e-4 || d >= 1e3 || Math.abs(m) >= 1e5) return [short(m), short(Number(d.toPrecision(2)))];
  const places = Math.max(0, 1 - Math.floor(Math.log10(d)));
  return [m.toFixed(places), d.toFixed(places)];
}
/* The mean over an arm's seeds with its deviation, as a cell; where seeds lack it, it says so. */
function spread(values, format) {
  const all = finite(values);
  if (!all.length) return make("td", { class: "empty" }, "–");
  const m = mean(all),
    d = deviation(all);
  const [middle, around] = format ? [format(m), format(d)] : all.length > 1 ? meanAndDeviation(m, d) : [short(m)];
  const cell = make("td", {}, middle);
  if (all.length > 1) cell.append(make("small", {}, " ± " + around));
  if (all.length < values.length) cell.append(make("small", {}, ` (${all.length} of ${values.length})`));
  return cell;
}
function key(arm) {
  const line = make("line", { x1: 0, y1: 5, x2: 28, y2: 5, class: "line " + arm.colour, "stroke-dasharray": arm.dash });
  return make("svg", { width: 28, height: 10, class: "key", "aria-hidden": "true" }, line);
}
const heads = () =>
  arms.map((arm) =>
    make(
      "th",
      {},
      key(arm),
      make("br"),
      arm.name,
      many ? make("small", {}, make("br"), arm.runs.length === 1 ? "1 run" : arm.runs.length + " seeds") : null,
    ),
  );

/* --- curves --- */
const longest = Math.max(...data.runs.map((r) => r.curves.step.length));
const view = { axis: "step", band: "range", smooth: longest > 100 ? 3 : 0 };

/* A metric of a run as points [x, y], smoothed. */
function points(run, metric) {
  const ys = run.curves.series[metric];
  const xs = view.axis === "step" ? run.curves.step : run.curves.series[view.axis];
  if (!ys || !xs) return [];
  const all = [];
  // An exponential mean, unbiased at its start, over about as many points as the control says.
  // Extremes and evaluations stay as they are.
  const smooth = /_(max|min)$|^eval_|^grad_norm$|^length_window$/.test(metric) ? 0 : view.smooth;
  const keep = 1 - 1 / (smooth + 1);
  let sum = 0,
    weight = 0;
  for (let i = 0; i < ys.length; i++) {
    if (!Number.isFinite(ys[i]) || !Number.isFinite(xs[i]) || ys[i] === null || xs[i] === null) continue;
    sum = keep * sum + (FROM_ONE.has(metric) ? 1 - ys[i] : ys[i]);
    weight = keep * weight + 1;
    all.push([xs[i], sum / weight]);
  }
  return all;
}
/* The value of a line at x, between its points; outside of them there is none. */
function at(line, x) {
  if (!line.length || x < line[0][0] || x > line[line.length - 1][0]) return NaN;
  let low = 0,
    high = line.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (line[middle][0] <= x) low = middle;
    else high = middle;
  }
  const [x0, y0] = line[low],
    [x1, y1] = line[high];
  return x1 === x0 ? y1 : y0 + ((y1 - y0) * (x - x0)) / (x1 - x0);
}
/* The seeds of an arm on common places: [x, mean, low, high, seeds]. */
function merged(lines) {
  const xs = [...new Set(lines.flat().map((p) => p[0]))].sort((a, b) => a - b);
  const stride = Math.ceil(xs.length / 400);
  const all = [];
  for (let i = 0; i < xs.length; i++) {
    if (i % stride && i !== xs.length - 1) continue;
    const values = finite(lines.map((line) => at(line, xs[i])));
    if (!values.length) continue;
    const m = mean(values),
      d = deviation(values);
    all.push(
      view.band === "sd"
        ? [xs[i], m, m - d, m + d, values.length]
        : [xs[i], m, Math.min(...values), Math.max(...values), values.length],
    );
  }
  return all;
}
function ticks(low, high, count) {
  const rough = (high - low) / count,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const all = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    all.push(Number((i * step).toPrecision(12)));
  return all;
}
const xTick = (x) =>
  view.axis === "elapsed_s"
    ? clock(x)
    : view.axis === "tokens" && x >= 1e6
      ? x / 1e6 + " M"
      : x >= 1e4
        ? x / 1e3 + " k"
        : String(x);
const xName = { step: "step", elapsed_s: "wall-clock", tokens: "tokens" };
/* Wall-clock ticks at whole seconds, minutes or hours. */
function xTicks(low, high) {
  if (view.axis !== "elapsed_s") return ticks(low, high, 5);
  const unit = high < 90 ? 1 : high < 5400 ? 60 : 3600;
  return ticks(low / unit, high / unit, 5).map((v) => v * unit);
}
function xLabel(x, high) {
  if (view.axis !== "elapsed_s") return xTick(x);
  const [unit, name] = high < 90 ? [1, " s"] : high < 5400 ? [60, " min"] : [3600, " h"];
  return Number((x / unit).toPrecision(6)) + name;
}

const W = 440,
  H = 230,
  LEFT = 50,
  RIGHT = 12,
  TOP = 10,
  BOTTOM = 24;
function chart(figure, metric) {
  const drawn = [];
  for (const arm of arms.filter((a) => a.shown)) {
    const lines = arm.runs.map((run) => points(run, metric)).filter((line) => line.length);
    if (lines.length) drawn.push({ arm, lines, line: merged(lines) });
  }
  figure.querySelector("svg")?.remove();
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": figure.dataset.title });
  figure.append(svg);
  if (!drawn.length) {
    svg.append(make("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, "nothing to draw"));
    return;
  }
  const flat = drawn.flatMap((d) =>
    view.band === "each" ? d.lines.flat().map((p) => p[1]) : d.line.flatMap((p) => [p[2], p[3]]),
  );
  let low = Infinity,
    high = -Infinity,
    smallest = Infinity,
    x0 = Infinity,
    x1 = -Infinity;
  for (const y of flat) {
    low = Math.min(low, y);
    high = Math.max(high, y);
    if (y > 0) smallest = Math.min(smallest, y);
  }
  for (const d of drawn) {
    x0 = Math.min(x0, d.line[0][0]);
    x1 = Math.max(x1, d.line[d.line.length - 1][0]);
  }
  if (x0 === x1) {
    x0 -= 1;
    x1 += 1;
  }
  const log = LOG.test(metric) && low > 0 && high / low > 100;
  if (!log) {
    const fraction = high <= 1 && low >= 0 && high > 0.3 && low < 0.5;
    if (fraction) low = 0;
    if (high - low <= 1e-9 * Math.max(Math.abs(high), Math.abs(low))) {
      const d = Math.abs(high) * 0.1 || 1;
      low -= d;
      high += d;
    }
    const room = (high - low) * 0.05;
    low -= low === 0 ? 0 : room;
    high += room;
  }
  const f = log ? Math.log10 : (v) => v;
  const [f0, f1] = [f(low), f(high)];
  const X = (x) => LEFT + ((x - x0) / (x1 - x0)) * (W - LEFT - RIGHT);
  const Y = (y) => H - BOTTOM - ((f(y) - f0) / (f1 - f0)) * (H - TOP - BOTTOM);
  let marks = log ? [] : ticks(low, high, 5);
  if (log) {
    const factors = f1 - f0 > 4 ? [1] : [1, 2, 5];
    for (let p = Math.floor(f0); p <= f1; p++) for (const m of factors) marks.push(Number(m + "e" + p));
    marks = marks.filter((y) => y >= low && y <= high);
    while (marks.length > 8) marks = marks.filter((_, i) => i % 2 === 0);
  }
  for (const y of marks) {
    svg.append(
      make("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: Y(y), y2: Y(y) }),
      make("text", { x: LEFT - 6, y: Y(y) + 4, "text-anchor": "end" }, short(y)),
    );
  }
  svg.append(make("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM }));
  for (const x of xTicks(x0, x1)) {
    svg.append(
      make("line", { class: "axis", x1: X(x), x2: X(x), y1: H - BOTTOM, y2: H - BOTTOM + 4 }),
      make("text", { x: X(x), y: H - 7, "text-anchor": "middle" }, xLabel(x, x1)),
    );
  }
  const path = (line, column) => "M" + line.map((p) => X(p[0]).toFixed(1) + " " + Y(p[column]).toFixed(1)).join("L");
  for (const { arm, lines, line } of drawn) {
    if (view.band === "each") {
      for (const seed of lines) svg.append(shape(seed, arm, lines.length > 1 ? "seed" : "line"));
    } else {
      if (lines.length > 1) {
        const clamp = (y) => (log ? Math.max(y, low) : y);
        const back = line.map((p) => [p[0], clamp(p[2])]).reverse();
        svg.append(
          make("path", { class: "band " + arm.colour, d: path(line, 3) + "L" + path(back, 1).slice(1) + "Z" }),
        );
      }
      svg.append(shape(line, arm, "line"));
    }
  }
  function shape(line, arm, kind) {
    // A line of one point would not be seen.
    if (line.length === 1)
      return make("circle", { class: "dot " + arm.colour, cx: X(line[0][0]), cy: Y(line[0][1]), r: 3 });
    return make("path", { class: kind + " " + arm.colour, d: path(line, 1), "stroke-dasharray": arm.dash });
  }
  const cursor = make("g", { visibility: "hidden" });
  svg.append(cursor);
  const leave = () => {
    cursor.setAttribute("visibility", "hidden");
    $("tip").hidden = true;
  };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = x0 + ((((event.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT - RIGHT)) * (x1 - x0);
    if (x < x0 || x > x1) return leave();
    const rows = [];
    cursor.replaceChildren(make("line", { class: "cursor", x1: X(x), x2: X(x), y1: TOP, y2: H - BOTTOM }));
    for (const { arm, line } of drawn) {
      // The nearest place that was measured, not one between.
      const near = line.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      if (x < line[0][0] || x > line[line.length - 1][0]) continue;
      cursor.append(make("circle", { class: "dot " + arm.colour, cx: X(near[0]), cy: Y(near[1]), r: 3.5 }));
      const seeds = near[4] > 1 ? `${short(near[2])} … ${short(near[3])} (${near[4]})` : "";
      rows.push(
        make(
          "tr",
          {},
          make("td", {}, key(arm), " ", arm.name),
          make("td", {}, make("b", {}, short(near[1]))),
          make("td", {}, make("small", {}, seeds)),
          make("td", {}, make("small", {}, xName[view.axis] + " " + xTick(near[0]))),
        ),
      );
    }
    cursor.setAttribute("visibility", "visible");
    const tip = $("tip");
    tip.replaceChildren(make("table", {}, rows));
    tip.hidden = !rows.length;
    const side =
      event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
    tip.style.left = Math.max(4, side) + "px";
    tip.style.top = Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4) + "px";
  });
}

// Puts the page together: the figures, the controls, the tables, the samples. Needs chart.js.

const charts = [];
function figure(metric, title, unit, into) {
  const box = make(
    "figure",
    { "data-metric": metric, "data-title": title },
    make("figcaption", {}, title, make("small", {}, unit)),
  );
  into.append(box);
  charts.push({ box, metric });
}
const known = new Set();
for (const run of data.runs) for (const metric of Object.keys(run.curves.series)) known.add(metric);
for (const [metric, title, unit] of CURVES) if (known.has(metric)) figure(metric, title, unit, $("curves"));
const named = new Set(CURVES.map((c) => c[0]).concat("elapsed_s", "tokens"));
for (const metric of [...known].sort())
  if (!named.has(metric)) figure(metric, metric.replace("/", ": "), "", $("more").lastElementChild);
function draw() {
  $("smoothed").textContent = view.smooth ? String(view.smooth) : "off";
  $("drawn").textContent =
    `Across ${$("axis").selectedOptions[0].text}` +
    (many ? `, seeds as ${$("band").selectedOptions[0].text}` : "") +
    (view.smooth
      ? `, smoothed over about ${view.smooth} points (extremes, gradient norms and evaluations are not).`
      : ", not smoothed.");
  for (const { box, metric } of charts) if ($("more").open || !$("more").contains(box)) chart(box, metric);
}
$("more").addEventListener("toggle", draw);
$("more").hidden = !$("more").lastElementChild.children.length;

/* --- controls --- */
function legend(into, live) {
  for (const arm of arms) {
    const entry = make(
      live ? "button" : "span",
      live ? { type: "button", "aria-pressed": "true", title: "show or hide" } : {},
      key(arm),
      arm.name,
    );
    if (live)
      entry.addEventListener("click", () => {
        arm.shown = !arm.shown;
        entry.setAttribute("aria-pressed", arm.shown);
        draw();
      });
    into.append(entry);
  }
}
legend($("legend"), true);
const printed = make("div", { id: "print-legend" });
legend(printed, false);
$("curves").before(printed);
for (const [option, metric] of [
  [1, "elapsed_s"],
  [2, "tokens"],
])
  if (!known.has(metric)) $("axis").options[option].disabled = true;
$("axis").addEventListener("change", (e) => {
  view.axis = e.target.value;
  draw();
});
$("band").addEventListener("change", (e) => {
  view.band = e.target.value;
  draw();
});
if (!many) $("band").parentElement.hidden = true;
$("smooth").value = view.smooth;
$("smooth").addEventListener("input", (e) => {
  view.smooth = Number(e.target.value);
  draw();
});
function theme(name) {
  if (name === "dark" || name === "light") document.documentElement.dataset.theme = name;
}
theme(location.hash.slice(1));
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  theme(dark ? "light" : "dark");
});

/* --- at the end --- */
function end(run, metric) {
  const value = run.end[metric] ?? NaN;
  return FROM_ONE.has(metric) ? 1 - value : value;
}
$("title").textContent = data.title;
{
  const stride = Math.max(...data.runs.map((r) => r.curves.stride));
  const parts = [
    data.runs.length === 1
      ? "1 run"
      : `${data.runs.length} runs in ${arms.length === 1 ? "1 arm" : arms.length + " arms"}`,
  ];
  if (many) parts.push("seeds of one arm as their mean with a band");
  if (stride > 1)
    parts.push(
      `a point of a curve stands for up to ${stride} steps (their mean; of …_max the largest, of …_min the smallest)`,
    );
  $("about").textContent = parts.join("; ") + ".";
}
{
  const table = make("table", {}, make("tr", {}, make("th", {}, ""), heads()));
  const row = (name, cells) => table.append(make("tr", {}, make("td", {}, name), cells));
  row(
    "steps",
    arms.map((arm) => spread(arm.runs.map((r) => r.step))),
  );
  if (known.has("elapsed_s"))
    row(
      "wall-clock",
      arms.map((arm) =>
        spread(
          arm.runs.map((r) => r.seconds ?? NaN),
          clock,
        ),
      ),
    );
  for (const [metric, name] of ENDS.filter((e) => known.has(e[0]))) {
    const cells = arms.map((arm) => spread(arm.runs.map((r) => end(r, metric))));
    if (HIGHER.has(metric) && arms.length > 1) {
      const means = arms.map((arm) => mean(finite(arm.runs.map((r) => end(r, metric)))));
      const best = means.indexOf(Math.max(...finite(means)));
      cells[best]?.classList.add("best");
    }
    row(name, cells);
  }
  const by = new Set(data.runs.map((r) => r.reached_by));
  const told = data.runs.some((r) => r.curves.series[r.reached_by]);
  if (data.thresholds.length && told) {
    const what = by.size > 1 ? "pass rate" : by.has("eval_pass_rate") ? "held-out pass rate" : "pass rate in training";
    table.append(
      make("tr", { class: "group" }, make("td", { colspan: arms.length + 1 }, `steps (time) to a ${what} of`)),
    );
    data.thresholds.forEach((threshold, i) =>
      row(
        short(threshold),
        arms.map((arm) => {
          const cell = spread(arm.runs.map((r) => r.reached[i]?.step ?? NaN));
          const seconds = finite(arm.runs.map((r) => r.reached[i]?.seconds ?? NaN));
          if (seconds.length) cell.append(make("small", {}, ` (${clock(mean(seconds))})`));
          if (!finite(arm.runs.map((r) => r.reached[i]?.step ?? NaN)).length) cell.textContent = "not reached";
          return cell;
        }),
      ),
    );
  }
  $("ends").append(table);
  $("ends-note").textContent =
    `Mean over each run's last ${data.last_steps} steps (of an evaluation the last)` +
    (many ? ", then mean ± standard deviation over the seeds; “2 of 3” counts the seeds that have it" : "") +
    (arms.length > 1 ? "; the highest rates are bold" : "") +
    "." +
    (told && by.has("pass_rate")
      ? ` A pass rate in training counts as reached when its mean over ${data.last_steps} steps is.`
      : "");
}

/* --- tasks --- */
{
  const names = [...new Set(data.runs.flatMap((r) => Object.keys(r.tasks)))].sort();
  if (!names.length) $("tasks").hidden = true;
  const table = make("table", {}, make("tr", {}, make("th", {}, "task"), heads()));
  const w = 110;
  for (const name of names) {
    table.append(
      make(
        "tr",
        {},
        make("td", {}, name),
        arms.map((arm) => {
          const changes = arm.runs.map((r) => r.tasks[name]).filter(Boolean);
          const before = finite(changes.map((c) => c.before ?? NaN)),
            after = finite(changes.map((c) => c.after ?? NaN));
          if (!after.length) return make("td", { class: "empty" }, "–");
          const a = mean(before),
            b = mean(after),
            x = (v) => 6 + v * (w - 12);
          // From a hollow ring to a full dot.
          const svg = make(
            "svg",
            { width: w, height: 14, class: arm.colour + " key", "aria-hidden": "true" },
            make("line", { class: "axis", x1: x(0), x2: x(1), y1: 7, y2: 7 }),
            make("line", { x1: x(a), x2: x(b), y1: 7, y2: 7, stroke: "var(--c)", "stroke-width": 2.5 }),
            make("circle", { cx: x(a), cy: 7, r: 3.5, fill: "var(--card)", stroke: "var(--c)", "stroke-width": 1.5 }),
            make("circle", { class: "dot", cx: x(b), cy: 7, r: 4 }),
          );
          const sd = after.length > 1 ? make("small", {}, " ± " + deviation(after).toFixed(2)) : null;
          return make("td", {}, a.toFixed(2) + " → ", make("b", {}, b.toFixed(2)), sd, " ", svg);
        }),
      ),
    );
  }
  $("task-table").append(table);
  const held = data.runs.every((r) => Object.values(r.tasks).every((t) => t.held_out));
  $("tasks-note").textContent = held
    ? "Pass rates on held-out problems at the first and the last evaluation; the ring is before, the dot after."
    : "Pass rates before and after: at the first and last evaluation, or, where there is none, over the first and last " +
      `${data.last_steps} steps with problems of the task. The ring is before, the dot after.`;
}

/* --- samples --- */
function samples(run) {
  const list = $("sample-list");
  list.replaceChildren();
  const steps = [...new Set(run.samples.map((s) => s.step))];
  if (!steps.length) list.append(make("p", { class: "empty" }, "This run has no samples.jsonl."));
  for (const step of steps) {
    const records = run.samples.filter((s) => s.step === step);
    const rewards = finite(records.flatMap((r) => r.responses.map((x) => x.reward)));
    const box = make(
      "details",
      { class: "step", open: step === steps[steps.length - 1] },
      make("summary", {}, `step ${step}`, make("small", {}, ` · mean reward of these ${short(mean(rewards))}`)),
    );
    for (const record of records) {
      const one = make(
        "div",
        { class: "record" },
        make(
          "p",
          {},
          make("b", {}, record.task),
          ` · difficulty ${short(record.difficulty)} · right answer: `,
          make("code", {}, record.answer),
        ),
        make("pre", {}, record.prompt),
      );
      record.responses.forEach((response, i) => {
        one.append(
          make(
            "details",
            { open: i === 0 },
            make(
              "summary",
              {},
              make(
                "span",
                { class: "verdict " + (response.correct ? "right" : "wrong") },
                response.correct ? "✓ right" : "✗ wrong",
              ),
              ` · reward ${short(response.reward)} · ${response.tokens} tokens · ended by ${response.finish}`,
            ),
            make("pre", {}, response.text),
          ),
        );
      });
      box.append(one);
    }
    list.append(box);
  }
}
if (data.runs.some((r) => r.samples.length)) {
  data.runs.forEach((run, i) =>
    $("sample-run").append(make("option", { value: i }, run.arm === run.name ? run.name : `${run.arm} · ${run.name}`)),
  );
  $("sample-run").addEventListener("change", (e) => samples(data.runs[e.target.value]));
  const first = data.runs.findIndex((r) => r.samples.length);
  $("sample-run").value = first;
  samples(data.runs[first]);
} else $("samples").hidden = true;

/* --- configurations --- */
{
  const keys = [...new Set(data.runs.flatMap((r) => Object.keys(r.config ?? {})))];
  // What stands before the sections first, then section by section.
  keys.sort((a, b) => a.includes(".") - b.includes(".") || (a < b ? -1 : 1));
  if (!keys.length) $("configs").hidden = true;
  const table = make("table", {}, make("tr", {}, make("th", {}, "key"), heads()));
  for (const key of keys) {
    // An arm without a config.toml says nothing, which is no difference.
    const cells = arms.map((arm) => {
      const runs = arm.runs.filter((r) => r.config);
      return runs.length ? [...new Set(runs.map((r) => r.config[key] ?? "(not there)"))].join(", ") : null;
    });
    const differs = new Set(cells.filter((c) => c !== null)).size > 1;
    const same = !differs && !cells.includes(null);
    table.append(
      make(
        "tr",
        { class: differs ? "differs" : null },
        make("td", { class: "config-key" }, key),
        same
          ? make("td", { colspan: arms.length }, cells[0])
          : cells.map((c) => (c === null ? make("td", { class: "empty" }, "no config.toml") : make("td", {}, c))),
      ),
    );
  }
  $("config-table").append(table);
  $("differing").addEventListener("change", (e) => {
    for (const row of table.rows)
      row.hidden = e.target.checked && row.rowIndex > 0 && !row.classList.contains("differs");
  });
  if (arms.length === 1) $("differing").closest("p").hidden = true;
}
draw();

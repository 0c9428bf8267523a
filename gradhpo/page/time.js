// What diverged; and what it cost: where the time went, compiles, what happened.
function divergedSection() {
  section("diverged", () => "Diverged trials", () => page.data.kind === "sweep" && page.data.diverged.of > 0, (place) => {
    const { data } = page, { diverged } = data, trial = array(diverged.trial), n = trial.length, names = data.space.map((one) => one.name);
    const settings = names.map((name) => array(diverged.settings[name])), generation = array(diverged.generation), step = array(diverged.step);
    const each = page.rows.diverged, x = range(each.length).map((g) => g + 1);
    chart(place.chart, [{ type: "bar", x, y: Array.from(each), marker: { color: color("orange") }, hovertemplate: "generation %{x}: %{y}<extra></extra>" }],
      { height: 180, bargap: 0.15, xaxis: generationAxis("generation", each.length), yaxis: { title: { text: "diverged" }, rangemode: "tozero" } });
    const rows = range(n).reverse().slice(0, 100).map((i) => [String(trial[i]), String(generation[i] + 1), String(step[i]), ...settings.map((one) => num(one[i]))]);
    place.below.replaceChildren(el("p.note", {}, `${several(diverged.of, "trial")} of ${count(data.trials.of)} ended with a number that was not finite. A trial that diverged stays as it was until the scheduler replaces it.`),
      table(["trial", "generation", "at its step", ...names.map(labelOf)], rows), diverged.of > rows.length ? el("p.note", {}, `The last ${rows.length} are listed.`) : "");
  });
}

function timeSection() {
  section("time", () => "Time, compiles, faults", () => page.data.kind === "sweep", (place) => {
    const { data } = page, { costs } = data, seconds = Array.from(page.rows.seconds || [], finite);
    if (seconds.length) {
      chart(place.chart, [{ type: seconds.length > 400 ? "scatter" : "bar", mode: "lines", x: range(seconds.length).map((g) => g + 1), y: seconds, marker: { color: color("blue") }, line: { color: color("blue") },
        hovertemplate: "generation %{x}: %{y:.3g} s<extra></extra>" }],
      { height: 220, bargap: 0.15, xaxis: generationAxis("generation", seconds.length), yaxis: { title: { text: "seconds" }, rangemode: "tozero" } });
    } else place.chart.classList.add("low");
    const { compiles, seconds: spent } = costs, parts = Object.entries(spent["of starting"]);
    place.below.replaceChildren(pairs([
      ["generations", duration(spent.generations)], ["starting, until the first generation", duration(spent.starting)],
      ...parts.map(([name, x]) => [`of it ${name}`, duration(x)]),
      ["starts", String(costs.starts)], ["compiles of the step", String(compiles.compiles)], ["loads in other workers", String(compiles.loads)],
      ["from JAX's cache", String(compiles.restores)], ["small programs", String(compiles.small_compiles)], ["layouts compared", String(compiles.calibration_compiles)],
      ...Object.entries(costs.faults).map(([name, n]) => [name, String(n)]),
      ...data.changes.map(([g, what]) => [`${what} changed, as allowed`, `from generation ${g + 1} on`]),
      ...data.ended.map(([g, one]) => [`ended after generation ${g + 1}`, Object.entries(data.choices[one.variant] || {}).map(([name, v]) => `${name}=${worded(v)}`).join(", ")]),
    ]),
    ...data.damaged.map((text) => el("p.note", {}, text)),
    el("details", {}, el("summary", {}, `What happened: the last ${several(costs.events.length, "event")}`),
      table(["when", "event", ""], costs.events.slice().reverse().map((one) => [when(one.time), one.event, one.text]), { text: [1, 2] })));
  });
}

// The tree of descent: whose weights the trials of the last generation go on from.
function descentSection() {
  section("descent", () => "Lineage", () => page.data.kind === "sweep" && page.data.tree.first.length > 0, (place) => {
    const { data } = page, { tree } = data, n = tree.first.length;
    const on = new Set(data.kept.length ? data.kept[0].on : []), chosen = new Set(page.chosen ? ancestors(branchOf(page.chosen)) : []);
    const parts = [["trials", 1.1, (b) => !on.has(b) && !chosen.has(b)], ["orange", 2.6, (b) => on.has(b)], ["purple", 2.2, (b) => chosen.has(b)]];
    const traces = parts.map(([name, width, which]) => ({ ...branchLines(tree, range(n).filter(which)), mode: "lines", line: { color: color(name), width, shape: "linear" }, hoverinfo: "skip" }));
    const ends = range(n).filter((b) => tree.last[b] === data.done - 1 || tree.whole);
    traces.push({ x: ends.map((b) => tree.last[b] + 1), y: ends.map((b) => tree.place[b]), mode: "markers", customdata: ends,
      marker: { size: n > 300 ? 3.5 : 5.5, color: ends.map((b) => color(on.has(b) ? "orange" : chosen.has(b) ? "purple" : "trials")) },
      text: ends.map((b) => `trial ${tree.trial[b]}<br>generations ${tree.first[b] + 1} to ${tree.last[b] + 1}`), hovertemplate: "%{text}<extra></extra>" });
    const leaves = Math.max(...tree.place) + 1, tall = Math.max(260, Math.min(760, 60 + leaves * 11));
    chart(place.chart, traces, { height: narrow() ? Math.min(tall, 520) : tall, xaxis: { ...generationAxis("generations done", data.done), rangemode: "tozero" }, yaxis: { visible: false, range: [leaves - 0.5, -0.5] }, margin: { l: 12, r: 12, t: 10, b: 44 } },
      (event) => { const b = event.points[0].customdata; if (b !== undefined) choosing(tree.last[b], tree.slot[b]); });
    place.chart.dataset.branches = n;
    const roots = new Set(range(n).filter((b) => tree.last[b] === data.done - 1).map((b) => ancestors(b)[0]));
    place.below.replaceChildren(keys([color("orange"), `the line of ${winner()}`], [color("trials"), tree.whole ? "all trials, those that ended too" : "trials of the last generation, and where they come from"]),
      el("p.note", {}, `The trials of the last generation go back to ${several(roots.size, "first trial")} of ${count(data.trials.of)} trials in all. Time goes to the right; where a line forks, a trial was copied.`));
  });
}

function branchLines(tree, which) {
  const x = [], y = [];
  for (const b of which) {
    const parent = tree.parent[b];
    if (parent >= 0) { x.push(tree.first[b]); y.push(tree.place[parent]); }
    x.push(tree.first[b], tree.last[b] + 1, null);
    y.push(tree.place[b], tree.place[b], null);
  }
  return { x, y };
}

function ancestors(b) {
  const made = [];
  for (let at = b; at !== null && at >= 0; at = page.data.tree.parent[at]) made.push(at);
  return made.reverse();
}

// The branch that a trial is on: one whose end comes from it.
function branchOf({ generation, slot }) {
  const { tree } = page.data;
  for (let b = 0; b < tree.first.length; b++) {
    if (tree.first[b] > generation || tree.last[b] < generation) continue;
    const life = page.rows.life(tree.last[b], tree.slot[b]).find(([g]) => g === generation);
    if (life && life[1] === slot) return b;
  }
  return null;
}

// A searched setting over generations: what hypergradients moved, and what the scheduler changed.
function trajectorySection() {
  const asked = { name: null, log: null };
  section("settings-over-time", () => "Trajectories of hyperparameters", () => page.data.kind === "sweep" && page.data.space.length > 0 && page.rows.count > 0, (place) => {
    const { data, rows } = page;
    const one = data.space.find((known) => known.name === asked.name) || data.space[0];
    const values = rows.settings[one.name], positive = values.every((v) => !(v <= 0));
    const log = positive && (asked.log === null ? one.log : asked.log);
    place.tools.replaceChildren(
      choose("Setting", data.space.map((known) => [known.name, known.label]), one.name, (value) => { asked.name = value; asked.log = null; place.draw(); }),
      ...(positive ? [check("log", log, (value) => { asked.log = value; place.draw(); })] : []));
    const part = rows.cloud(values), bands = rows.bands(`setting ${one.name}`), x = range(rows.count).map((g) => g + 1);
    const paths = [];
    if (data.path) {
      const found = data.path.settings[one.name], life = array(data.kept[0].life);
      paths.push(["orange", `trial ${data.kept[0].trial}`, { at: range(life.length / 2).map((i) => life[2 * i]), begun: Array.from(array(found.begun)), ended: Array.from(array(found.ended)) }]);
    }
    if (page.chosen && !rows.thinned) {
      paths.push(["purple", `trial ${page.chosen.trial}`, rows.path(one.name, rows.life(page.chosen.generation, page.chosen.slot))]);
    }
    const traces = (window_) => [...cloud(part, log, window_), ...band(x, bands[1], bands[3], color("shade")),
      { x, y: bands[2], mode: "lines", line: { color: color("blue"), width: 2 }, hovertemplate: "median, generation %{x}<br>%{y:.4g}<extra></extra>" },
      ...paths.flatMap(([name, text, path]) => moves(path, name, text))];
    const about = { xaxis: generationAxis("generations done", rows.count), yaxis: { title: { text: safe(one.label) }, type: log ? "log" : "linear" } };
    zoomed(place.chart, traces, about, part, log, (row, slot) => choosing(row, slot));
    place.chart.dataset.setting = one.name;
    const told = paths.length ? counted(paths[0][2]) : null;
    if (told) place.chart.dataset.jumps = told.jumps;
    place.below.replaceChildren(keys(
      [color("orange"), `moved by hypergradients, of ${winner()}`], [color("ink"), "changed by the scheduler", ".dot"],
      [color("blue"), "median of all trials"], [color("trials"), cloudWords(part), part.values.length > FEW_POINTS ? ".thick" : ""],
      ...(page.chosen ? [[color("purple"), `trial ${page.chosen.trial}`]] : [])),
    el("p.note", {}, `Drawn from ${one.drawn.join(" or ")}. ${told ? `In the life of ${winner()} the scheduler changed it ${several(told.jumps, "time")}, and hypergradients moved it in ${several(told.moved, "generation")} of ${told.of}.` : ""}`));
  });
}

function same(a, b) { return a === b || Math.abs(a - b) <= 1e-6 * Math.max(Math.abs(a), Math.abs(b)); }

function counted(path) {
  let jumps = 0, moved = 0;
  path.at.forEach((_, i) => {
    if (i && Number.isFinite(path.begun[i]) && !same(path.begun[i], path.ended[i - 1])) jumps++;
    if (Number.isFinite(path.begun[i]) && !same(path.begun[i], path.ended[i])) moved++;
  });
  return { jumps, moved, of: path.at.length };
}

// Inside of a generation a solid line, from what it began with to what it ended with; between two, dots.
function moves(path, name, text) {
  const solid = { x: [], y: [] }, jump = { x: [], y: [] };
  path.at.forEach((g, i) => {
    const from = finite(path.begun[i]), to = finite(path.ended[i]);
    if (from !== null) { solid.x.push(g); solid.y.push(from); }
    solid.x.push(g + 1); solid.y.push(to);
    if (i && from !== null && same(path.begun[i], path.ended[i - 1])) return;
    if (i && from !== null) { jump.x.push(g, g, null); jump.y.push(finite(path.ended[i - 1]), from, null); }
    const at = solid.x.length - (from === null ? 1 : 2);
    if (i) { solid.x.splice(at, 0, null); solid.y.splice(at, 0, null); }
  });
  return [
    { ...jump, mode: "lines+markers", line: { color: color("ink"), width: 1.6, dash: "dot" }, marker: { color: color("ink"), size: 6, symbol: "diamond" },
      hovertemplate: `changed by the scheduler, after generation %{x}<br>%{y:.4g}<extra>${text}</extra>` },
    { ...solid, mode: path.at.length < 3 ? "lines+markers" : "lines", line: { color: color(name), width: 2.4 }, marker: { color: color(name), size: 6 },
      hovertemplate: `%{y:.4g} after %{x} generations<extra>${text}</extra>` },
  ];
}

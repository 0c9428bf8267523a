// A metric over generations: all trials, their quantiles, the best so far, the winner.
function metricSection() {
  const asked = { metric: null, log: null };
  section("curves", () => "All trials", () => page.data.kind === "sweep" && page.rows.count > 0, (place) => {
    const { data, rows } = page, metric = data.metrics.includes(asked.metric) ? asked.metric : data.metrics[0];
    const compared = rows.columns[metric], bands = rows.bands(metric);
    const positive = compared ? compared.every((v) => !(v <= 0)) : bands[0].every((v) => v === null || v > 0);
    const log = positive && (asked.log === null ? spread(bands) : asked.log);
    place.tools.replaceChildren(
      choose("Metric", data.metrics.map((one) => [one, one]), metric, (value) => { asked.metric = value; asked.log = null; place.draw(); }),
      ...(positive ? [check("log", log, (value) => { asked.log = value; place.draw(); })] : []));
    const x = range(rows.count).map((g) => g + 1), part = compared && rows.cloud(compared);
    const traces = (window_) => [...(part ? cloud(part, log, window_) : []), ...curves(metric, x, bands, part)];
    const sign = (data.objectives.find((one) => one.name === metric) || { sign: 0 }).sign, seen = worthSeeing(bands, sign, log);
    const about = { xaxis: generationAxis("generations done", rows.count), yaxis: { title: { text: safe(metric) }, type: log ? "log" : "linear", ...(seen ? { range: seen } : {}) } };
    place.chart.dataset.metric = metric;
    zoomed(place.chart, traces, about, part, log, (row, slot) => choosing(row, slot), seen);
    place.below.replaceChildren(keys(...[
      [color("orange"), winner()],
      [color("blue"), "median of all trials"], [color("shade"), "10–90% and 25–75%", ".thick"],
      ...(compared && data.objectives.length === 1 ? [[color("green"), "best so far", ".dot"]] : []),
      ...(compared ? [[color("trials"), cloudWords(part), part.values.length > FEW_POINTS ? ".thick" : ""]] : []),
      ...(page.chosen ? [[color("purple"), `trial ${page.chosen.trial}`]] : [])]),
    ...(compared ? [] : [el("p.note", {}, "Of what is not compared, quantiles and the winner are in this file.")]),
    ...(seen ? [el("p.note", {}, "Trials that are far worse than the middle lie outside; a double click shows all.")] : []),
    ...(rows.thinned ? [el("p.note", {}, `Of each slot the least and the greatest of every ${rows.thinned} generations; quantiles are of all.`)] : []));
  });
}

const winner = () => (page.data.objectives.length > 1 ? "the first of the front" : "the winner");

function cloudWords(part) {
  return part.values.length > FEW_POINTS ? "all trials: the darker, the more" : "all trials";
}

// The range of the medians and of how trials began, where some trials are so bad that they would hide
// it; null where all can be seen.
function worthSeeing(bands, sign, log) {
  if (!sign) return null;
  const scale = (values) => values.filter((v) => v !== null && !(log && v <= 0)).map(log ? Math.log10 : (v) => v);
  const [worst, good] = sign > 0 ? [bands[4], bands[0]] : [bands[0], bands[4]];
  const core = scale([...bands[2], ...good, worst[0]]), all = scale(worst);
  if (!core.length || !all.length) return null;
  const low = least(core), high = greatest(core), margin = 0.08 * (high - low || 1);
  const beyond = sign > 0 ? greatest(all) - high : low - least(all);
  if (beyond <= 1.5 * (high - low)) return null;
  return sign > 0 ? [low - margin, high + 5 * margin] : [low - 5 * margin, high + margin];
}

// A logarithmic axis helps where the bulk of the numbers spans a decade.
function spread(bands) {
  const low = Math.min(...bands[0].filter((v) => v > 0)), high = Math.max(...bands[4].filter((v) => v > 0));
  return high / low > 8;
}

function curves(metric, x, bands, part) {
  const { data, rows } = page, line = (values, about) => ({ x, y: values, mode: "lines", hovertemplate: `${about.name}, generation %{x}<br>%{y:.4g}<extra></extra>`, ...about });
  const made = [...band(x, bands[0], bands[4], color("shade")), ...band(x, bands[1], bands[3], color("shade")),
    line(bands[2], { name: "median", line: { color: color("blue"), width: 2 } })];
  if (part && data.objectives.length === 1) {
    made.push(line(Array.from(rows.best, finite), { name: "best so far", line: { color: color("green"), width: 2, dash: "dot" } }));
  }
  if (data.path && data.path.metrics[metric]) {
    const life = array(data.kept[0].life), y = Array.from(array(data.path.metrics[metric]), finite);
    made.push(lived(range(y.length).map((i) => life[2 * i] + 1), y, "orange", `trial ${data.kept[0].trial}`));
  }
  if (page.chosen && part && !rows.thinned) {
    const life = rows.life(page.chosen.generation, page.chosen.slot);
    made.push(lived(life.map(([g]) => g + 1), life.map(([g, s]) => finite(rows.columns[metric][g * rows.slots + s])), "purple", `trial ${page.chosen.trial}`));
  }
  return made;
}

function lived(x, y, name, text) {
  return { x, y, mode: x.length < 2 ? "markers" : "lines", line: { color: color(name), width: 2.4 }, marker: { color: color(name), size: 8 },
    name: text, hovertemplate: `${text}, generation %{x}<br>%{y:.4g}<extra></extra>` };
}

function omitRange(about) { return { ...about, yaxis: { ...omit(about.yaxis, "range"), autorange: true } }; }

// A chart whose cloud is counted anew where one looks closer; a click chooses the nearest trial.
function zoomed(where, traces, about, part, log, chosen, seen = null) {
  const clicked = (event) => {
    if (!part || page.rows.thinned) return;
    const point = event.points[0], given = point.customdata;
    const at = Array.isArray(given) ? given : nearest(part, point.x, point.y, log);
    if (at) chosen(at[0], at[1]);
  };
  chart(where, traces(seen), about, clicked);
  where.again = (window_) => chart(where, traces(window_), { ...about, xaxis: { ...about.xaxis, range: where.layout.xaxis.range.slice(), autorange: false },
    yaxis: { ...about.yaxis, range: where.layout.yaxis.range.slice(), autorange: false } }, clicked);
  Object.assign(where, { traces, about });
  if (where.zooming) return;
  where.zooming = true;
  where.on("plotly_relayout", (event) => {
    if (event["yaxis.autorange"]) chart(where, where.traces(null), omitRange(where.about), where.clicked);
    else if ("yaxis.range[0]" in event) where.again([event["yaxis.range[0]"], event["yaxis.range[1]"]]);
  });
}

// Of several objectives: all trials, and those that no other dominates.
function frontSection() {
  const asked = { x: 0, y: 1 };
  section("front", () => "The front", () => page.data.kind === "sweep" && page.data.objectives.length > 1, (place) => {
    const { data } = page, names = data.objectives.map((one) => one.name), [x, y] = [names[asked.x], names[asked.y]];
    const pick = (which) => choose(which === "x" ? "Across" : "Up", names.map((one, i) => [i, one]), asked[which], (value) => { asked[which] = Number(value); place.draw(); });
    place.tools.replaceChildren(...(names.length > 2 ? [pick("x"), pick("y")] : []));
    const scores = (name) => Array.from(array(data.trials.scores[name]), finite), trial = array(data.trials.trial);
    const generation = array(data.trials.generation), slot = array(data.trials.slot);
    const front = data.kept.slice().sort((a, b) => a.scores[x] - b.scores[x]);
    const traces = [
      { x: scores(x), y: scores(y), mode: "markers", marker: { color: color("trials"), size: 4.5, opacity: Math.max(0.25, Math.min(0.8, 400 / trial.length)) }, customdata: range(trial.length),
        text: Array.from(trial, (t) => `trial ${t}`), hovertemplate: `%{text}<br>${safe(x)} %{x:.4g}<br>${safe(y)} %{y:.4g}<extra></extra>` },
      { x: front.map((one) => one.scores[x]), y: front.map((one) => one.scores[y]), mode: names.length === 2 ? "lines+markers" : "markers", line: { color: color("orange"), width: 1.6, shape: data.objectives[asked.x].sign > 0 ? "hv" : "vh" },
        marker: { color: color("orange"), size: 8 }, text: front.map((one) => `trial ${one.trial}, generation ${one.generation + 1}`), hovertemplate: `%{text}<br>${safe(x)} %{x:.4g}<br>${safe(y)} %{y:.4g}<extra>front</extra>` },
    ];
    chart(place.chart, traces, { xaxis: { title: { text: safe(x) + arrow(asked.x) } }, yaxis: { title: { text: safe(y) + arrow(asked.y) } } }, (event) => {
      const point = event.points[0];
      if (point.curveNumber === 0) choosing(generation[point.customdata], slot[point.customdata]);
      else choosing(front[point.pointIndex].generation, front[point.pointIndex].slot);
    });
    const settings = data.space.map((one) => one.name), choices = Object.keys(data.choices[0] || {});
    place.below.replaceChildren(keys([color("orange"), "trials that no other dominates, of any generation"], [color("trials"), "all trials, at their end"]),
      table(["trial", ...names, "generation", ...settings.map(labelOf), ...choices], front.map((one) => [String(one.trial), ...names.map((n) => num(one.scores[n])), String(one.generation + 1),
        ...settings.map((n) => num(one.settings[n])), ...choices.map((n) => worded(one.choices[n]))]),
      { pick: page.rows.thinned ? null : (row) => choosing(front[row].generation, front[row].slot), chosen: (row) => page.chosen && page.chosen.trial === front[row].trial }));
  });
}

function arrow(i) { return page.data.objectives[i].sign > 0 ? " (less is better)" : " (more is better)"; }

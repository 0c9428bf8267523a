// A single run: its losses, its evaluations, and λ, step by step.
function stepSections() {
  lineSection("losses", "Metrics of every step", "lines", ["val_loss", "train_loss"]);
  lineSection("evaluations", "Evaluations", "evals", []);
  lineSection("lambda", "λ over steps", "record", []);
  section("found", () => "λ at the end", () => page.data.kind === "run" && Object.keys(page.data.leaves.leaves || {}).length > 0, (place) => {
    place.chart.remove();
    place.body.replaceChildren(...leafRows(page.data.leaves));
  });
}

function lineSection(id, title, part, first) {
  const asked = { name: null, log: null };
  const names = () => { const there = Object.keys(page.data[part] || {}); return [...first.filter((n) => there.includes(n)), ...there.filter((n) => !first.includes(n))]; };
  section(id, () => title, () => page.data.kind === "run" && names().length > 0, (place) => {
    const name = names().includes(asked.name) ? asked.name : names()[0], given = page.data[part][name];
    const at = Array.from(array(given.at)), values = array(given.rows), wide = values.length / Math.max(1, at.length);
    const positive = values.every((v) => !(v <= 0)), finite_ = Array.from(values).filter((v) => v > 0);
    const log = positive && finite_.length > 0 && (asked.log === null ? greatest(finite_) / least(finite_) > 30 : asked.log);
    place.tools.replaceChildren(choose("Series", names().map((one) => [one, one]), name, (value) => { asked.name = value; asked.log = null; place.draw(); }),
      ...(positive ? [check("log", log, (value) => { asked.log = value; place.draw(); })] : []));
    const shades = ["blue", "orange", "green", "purple", "amber", "sky"];
    const traces = range(wide).map((k) => ({ x: at, y: at.map((_, i) => finite(values[i * wide + k])), mode: at.length < 40 ? "lines+markers" : "lines",
      line: { color: color(shades[k % 6]), width: wide > 6 ? 1.1 : 1.8 }, marker: { size: 5 }, opacity: wide > 6 ? 0.7 : 1, hovertemplate: `step %{x}${wide > 1 ? `, line ${k}` : ""}<br>%{y:.5g}<extra></extra>` }));
    chart(place.chart, traces, { xaxis: { title: { text: "steps" } }, yaxis: { title: { text: safe(name) }, type: log ? "log" : "linear" } });
    place.chart.dataset.series = name;
    place.below.replaceChildren(...(given.more ? [el("p.note", {}, `The first ${wide} of ${wide + given.more} lines.`)] : []));
  });
}

const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const greatest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

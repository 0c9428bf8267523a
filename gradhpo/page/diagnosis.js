// Methods held against the exact hypergradient, where somebody saved a diagnosis.
function diagnosisSection() {
  section("diagnosis", () => "Diagnosis of methods", () => !!page.data.diagnosis, (place) => {
    const found = page.data.diagnosis;
    if (found.error) { place.chart.classList.add("low"); place.below.replaceChildren(el("p.note", {}, found.error)); return; }
    const points = found.points.filter((one) => one.cost !== null && one.cosine !== null);
    if (points.length) {
      const best = (one) => one.name === found.recommended;
      chart(place.chart, [{ x: points.map((one) => one.cost), y: points.map((one) => one.cosine), mode: "markers+text", text: points.map((one) => safe(one.name)), textposition: "top center", textfont: { size: 11.5 },
        cliponaxis: false, marker: { size: points.map((one) => (best(one) ? 14 : 8)), color: points.map((one) => color(best(one) ? "orange" : "blue")), symbol: points.map((one) => (best(one) ? "star" : "circle")) },
        hovertemplate: "%{text}<br>%{x:.3g} times training<br>cosine %{y:.3f}<extra></extra>" }],
      { height: 320, xaxis: { title: { text: "time of an inner step, over training alone" } }, yaxis: { title: { text: "cosine to exact" }, range: [Math.min(-0.05, ...points.map((one) => one.cosine)), 1.12] },
        shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: found.aligned, y1: found.aligned, line: { color: color("line"), dash: "dot", width: 1 } }] });
    } else place.chart.classList.add("low");
    place.below.replaceChildren(table(found.columns, found.rows, { chosen: (i) => found.rows[i][0] === found.recommended }),
      el("p", {}, `Recommended: ${found.recommendation}`), ...found.notes.map((note) => el("p.note", {}, note)));
  });
}

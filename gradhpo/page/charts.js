// Charts, by Plotly: SVG alone, which every browser can draw, in the colours of the page.
const CONFIG = { displaylogo: false, responsive: true, showTips: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "toImage", "zoomIn2d", "zoomOut2d"] };

// Plotly reads some HTML in texts: those of a storage are to be seen as they are.
const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const narrow = () => window.innerWidth < 600;

function axis(about = {}) {
  return { gridcolor: color("grid"), linecolor: color("line"), zerolinecolor: color("line"), automargin: true,
    tickfont: { size: 11.5 }, title: { standoff: 8, ...(about.title || {}) }, exponentformat: "power", ...(about.type === "log" ? { nticks: 5 } : {}), ...omit(about, "title") };
}

// Where generations are few there is a mark at each, and none between them.
const generationAxis = (text, n) => ({ title: { text }, ...(n < 9 ? { tick0: 0, dtick: 1 } : {}) });

function omit(from, name) {
  const made = { ...from };
  delete made[name];
  return made;
}

function layout(about = {}) {
  return {
    height: narrow() ? 320 : 400, margin: { l: 56, r: 12, t: 10, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 12.5, color: color("soft") },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("ink"), size: 12.5 } },
    dragmode: narrow() ? false : "zoom",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("trials"), activecolor: color("blue") },
    ...about, xaxis: axis(about.xaxis), yaxis: axis(about.yaxis),
  };
}

function chart(where, traces, about, clicked = null) {
  const done = Plotly.react(where, traces, layout(about), { ...CONFIG, displayModeBar: narrow() ? false : "hover" });
  where.style.minHeight = "0"; // it is as high as what is drawn in it
  if (!where.heard) {
    where.heard = true;
    where.on("plotly_click", (event) => where.clicked && where.clicked(event));
  }
  where.clicked = clicked;
  return done;
}

function band(x, low, high, fill, name) {
  return [
    { x, y: low, mode: "lines", line: { width: 0 }, hoverinfo: "skip", connectgaps: false },
    { x, y: high, mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: fill, hoverinfo: "skip", name },
  ];
}

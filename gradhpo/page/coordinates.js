// Parallel coordinates: a line for each trial at its end; drag along an axis to keep some.
// From the best to the worst: away from the paper, in light and in dark.
const SCALES = {
  light: ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#dfd06a"],
  dark: ["#fde725", "#c2df23", "#86d549", "#52c569", "#2ab07f", "#1e9b8a", "#25858e", "#3a6d9c"],
};
const scaleNow = () => SCALES[nowDark() ? "dark" : "light"];

function coordinatesSection() {
  const asked = { kept: {} };
  section("coordinates", () => "Settings and scores", () => page.data.kind === "sweep" && page.data.trials.of > 0, (place) => {
    const { data } = page, dims = dimensions(data.trials), n = array(data.trials.trial).length;
    if (place.canvas === undefined) place.canvas = parallel(place, asked);
    const picture = place.canvas, names = new Set(dims.map((d) => d.id));
    for (const name of Object.keys(asked.kept)) if (!names.has(name)) delete asked.kept[name];
    place.tools.replaceChildren(el("button", { type: "button", on: { click: () => { asked.kept = {}; place.draw(); } } }, "All trials"));
    picture.show(dims, n);
    const rest = () => {
      const left = range(n).filter((i) => inside(dims, asked.kept, i));
      place.below.replaceChildren(keys([scaleNow()[0], "the best"], [scaleNow()[4], "in the middle"], [scaleNow()[7], "the worst"], [color("orange"), "the best of those kept"]),
        el("p.note", {}, el("span", { id: "kept-trials" }, `${count(left.length)} of ${several(n, "trial")}`),
          n < data.trials.of ? ` (of ${count(data.trials.of)}: the best and an even sample of the others)` : "",
          ", as they were at their end. Drag along an axis to keep a part of it; click it to let go."),
        tableOf(dims, left.slice(0, 10)));
    };
    picture.changed = rest;
    rest();
  });
}

// Numbers by trial, the score last; each knows where its values are, from 0 to 1.
function dimensions(trials) {
  const made = [], variant = array(trials.variant), { data } = page;
  for (const name of Object.keys(data.choices[0] || {})) {
    const labels = [...new Set(data.choices.map((one) => worded(one[name])))];
    const values = Array.from(variant, (v) => labels.indexOf(worded(data.choices[v][name])));
    made.push({ id: `choice ${name}`, label: name, values, labels, unit: (v) => (labels.length < 2 ? 0.5 : v / (labels.length - 1)) });
  }
  for (const one of data.space) made.push(numeric(`setting ${one.name}`, one.label, array(trials.settings[one.name]), one.log));
  data.objectives.forEach((one) => made.push(numeric(`score ${one.name}`, one.name, array(trials.scores[one.name]), null, one.sign)));
  return made;
}

function numeric(id, label, values, log, sign = 0) {
  const finite_ = Array.from(values).filter(Number.isFinite).sort((a, b) => a - b);
  const at = (q) => finite_[Math.min(finite_.length - 1, Math.floor(q * finite_.length))];
  if (log === null) log = finite_[0] > 0 && at(0.9) / finite_[0] > 12;
  const positive = finite_[0] > 0, scale = log && positive ? Math.log : (v) => v;
  // A score's worst quarter would hide the others: it is drawn at the edge.
  const low = sign < 0 && finite_.length > 30 ? at(0.25) : finite_[0], high = sign > 0 && finite_.length > 30 ? at(0.75) : finite_.at(-1);
  const [a, b] = [scale(low), scale(high)];
  const unit = (v) => { const u = b > a ? (scale(v) - a) / (b - a) : 0.5; return sign ? Math.max(-0.03, Math.min(1.03, u)) : u; };
  const back = (u) => (log && positive ? Math.exp(a + u * (b - a)) : a + u * (b - a));
  return { id, label, values, unit, back, low, high, sign };
}

function inside(dims, kept, i) {
  return dims.every((dim) => {
    const part = kept[dim.id];
    if (!part) return true;
    const u = dim.unit(dim.values[i]);
    return u >= part[0] && u <= part[1];
  });
}

function tableOf(dims, which) {
  const { trials } = page.data, trial = array(trials.trial), generation = array(trials.generation), slot = array(trials.slot);
  const scores = dims.filter((d) => d.sign), others = dims.filter((d) => !d.sign);
  return table(["trial", ...scores.map((d) => d.label), "generation", ...others.map((d) => d.label)],
    which.map((i) => [String(trial[i]), ...scores.map((d) => num(d.values[i])), String(generation[i] + 1), ...others.map((d) => (d.labels ? d.labels[d.values[i]] : num(d.values[i])))]),
    { pick: page.rows.thinned ? null : (row) => choosing(generation[which[row]], slot[which[row]]), chosen: (row) => page.chosen && page.chosen.trial === trial[which[row]] });
}

function parallel(place, asked) {
  const canvas = el("canvas", { role: "img", "aria-label": "Parallel coordinates of trials" }), box = el("div.axes", { id: "axes" }, canvas);
  place.chart.replaceWith(box);
  const made = { dims: [], n: 0, changed: () => {} };
  let drag = null;
  const pad = { top: 46, bottom: 30, side: 52 };
  const x = (k) => pad.side + (made.dims.length < 2 ? 0.5 : k / (made.dims.length - 1)) * (made.width - 2 * pad.side);
  const y = (u) => pad.top + (1 - u) * (made.height - pad.top - pad.bottom);
  const unitAt = (at) => 1 - (at - pad.top) / (made.height - pad.top - pad.bottom);

  function size() {
    made.width = Math.max(box.clientWidth, made.dims.length * 84);
    made.height = narrow() ? 320 : 380;
    const ratio = window.devicePixelRatio || 1;
    Object.assign(canvas, { width: made.width * ratio, height: made.height * ratio });
    Object.assign(canvas.style, { width: `${made.width}px`, height: `${made.height}px` });
    return ratio;
  }

  function paint() {
    const ratio = size(), pen = canvas.getContext("2d"), scale = scaleNow();
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, made.width, made.height);
    const left = range(made.n).filter((i) => inside(made.dims, asked.kept, i)), all = left.length === made.n;
    const grey = color("grid");
    if (!all) strokes(pen, range(made.n).filter((i) => !inside(made.dims, asked.kept, i)), () => grey, 0.5, 0.7);
    strokes(pen, left.slice().reverse(), (i) => scale[Math.min(7, Math.floor((8 * i) / made.n))], Math.max(0.12, Math.min(0.9, 160 / left.length)), 1.1);
    if (page.chosen) {
      const trial = array(page.data.trials.trial), at = trial.indexOf(page.chosen.trial);
      if (at >= 0) strokes(pen, [at], () => color("purple"), 1, 2.5);
    }
    if (left.length) strokes(pen, left.slice(0, 1), () => color("orange"), 1, 2.5);
    made.dims.forEach((dim, k) => axis_(pen, dim, k));
  }

  function strokes(pen, which, shade, alpha, width) {
    pen.globalAlpha = alpha;
    pen.lineWidth = width;
    for (const i of which) {
      pen.strokeStyle = shade(i);
      pen.beginPath();
      let on = false;
      made.dims.forEach((dim, k) => {
        const u = dim.unit(dim.values[i]);
        if (!Number.isFinite(u)) { on = false; return; }
        if (on) pen.lineTo(x(k), y(u)); else pen.moveTo(x(k), y(u));
        on = true;
      });
      pen.stroke();
    }
    pen.globalAlpha = 1;
  }

  function axis_(pen, dim, k) {
    const at = x(k), part = asked.kept[dim.id];
    pen.strokeStyle = color("soft");
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(at, y(0));
    pen.lineTo(at, y(1));
    pen.stroke();
    if (part) {
      pen.fillStyle = color("blue");
      pen.globalAlpha = 0.3;
      pen.fillRect(at - 7, y(part[1]), 14, y(part[0]) - y(part[1]));
      pen.globalAlpha = 1;
    }
    pen.textAlign = "center";
    pen.fillStyle = color("ink");
    pen.font = "600 12.5px system-ui, sans-serif";
    pen.fillText(fitting(pen, dim.label, Math.max(70, (made.width - 2 * pad.side) / Math.max(1, made.dims.length - 1) - 10)), at, 16);
    pen.font = "11.5px system-ui, sans-serif";
    pen.fillStyle = color("soft");
    const tell = (text, u, below) => {
      const wide = pen.measureText(text).width;
      pen.fillStyle = color("card");
      pen.globalAlpha = 0.8;
      pen.fillRect(at - wide / 2 - 3, y(u) + (below - 11), wide + 6, 15);
      pen.globalAlpha = 1;
      pen.fillStyle = color("soft");
      pen.fillText(text, at, y(u) + below);
    };
    if (dim.labels) dim.labels.forEach((label, i) => tell(fitting(pen, label, 90), dim.unit(i), dim.unit(i) === 1 ? -8 : dim.unit(i) === 0 ? 18 : 4));
    else if (Number.isFinite(dim.low)) { tell(num(dim.high), 1, -8); tell(num(dim.low), 0, 20); if (dim.high > dim.low) tell(num(dim.back(0.5)), 0.5, 4); }
  }

  function position(event) {
    const frame = canvas.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  }

  canvas.addEventListener("pointerdown", (event) => {
    const [px, py] = position(event);
    const k = made.dims.findIndex((_, i) => Math.abs(x(i) - px) < 16);
    if (k < 0) return;
    drag = { dim: made.dims[k], from: unitAt(py), moved: false };
    canvas.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const to = unitAt(position(event)[1]);
    if (Math.abs(to - drag.from) < 0.02 && !drag.moved) return;
    drag.moved = true;
    asked.kept[drag.dim.id] = [Math.min(drag.from, to), Math.max(drag.from, to)];
    paint();
  });
  canvas.addEventListener("pointerup", () => {
    if (!drag) return;
    if (!drag.moved) delete asked.kept[drag.dim.id];
    drag = null;
    paint();
    made.changed();
  });
  canvas.addEventListener("pointercancel", () => { drag = null; });
  new ResizeObserver(() => made.dims.length && paint()).observe(box);
  made.show = (dims, n) => { Object.assign(made, { dims, n }); paint(); };
  return made;
}

function fitting(pen, text, wide) {
  if (pen.measureText(text).width <= wide) return text;
  let left = text;
  while (left.length > 1 && pen.measureText(left + "…").width > wide) left = left.slice(0, -1);
  return left + "…";
}

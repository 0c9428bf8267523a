// All trials in one picture: their lines where these are few, where they are many how many run where.
const FEW_POINTS = 12000;
const BINS = { x: 240, y: 110 };

// rows: {at, values, slots, begins(row, slot)}: values row by row. Returns traces, and who is near a point.
function cloud(rows, log, window_ = null) {
  const size = rows.values.length;
  if (size === 0) return [];
  return size <= FEW_POINTS ? [lines(rows)] : density(rows, log, window_);
}

function lines(rows) {
  const x = [], y = [], custom = [], n = rows.at.length;
  for (let slot = 0; slot < rows.slots; slot++) {
    for (let row = 0; row < n; row++) {
      if (row && rows.begins(row, slot)) { x.push(null); y.push(null); custom.push(null); }
      x.push(rows.at[row]); y.push(finite(rows.values[row * rows.slots + slot])); custom.push([row, slot]);
    }
    x.push(null); y.push(null); custom.push(null);
  }
  const few = n <= 2 || rows.values.length <= 600;
  return { x, y, customdata: custom, mode: few ? "lines+markers" : "lines", marker: { size: 3.5, color: color("trials") },
    line: { color: color("trials"), width: 0.9 }, opacity: Math.max(0.16, Math.min(0.7, 24 / rows.slots)),
    text: custom.map((one) => (one ? rows.name(one[0], one[1]) : "")), hovertemplate: "%{text}<br>%{y:.4g}<extra></extra>" };
}

function density(rows, log, window_) {
  const scale = log ? Math.log10 : (v) => v;
  let low = Infinity, high = -Infinity;
  for (const value of rows.values) {
    const v = scale(value);
    if (Number.isFinite(v)) { if (v < low) low = v; if (v > high) high = v; }
  }
  if (!(high > low)) { low -= 0.5; high += 0.5; }
  if (window_) [low, high] = [Math.max(low, window_[0]), Math.min(high, window_[1])];
  if (!(high > low)) return [];
  const n = rows.at.length, wide = Math.min(BINS.x, n), tall = BINS.y, counts = new Float64Array(wide * tall);
  for (let row = 0; row < n; row++) {
    const column = Math.floor((row * wide) / n);
    for (let slot = 0; slot < rows.slots; slot++) {
      const v = scale(rows.values[row * rows.slots + slot]);
      if (!(v >= low && v <= high)) continue;
      counts[Math.min(tall - 1, Math.floor(((v - low) / (high - low)) * tall)) * wide + column]++;
    }
  }
  const back = log ? (v) => 10 ** v : (v) => v;
  const edges = range(tall + 1).map((i) => back(low + ((high - low) * i) / tall));
  const first = rows.at[0] - 0.5, last = rows.at[n - 1] + 0.5;
  const z = range(tall).map((i) => Array.from(counts.subarray(i * wide, (i + 1) * wide), (c) => (c ? Math.log1p(c) : null)));
  const clear = nowDark() ? "rgba(118,131,143,0.12)" : "rgba(138,151,166,0.14)", full = nowDark() ? "rgba(170,184,198,0.85)" : "rgba(74,88,104,0.8)";
  return [{ type: "heatmap", z, y: edges, x: range(wide + 1).map((i) => first + ((last - first) * i) / wide),
    colorscale: [[0, clear], [1, full]], showscale: false, hoverinfo: "skip" }];
}

function finite(value) { return Number.isFinite(value) ? value : null; }

// Returns [row, slot] of the trial that is nearest to a point in the data's own coordinates.
function nearest(rows, x, y, log) {
  const scale = log ? Math.log10 : (v) => v;
  let row = 0;
  rows.at.forEach((at, i) => { if (Math.abs(at - x) < Math.abs(rows.at[row] - x)) row = i; });
  let found = null, least = Infinity;
  for (let slot = 0; slot < rows.slots; slot++) {
    const apart = Math.abs(scale(rows.values[row * rows.slots + slot]) - scale(y));
    if (apart < least) { least = apart; found = [row, slot]; }
  }
  return found;
}

// Numbers as a person reads them: four digits, the same everywhere.
function num(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  if (Number.isInteger(x) && Math.abs(x) < 1e6) return String(x).replace("-", "−");
  const size = Math.abs(x);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? x.toExponential(3) : x.toPrecision(4);
  return text.replace(/-/g, "−").replace("e+", "e");
}

const count = (n) => n.toLocaleString("en-US").replace(/,/g, "\u202f");

const percent = (x) => (x === 0 ? "0%" : x < 0.0005 ? "under 0.1%" : `${(100 * x).toFixed(x < 0.1 ? 1 : 0)}%`);

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 120) return `${seconds.toPrecision(3)} s`;
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days > 2) return `${days} d ${hours % 24} h`;
  return hours ? `${hours} h ${minutes % 60} min` : `${minutes} min ${Math.round(seconds % 60)} s`;
}

const when = (seconds) => new Date(seconds * 1000).toLocaleString("sv-SE").slice(0, 19);

const several = (n, one, many = one + "s") => `${count(n)} ${n === 1 ? one : many}`;

const worded = (value) => (value === true ? "true" : value === false ? "false" : typeof value === "number" ? num(value) : String(value));

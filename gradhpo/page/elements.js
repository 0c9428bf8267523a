// Elements: what comes from a storage becomes text, never HTML.
function el(kind, about = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(about)) {
    if (name === "on") for (const [event, done] of Object.entries(value)) made.addEventListener(event, done);
    else if (name === "style") Object.assign(made.style, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((one) => one !== null && one !== undefined));
  return made;
}

function choose(label, values, chosen, changed) {
  const made = el("select", { "aria-label": label, on: { change: () => changed(made.value) } },
    ...values.map(([value, text]) => el("option", { value }, text)));
  made.value = chosen;
  return made;
}

function check(label, value, changed) {
  const box = el("input", { type: "checkbox", on: { change: () => changed(box.checked) } });
  box.checked = value;
  return el("label", {}, box, label);
}

function pairs(found) {
  return el("div.pairs", {}, ...found.map(([name, text, more]) =>
    el("div.pair", {}, el("span", {}, name), el("span", {}, text, more))));
}

// rows: lists of texts; pick(index) where a row can be chosen.
function table(columns, rows, { pick = null, chosen = () => false, text = [] } = {}) {
  const kind = (name, i) => (text.includes(i) ? `${name}.text` : name);
  return el("div.scroll", {}, el("table", {},
    el("thead", {}, el("tr", {}, ...columns.map((one, i) => el(kind("th", i), {}, one)))),
    el("tbody", {}, ...rows.map((row, number) => el(
      "tr" + (pick ? ".pick" : "") + (chosen(number) ? ".chosen" : ""),
      pick ? { tabindex: 0, on: { click: () => pick(number), keydown: (e) => e.key === "Enter" && pick(number) } } : {},
      ...row.map((one, i) => el(kind("td", i), {}, one)))))));
}

function keys(...found) {
  return el("div.key", {}, ...found.map(([color, text, kind = ""]) => el("span", {},
    el("i" + kind, { style: kind === ".thick" ? { background: color } : { borderTopColor: color } }), text)));
}

function spark(counts, color, width = 120, height = 22) {
  const space = "http://www.w3.org/2000/svg", made = document.createElementNS(space, "svg");
  const most = Math.max(...counts, 1), step = width / counts.length;
  made.setAttribute("width", width);
  made.setAttribute("height", height);
  made.setAttribute("class", "spark");
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", "histogram");
  counts.forEach((count, i) => {
    const bar = document.createElementNS(space, "rect"), tall = (count / most) * height;
    for (const [name, value] of Object.entries({ x: i * step, y: height - tall, width: step * 0.86, height: tall, fill: color })) bar.setAttribute(name, value);
    made.append(bar);
  });
  return made;
}

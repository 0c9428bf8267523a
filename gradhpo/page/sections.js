// The page: its sections, each drawn when somebody comes near it; and the trial that was chosen.
const page = { data: null, rows: new Rows(), chosen: null, sections: [], cards: el("div.cards", { id: "cards" }), live: false };

function section(id, title, there, draw) {
  const place = { id, title, there, shown: false, near: false,
    name: el("h2", {}), tools: el("div.tools"), chart: el("div.chart", { id: `chart-${id}` }), below: el("div") };
  place.body = el("div", {}, place.chart, place.below);
  place.whole = el("section", { id }, el("div.head", {}, place.name, place.tools), place.body);
  place.draw = () => { place.name.textContent = title(); draw(place); place.shown = true; };
  page.sections.push(place);
}

const watching = new IntersectionObserver((seen) => seen.forEach((one) => {
  const place = page.sections.find((known) => known.whole === one.target);
  place.near = one.isIntersecting;
  if (place.near && !place.shown) place.draw();
}), { rootMargin: "500px" });

// Shows what there is now: in place where it was drawn before, when it comes near elsewhere.
function refresh() {
  head();
  cards();
  const main = document.getElementById("main"), there = page.sections.filter((place) => place.there());
  const now = [page.cards, ...there.map((place) => place.whole)];
  if (now.length !== main.children.length || now.some((one, i) => main.children[i] !== one)) main.replaceChildren(...now);
  for (const place of page.sections) {
    if (!there.includes(place)) { watching.unobserve(place.whole); place.shown = false; continue; }
    place.name.textContent = place.title();
    place.shown = false;
    watching.observe(place.whole);
    if (place.near) place.draw();
  }
  const links = there.map((place) => el("a", { href: `#${place.id}` }, place.title()));
  document.getElementById("nav").replaceChildren(el("div", {}, el("a", { href: "#top" }, "Summary"), ...links));
}

function redraw() {
  for (const place of page.sections) {
    if (!place.shown) continue;
    if (place.near) place.draw(); else place.shown = false;
  }
}

// A trial that was clicked is drawn everywhere; clicked again, no longer.
function choosing(generation, slot) {
  if (page.rows.thinned) return;
  const trial = page.rows.trial[generation * page.rows.slots + slot];
  const again = page.chosen && page.chosen.trial === trial && page.chosen.generation === generation;
  page.chosen = again ? null : { generation, slot, trial };
  told();
  redraw();
}

const bar = el("div.chosen-line", { id: "chosen", style: { display: "none" } });

function told() {
  const { chosen, rows, data } = page;
  bar.style.display = chosen ? "flex" : "none";
  if (!chosen) return;
  const at = chosen.generation * rows.slots + chosen.slot;
  const numbers = [...data.objectives.map((one) => `${one.name} ${num(rows.columns[one.name][at])}`), ...data.space.map((one) => `${one.label} ${num(rows.settings[one.name][at])}`)];
  bar.replaceChildren(el("span", {}, `Trial ${chosen.trial}, after generation ${chosen.generation + 1}: ${numbers.join(", ")}`),
    el("button", { type: "button", on: { click: () => choosing(chosen.generation, chosen.slot) } }, "Let go"));
}

function take(data) {
  page.data = data;
  if (data.rows) page.rows.take(data.rows);
  if (page.chosen && data.rows && data.rows.first === 0) page.chosen = null;
  told();
}

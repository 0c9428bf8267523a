// The head of the page, and the numbers that come first.
function head() {
  const { data } = page;
  const state = data.running ? ["runs", `running: ${data.running}`]
    : data.stopped ? ["good", "stopped"] : data.kind === "run" ? ["good", "not running"]
      : data.done >= data.total ? ["good", "complete"] : ["bad", "not running"];
  const why = data.stopped && !data.running ? `stopped: ${data.stopped}` : null;
  const names = el("div.names", {}, el("h1", {}, data.title),
    el("div.where", {}, data.where),
    el("div", { style: { marginTop: "8px" } }, el("span.pill." + state[0], { id: "state" }, state[1]),
      why && el("span.small", {}, why)));
  const top = document.getElementById("top");
  page.button = page.button || themeButton();
  top.replaceChildren(names, page.button);
  document.getElementById("foot").textContent = `gradhpo ${data.version}, ${page.live ? "last look" : "written"} ${when(data.made)}`;
}

const card = (name, value, more, id) => el("div.card", {}, el("div.name", { title: name }, name), el("div.value", id ? { id } : {}, value), el("div.more", {}, more || ""));

function cards() {
  const { data } = page;
  const found = data.kind === "run" ? runCards(data) : sweepCards(data);
  page.cards.replaceChildren(...found);
}

function sweepCards(data) {
  const best = data.kept[0], several_ = data.objectives.length > 1, { costs } = data;
  const faults = Object.entries(costs.faults), lost = faults.reduce((sum, [, n]) => sum + n, 0);
  const first = !best ? card(data.objectives[0].name, "–", "no trial has a finite score yet", "best")
    : several_ ? card("front", count(data.kept.length), `trials, of ${data.objectives.map((o) => o.name).join(", ")}`, "best")
      : card(`best ${data.objectives[0].name}`, num(best.scores[data.objectives[0].name]), `trial ${best.trial}, generation ${best.generation + 1}`, "best");
  const made = costs.compiles;
  return [
    first,
    card("generations", `${count(data.done)} / ${count(data.total)}`, `of ${several(data.steps, "step")}`, "done"),
    card("trials", count(data.trials.of), `${several(data.population, "slot")}`, "trials"),
    card("diverged", count(data.diverged.of), data.diverged.of ? percent(data.diverged.of / data.trials.of) + " of trials" : "no trial", "diverged-count"),
    card("compiles", count(made.compiles), `${several(made.loads, "load")}${made.restores ? `, ${made.restores} from JAX's cache` : ""}`),
    card("faults survived", count(lost), faults.length ? faults.map(([name, n]) => `${n} ${name}`).join(", ") : "nothing was lost"),
    card("time", duration(costs.seconds.generations), `and ${duration(costs.seconds.starting)} to start`),
  ];
}

// Of several runs those that had a finite score; null where none had.
function bestOf(scores, mode) {
  const there = scores.filter((x) => x !== null);
  return there.length ? there.reduce((a, b) => (mode === "min" ? Math.min(a, b) : Math.max(a, b))) : null;
}

function runCards(data) {
  const names = Object.keys(data.lines), first = names.includes("val_loss") ? "val_loss" : names[0];
  const runs = data.runs || 1, gone = data.diverged.filter((step) => step > 0).length;
  const scores = data.best && [data.best.score].flat(), steps = data.best && [data.best.step].flat();
  return [
    data.best ? card(`best ${data.best.metric}`, num(bestOf(scores, data.best.mode)),
      scores.length === 1 ? `at step ${count(steps[0])}` : `of ${runs} runs`, "best")
      : card(`last ${first}`, num(array(data.lines[first].rows).at(-1)), "", "best"),
    card("steps", count(data.done), data.runs ? `of each of ${runs} runs` : "", "done"),
    card("diverged", count(gone), gone ? `at step ${data.diverged.filter((s) => s > 0).map(count).slice(0, 4).join(", ")}` : data.runs ? "no run" : "no", "diverged-count"),
    card("checkpoint", data.checkpoint.split("-").slice(1, 3).join(" "), data.checkpoint),
  ];
}

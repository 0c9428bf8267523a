// How much of the differences between trials each setting alone explains.
function importanceSection() {
  const asked = { name: null };
  section("importance", () => "Importance of settings", () => page.data.kind === "sweep" && Object.values(page.data.importance).some((one) => Object.keys(one).length), (place) => {
    const { data } = page, names = data.objectives.map((one) => one.name), name = names.includes(asked.name) ? asked.name : names[0];
    place.tools.replaceChildren(...(names.length > 1 ? [choose("Objective", names.map((one) => [one, one]), name, (value) => { asked.name = value; place.draw(); })] : []));
    const found = Object.entries(data.importance[name]).sort((a, b) => b[1].share - a[1].share);
    const trials = Math.max(0, ...found.map(([, one]) => one.trials));
    place.chart.classList.add("low");
    place.chart.replaceChildren(el("div.bars", { id: "bars" }, ...found.map(([setting, one]) => el("div.bar", {},
      el("span", {}, labelOf(setting)),
      el("div.track", {}, el(one.share > one.chance ? "div.fill" : "div.fill.weak", { style: { width: `${Math.min(100, 100 * one.share)}%` } }),
        el("div.chance", { style: { left: `${Math.min(99.5, 100 * one.chance)}%` }, title: "what shuffled settings stay below, 95 of 100 times" })),
      el("span.number", {}, one.share > one.chance ? percent(one.share) : `${percent(one.share)}, chance`)))));
    place.below.replaceChildren(el("p.note", {},
      `The share of the variance of a trial's place among those of its last generation that lies between ranges of one setting (ε², up to 8 ranges of equal counts; of ${several(trials, "trial")}). `
      + "The mark is what shuffled settings stay below, 95 of 100 times: a bar that does not reach beyond it says nothing. Settings that work only together are not seen, and where a scheduler copies the best, a setting may look important because the best had it."));
  });
}

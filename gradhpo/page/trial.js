// The best trial: what it had, where it came from, its λ.
function trialSection() {
  section("best", () => (page.data.objectives && page.data.objectives.length > 1 ? "Best of the first objective" : "Best trial"),
    () => page.data.kind === "sweep" && page.data.kept.length > 0, (place) => {
      const { data } = page, best = data.kept[0];
      const scores = Object.keys(best.scores), others = Object.entries(best.metrics).filter(([name]) => !scores.includes(name));
      const found = [
        ...Object.entries(best.scores).map(([name, x]) => [name, num(x)]),
        ...Object.entries(best.settings).filter(([, x]) => x !== null).map(([name, x]) => [labelOf(name), num(x)]),
        ...Object.entries(best.choices).map(([name, x]) => [name, worded(x)]),
        ...others.map(([name, x]) => [name, num(x)]),
      ];
      place.body.replaceChildren(
        el("p.note", {}, `Trial ${best.trial}, as it was after generation ${best.generation + 1}, in slot ${best.slot}.`),
        pairs(found),
        el("h3", {}, "Comes from"),
        el("div.chain", { id: "lineage" }, shortened(best.lineage).join(" → ")),
        ...leafRows(data.leaves));
    });
}

function shortened(trials) {
  return trials.length <= 40 ? trials : [...trials.slice(0, 8), "…", ...trials.slice(-24)];
}

function leafRows(given) {
  if (!given || (!given.leaves && !given.error)) return [];
  if (given.error) return [el("p.note", {}, `λ cannot be read: ${given.error}`)];
  const rows = Object.entries(given.leaves).map(([name, leaf]) => {
    if (leaf.values) return [name, leaf.shape.length ? `${leaf.dtype}[${leaf.shape}]` : leaf.dtype, leaf.values.map(num).join(", "), "", "", ""];
    const lost = leaf.lost ? ` (${leaf.lost} not finite)` : "";
    return [name, `${leaf.dtype}[${leaf.shape}]${lost}`, num(leaf.median), num(leaf.least), num(leaf.greatest), leaf.counts ? spark(leaf.counts, color("blue")) : ""];
  });
  if (!rows.length) return [];
  return [el("h3", {}, "Hyperparameters λ"),
    table(["leaf", "kind", "value or median", "least", "greatest", ""], rows, { text: [2] }),
    given.more ? el("p.note", {}, `and ${given.more} leaves more`) : null].filter(Boolean);
}

function labelOf(name) { return name || "λ"; }

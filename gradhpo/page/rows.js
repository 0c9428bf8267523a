// What all trials were, generation by generation; it grows while a sweep is watched.
class Rows {
  constructor() {
    this.count = 0;
    // By names of a person's, "constructor" among them: without what objects inherit.
    for (const part of ["columns", "settings", "quantiles", "moved"]) this[part] = Object.create(null);
  }

  take(given) {
    if (given.first === 0) Object.assign(this, new Rows());
    this.slots = given.slots;
    this.count = given.first + given.count;
    this.thinned = given.thinned || 0;
    if (this.thinned) this.at = Array.from(array(given.at));
    for (const name of ["best", "seconds", "diverged"]) this[name] = joined(this[name], array(given[name]));
    for (const name of this.thinned ? [] : ["trial", "parent"]) this[name] = joined(this[name], array(given[name]));
    for (const part of ["columns", "settings", "quantiles"]) {
      for (const [name, one] of Object.entries(given[part])) this[part][name] = joined(this[part][name], array(one));
    }
    for (const [name, one] of Object.entries(given.moved || {})) {
      const known = (this.moved[name] = this.moved[name] || new Map()), at = array(one.at), to = array(one.to);
      at.forEach((index, i) => known.set(index, to[i]));
    }
    if (!this.thinned) this.at = range(this.count);
  }

  // What is drawn: `values` is of `columns` or `settings`.
  cloud(values) {
    const { slots, thinned, parent, trial } = this;
    return { at: this.at.map((g) => g + 1), values, slots,
      begins: thinned ? () => false : (row, slot) => parent[row * slots + slot] !== slot,
      name: thinned ? () => "" : (row, slot) => `trial ${trial[row * slots + slot]}, generation ${row + 1}` };
  }

  // The quantiles of a column: five lists.
  bands(name) {
    const found = this.quantiles[name] || [];
    return range(5).map((i) => range(this.count).map((g) => finite(found[g * 5 + i])));
  }

  // [generation, slot] of a trial and those that it came from, the first one first.
  life(generation, slot) {
    const made = [];
    for (let g = generation; g >= 0 && slot >= 0; g--) {
      made.push([g, slot]);
      slot = this.parent[g * this.slots + slot];
    }
    return made.reverse();
  }

  begun(name, generation, slot) {
    const moved = this.moved[name] && this.moved[name].get(generation * this.slots + slot);
    if (moved !== undefined) return moved;
    const source = this.parent[generation * this.slots + slot];
    return generation && source >= 0 ? this.settings[name][(generation - 1) * this.slots + source] : NaN;
  }

  // A life's path through a setting: {begun, ended, at, slots}.
  path(name, life) {
    return { at: life.map(([g]) => g), begun: life.map(([g, s]) => this.begun(name, g, s)),
      ended: life.map(([g, s]) => this.settings[name][g * this.slots + s]) };
  }
}

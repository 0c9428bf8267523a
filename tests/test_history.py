"""Schedulers see every table before theirs: once read, equal to the bit after a resume."""

import dataclasses

import jax
import numpy as np
import pytest

from gradhpo.cluster import (
    NEW,
    Decision,
    Rows,
    SearchSpace,
    SweepError,
    Table,
    loguniform,
    shard,
)
from gradhpo.cluster.history import IDLE, History
from gradhpo.cluster.objectives import Objectives
from tests.file_operations import Variant
from tests.sweeps import assert_same_tables, sweep

SMALL = {"population": 6, "shards": 2, "generations": 6}


@pytest.fixture(autouse=True)
def numpy_steps(monkeypatch):
    """Let a generation be a few lines of NumPy: what lasts, and what decides, is the real thing."""
    monkeypatch.setattr(shard, "Variant", Variant)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(jax, "process_count", lambda: 1)


class Looking:
    """A scheduler that starts the oldest trial anew, and keeps all that it has seen."""

    def __init__(self, stop_after=None):
        self.seen, self.stop_after = {}, stop_after

    def __call__(self, table, space, rng):
        if table.generation == self.stop_after:
            raise RuntimeError("stopped on purpose")
        self.seen[table.generation] = table.rows()
        scores = [table.history(g).score.min() for g in range(table.generation + 1)]
        parents = np.arange(len(table.score))
        parents[np.argmax(table.age - np.argsort(scores)[0])] = NEW
        return Decision(parents)


def assert_same_rows(some, others):
    for field in dataclasses.fields(Rows):
        a, b = getattr(some, field.name), getattr(others, field.name)
        pairs = [(a, b)] if isinstance(a, np.ndarray) else [(a[n], b[n]) for n in [*a, *b]]
        for one, other in pairs:
            assert one.dtype == other.dtype, field.name
            assert one.tobytes() == other.tobytes(), field.name


@pytest.mark.parametrize("every", [1, 4])
def test_a_resumed_sweep_sees_the_same_history(tmp_path, every):
    whole = Looking()
    settings = {**SMALL, "checkpoint_every": every}
    expected = sweep(tmp_path / "a", scheduler=whole, **settings).run()
    with pytest.raises(SweepError, match="stopped on purpose"):
        sweep(tmp_path / "b", scheduler=Looking(3), **settings).run()
    again = Looking()
    assert_same_tables(sweep(tmp_path / "b", scheduler=again, **settings).run(), expected)
    assert min(again.seen) < 5
    for generation, rows in again.seen.items():
        assert_same_rows(rows, whole.seen[generation])
    rows, table = whole.seen[5], expected.table
    for name, column in (("generation", rows.generation), ("slot", rows.slot)):
        np.testing.assert_array_equal(column, table[name])
    np.testing.assert_array_equal(rows.score, table["val_loss"])
    np.testing.assert_array_equal(rows.parent, table["parent"])
    np.testing.assert_array_equal(rows.values["log_rate"], table["hyperparams.log_rate"])


def test_a_damaged_table_that_a_scheduler_asks_for_ends_the_sweep_by_its_name(tmp_path):
    with pytest.raises(SweepError, match="stopped on purpose"):
        sweep(tmp_path, scheduler=Looking(4), **SMALL).run()
    (file,) = (tmp_path / "tables").glob("000001-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SweepError, match=r"asks for the table of generation 2.*000001-"):
        sweep(tmp_path, scheduler=Looking(), **SMALL).run()


def columns(generation, slots, score):
    """A table of two populations: the second one's trials each copied the slot before."""
    parents = np.arange(slots)
    parents[slots // 2 + 1 :] -= 1
    trial = np.arange(slots) + 10 * generation
    rate = np.linspace(0.1, 0.9, slots)
    return {
        "trial": trial,
        "born": np.full(slots, generation),
        "parent": np.where(trial % 2, parents, NEW) if generation == 0 else parents,
        "val_loss": np.asarray(score, float),
        "hyperparams.rate": rate,
    }


def two_populations(read):
    space = SearchSpace({"rate": loguniform(1e-3, 1)}, choices={"method": ["a", "b"]})
    return History(np.repeat([0, 1], 4), space, Objectives({"val_loss": -1}), read)


def test_each_population_has_its_own_history_and_a_table_is_read_once():
    asked, scores = [], np.arange(8.0)

    def read(generation):
        asked.append(generation)
        return columns(generation, 8, scores * (generation + 1))

    history = two_populations(read)
    history.tables(0, read(0))
    asked.clear()
    for _ in range(2):
        tables = history.tables(2, columns(2, 8, scores * 3))
        for part, table in zip((slice(0, 4), slice(4, 8)), tables.values(), strict=True):
            np.testing.assert_array_equal(table.history(1).score, -2 * scores[part])
            np.testing.assert_array_equal(table.history(1).history(0).score, -scores[part])
            assert table.history(2) is table
            assert table.earlier(1) is table.history(1)
    assert asked == [1, 0]
    assert tables[1].parent.tolist() == [0, 0, 1, 2]
    before, now = -2 * scores[4:][[0, 0, 1, 2]], -3 * scores[4:]
    np.testing.assert_array_equal(tables[1].improvement(), before - now)
    with pytest.raises(ValueError, match="read-only"):
        tables[0].history(1).score[0] = 0


def test_nothing_is_kept_for_a_scheduler_that_does_not_ask():
    asked = []
    history = two_populations(lambda g: asked.append(g) or columns(g, 8, np.arange(8.0)))
    for generation in range(3):
        tables = history.tables(generation, columns(generation, 8, np.arange(8.0)))
    assert not asked
    tables[0].history(1)
    tables = history.tables(3, columns(3, 8, np.arange(8.0)))
    assert len(tables[0].rows().score) == 16
    assert asked == [1, 0, 2]
    history.forget_after(1)
    tables[0].rows()
    assert asked == [1, 0, 2, 2]


def test_what_nobody_asks_for_any_more_is_forgotten_and_read_again():
    asked = []
    history = two_populations(lambda g: asked.append(g) or columns(g, 8, np.arange(8.0)))
    for generation in range(2 * IDLE):
        tables = history.tables(generation, columns(generation, 8, np.arange(8.0)))
        if generation:
            tables[0].history(generation - 1)
            tables[1].history(0)
    assert asked == [0, 1]  # which were there before the first question
    tables[0].history(1)
    tables[0].history(IDLE + 1)
    assert asked == [0, 1, 1]  # and not IDLE + 1, for which the generation after it asked


def made(generation, score, **more):
    n = len(score)
    ages = np.full(n, generation + 1)
    return Table(generation, np.asarray(score, float), np.arange(n), ages, {}, {}, **more)


def test_rows_of_a_trial_and_of_a_slot():
    tables = []
    for generation in range(3):
        table = made(generation, [generation, 5.0 - generation], earlier=tables.__getitem__)
        tables.append(table)
    rows = tables[2].rows()
    assert rows.generation.tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.of_trial(1).score.tolist() == [5, 4, 3]
    assert rows.of_slot(0).score.tolist() == [0, 1, 2]
    assert tables[2].rows(2).generation.tolist() == [1, 1, 2, 2]
    assert tables[2].improvement().tolist() == [-1, 1]
    assert np.isnan(tables[0].improvement()).all()


def test_what_is_new_or_diverged_has_not_improved():
    before = made(0, [3.0, np.nan, 2.0])
    parents = np.asarray([0, 1, NEW])
    table = made(1, [1.0, 1.0, 1.0], parent=parents, earlier=[before].__getitem__)
    np.testing.assert_array_equal(table.improvement(), [2, np.nan, np.nan])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda table: table.history(4), "from 0 to 3, got 4"),
        (lambda table: table.history(-1), "history: generation"),
        (lambda table: table.history(1), r"Table\(earlier=…\)"),
        (lambda table: table.rows(0), "rows: generations"),
    ],
)
def test_what_is_wrong_is_named(ask, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ask(made(3, [1.0]))

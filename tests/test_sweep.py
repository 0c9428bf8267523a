"""Sweeps in one process: what they compute, what they refuse, and what they survive."""

import dataclasses
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import gradhpo
from gradhpo import checkpoints
from gradhpo.cluster import (
    NEW,
    PBT,
    Decision,
    RandomSearch,
    SearchSpace,
    StorageInUse,
    SuccessiveHalving,
    Sweep,
    SweepError,
    choice,
    columns,
    events,
    executors,
    loguniform,
    shard,
    uniform,
)
from gradhpo.cluster.incarnations import Incarnations, Superseded
from gradhpo.cluster.plan import Rules, first_plan, orders
from gradhpo.cluster.shard import ShardHost
from gradhpo.lock import FolderLock
from gradhpo.parallel import batching, compiled
from tests import file_operations, sweep_problems
from tests.small import OPTIMIZERS
from tests.sweeps import GENERATIONS, SETTINGS, SPACE, assert_same_tables, sweep

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The small sweep, undisturbed."""
    return sweep(tmp_path_factory.mktemp("reference")).run()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The same, undisturbed, with steps in NumPy."""
    with file_operations.numpy_steps():
        return sweep(tmp_path_factory.mktemp("expected")).run()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Its storage after 1 and after 5 generations; to be copied, not used."""
    storages = {}
    for generations in (1, 5):
        storages[generations] = tmp_path_factory.mktemp(f"begun-{generations}")
        with file_operations.numpy_steps():
            sweep(storages[generations], generations=generations).run()
    return storages


@pytest.fixture
def after_1(begun, tmp_path, numpy_steps):
    """A storage of this test's own, as it is after one generation."""
    return shutil.copytree(begun[1], tmp_path, dirs_exist_ok=True)


@pytest.fixture
def after_5(begun, tmp_path, numpy_steps):
    """The same after five."""
    return shutil.copytree(begun[5], tmp_path, dirs_exist_ok=True)


# --- what it computes -------------------------------------------------------------------------


def test_it_tunes(reference):
    best = reference.best
    first = reference.table["val_loss"][: SETTINGS["population"]]
    assert best.score < np.nanmin(first)
    assert best.score == best.metrics["val_loss"]
    weights, lam = best.params, best.hyperparams
    x = np.random.default_rng(0).normal(size=(32, 4)) + 1  # any draw of the same kind
    assert np.mean((x @ weights - 1) ** 2) < 1
    assert 1e-3 <= np.exp(lam["log_rate"]) <= 0.3
    assert (lam["log_decay"] != -3).all()


def test_the_report_counts_one_compile(reference):
    report = reference.report
    assert (report.compiles, report.loads, report.workers_lost) == (1, 0, 0)
    assert report.generations == GENERATIONS
    assert sum(report.startup.values()) <= report.startup_seconds
    names = ["executor", "workers", "problem", "layouts", "tracing", "compiling", "data"]
    assert list(report.startup) == names
    assert f"compiling {report.startup['compiling']:.1f} s" in report.start()


def test_who_copied_whom_is_known(reference):
    table, copies = reference.table, reference.copies
    assert copies
    for copy in copies:
        before = table["generation"] == copy.generation - 1
        now = (table["generation"] == copy.generation) & (table["trial"] == copy.trial)
        source = before & (table["trial"] == copy.source)
        assert now.sum() == source.sum() == 1
        assert table["slot"][source] == table["parent"][now]
        others = table["val_loss"][before]
        assert np.mean(others < table["val_loss"][source]) < 0.34  # it was among the best
    assert len({copy.trial for copy in copies}) == len(copies)
    lineage = reference.best.lineage
    sources = {copy.trial: copy.source for copy in copies}
    assert all(sources[b] == a for a, b in itertools.pairwise(lineage))


LEAST = 10.0
OUTER = {
    "adam": optax.adam(0.1),
    "schedule_free": contrib.schedule_free_sgd(0.1),
    "cocob": contrib.cocob(),
    "madgrad": contrib.madgrad(0.1),
}


def accumulating():
    """A problem with nothing to tune, and Adagrad's first accumulator among its λ."""
    lam = {name: jnp.asarray(5.0) for name in OUTER} | {"sum": jnp.asarray(1.0)}
    return gradhpo.Problem(
        init=lambda key: (jnp.zeros(3), lam),
        train_loss=lambda w, lam, batch: jnp.sum((w - 1) ** 2),
        val_loss=lambda w, lam, batch: jnp.sum((w - 2) ** 2),
        batch=lambda key: (jnp.ones(()), jnp.ones(())),
    )


@pytest.mark.slow
def test_optimizers_start_at_the_hyperparameters_that_were_drawn(tmp_path):
    """In the first generation, and in a later one whose trials are all new."""

    def inner(lam):
        return optax.adagrad(0.1, initial_accumulator_value=lam["sum"])

    outer = optax.multi_transform(OUTER, {name: name for name in OUTER} | {"sum": "adam"})
    kept = {name: uniform(-1, 1) for name in OUTER}
    result = Sweep(
        problem=accumulating(),
        optimizer=gradhpo.FOOptimizer(inner, outer),  # the hypergradient is zero
        space=SearchSpace(hyperparams={**kept, "sum": uniform(LEAST, 100)}),
        population=3,
        generations=2,
        steps_per_generation=1,
        scheduler=RandomSearch(trial_generations=1),
        storage=tmp_path,
        executor="local",
        batching="vmap",
        progress=False,
    ).run()
    first = result.table["hyperparams.sum"]
    assert (first >= LEAST).all()
    assert len(np.unique(first)) == 6
    for name in OUTER:
        drawn = result.table[f"hyperparams.{name}"]
        assert (np.abs(drawn) <= 1).all(), name
        assert len(np.unique(drawn)) == 6, name
    w = 0.1 * 2 / np.sqrt(first + 4)  # one step of Adagrad at the gradient -2
    np.testing.assert_allclose(result.table["val_loss"], 3 * (w - 2) ** 2, rtol=1e-5)


def test_the_winner_can_be_computed_again_alone(reference):
    chex.assert_trees_all_equal(reference.replay(), reference.best.state, strict=True)


def test_perturbed_settings_stay_in_their_space(reference):
    rates = np.exp(reference.table["hyperparams.log_rate"])
    assert ((rates > 1e-3 * (1 - 1e-5)) & (rates < 0.3 * (1 + 1e-5))).all()
    assert len(np.unique(rates)) > SETTINGS["population"]


def test_pandas_gets_the_table(reference):
    frame = reference.to_pandas()
    assert len(frame) == GENERATIONS * SETTINGS["population"]
    assert frame.val_loss.min() == reference.best.score


def test_it_can_be_drawn(reference, tmp_path):
    reference.plot(tmp_path / "new/figure.png")
    assert (tmp_path / "new/figure.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "hyperdistill"])
def test_methods_with_a_state_of_their_own_and_objects_of_a_program(method, tmp_path):
    """Methods given as objects, with an outer rate that is searched where there is one."""
    settings, space = {}, SearchSpace(lr_hyper=loguniform(1e-3, 1e-1))
    changes = {"generations": 3, "population": 4, "shards": 2}
    if method == "greedy":
        outer = sweep_problems.optimizer().outer_optimizer
        settings, space = {"unroll_steps": 2, "outer_optimizer": outer}, SPACE
    if method == "hyperdistill":
        settings = {"T": 4, "distill_data": True}  # with a PRNG key in its state
        changes["scheduler"] = SuccessiveHalving(reduction=2)
    inner = sweep_problems.optimizer().inner_optimizer
    made = OPTIMIZERS[method](inner_optimizer=inner, **settings)
    changes |= {"problem": sweep_problems.problem(), "optimizer": made, "space": space}
    result = sweep(tmp_path / "a", **changes).run()
    assert np.isfinite(result.final["val_loss"]).all()
    if method == "hyperdistill":
        assert len(np.unique(result.table["lr_hyper"])) >= 4
        assert (result.table["parent"][4:] == NEW).any()
        assert result.best.arrays[".metadata['theta']"] != 1  # which new trials get too
    short = {**changes, "generations": 2}
    sweep(tmp_path / "b", **short).run()
    assert_same_tables(sweep(tmp_path / "b", **changes).run(), result)


@pytest.mark.slow
def test_choices_make_populations_of_their_own_each_in_its_own_layout(tmp_path, monkeypatch):
    def prepare(self, layouts, needed):
        return original(self, dict(zip(layouts, ["map", "vmap"], strict=True)), needed)

    original = executors.FleetExecutor.prepare
    monkeypatch.setattr(executors.FleetExecutor, "prepare", prepare)
    compiled.clear()
    space = dataclasses.replace(SPACE, choices={"method": ["first-order", "one-step"]})
    result = sweep(tmp_path, space=space, generations=4, batching="auto", seed=1).run()
    assert result.report.compiles == 2
    table = result.table
    parents, slots = table["parent"], table["slot"]
    copied = (parents >= 0) & (parents != slots)
    assert (parents[copied] // 6 == slots[copied] // 6).all()
    assert (table["variant"] == slots // 6).all()
    assert result.best.choices == {"method": "one-step"}
    assert result._layouts == ["map", "vmap"]
    chex.assert_trees_all_equal(result.replay(), result.best.state, strict=True)


@pytest.mark.slow
def test_data_metric_and_mode(tmp_path):
    def problem(data):
        rows = data["x"]
        return dataclasses.replace(
            sweep_problems.problem(),
            data=lambda key: rows,
            metrics=lambda w, lam, data: {"negative_loss": -sweep_problems._val(w, lam, data)},
        )

    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32) + 1
    changes = {"problem": problem, "data": {"x": x}, "metric": "negative_loss", "mode": "max"}
    result = sweep(tmp_path, generations=3, **changes).run()
    assert result.best.score == np.nanmax(result.table["negative_loss"]) < 0
    with pytest.raises(SweepError, match="its data is"):
        sweep(tmp_path, generations=4, **{**changes, "data": {"x": x + 1}}).run()


@pytest.mark.slow
def test_diverged_trials_are_last_and_replaced(tmp_path):
    space = SearchSpace(hyperparams={"log_rate": uniform(-3, 6)})
    result = sweep(tmp_path, space=space, generations=3, steps_per_generation=60).run()
    table, n = result.table, SETTINGS["population"]
    bad = np.isnan(table["val_loss"][:n])
    assert 2 < bad.sum() < n
    assert (table["trial"][n : 2 * n] != table["trial"][:n])[bad].all()
    assert (table["diverged_at"][:n] > 0)[bad].all()
    assert np.isfinite(result.best.score)


def test_every_trial_diverged(tmp_path, monkeypatch):
    class Diverged(file_operations.Variant):
        def turn(self, state, order):
            state, columns = super().turn(state, order)
            return state, {**columns, "val_loss": np.full(self.slots, np.nan)}

    monkeypatch.setattr(shard, "Variant", Diverged)
    result = sweep(tmp_path, generations=2).run()
    with pytest.raises(SweepError, match="every trial"):
        _ = result.best


def test_a_scheduler_of_ones_own(tmp_path, numpy_steps):
    def worst_half_restarts(table, space, rng):
        del space, rng
        parents = np.arange(len(table.score))
        parents[table.ranking()[len(parents) // 2 :]] = NEW
        return Decision(parents)

    result = sweep(tmp_path, scheduler=worst_half_restarts, generations=3).run()
    assert (result.table["parent"] == NEW).sum() == 12 + 6 + 6

    def broken(table, space, rng):
        del table, space, rng
        raise ZeroDivisionError("on purpose")

    with pytest.raises(SweepError, match=r"scheduler failed after generation 0.*on purpose"):
        sweep(tmp_path / "b", scheduler=broken).run()


@pytest.mark.slow
def test_auto_batching_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "MODELLED", ())  # as on a GPU
    changes = {
        "problem": "tests.wide_problems:problem",
        "optimizer": "tests.wide_problems:optimizer",
        "space": SearchSpace({"log_decay": loguniform(1e-4, 1, stored="log")}),
        "batching": "auto",
        "generations": 2,
        "population": 4,
        "shards": 1,
    }
    result = sweep(tmp_path, **changes).run()
    assert result.report.calibration_compiles > 1
    kept = json.loads((tmp_path / "programs.json").read_text())[0]["batching"]
    again = sweep(tmp_path, **{**changes, "generations": 3}).run()
    assert again.report.calibration_compiles == 0
    assert json.loads((tmp_path / "programs.json").read_text())[0]["batching"] == kept


@pytest.mark.slow
def test_a_mesh_of_devices(tmp_path, reference):
    result = sweep(tmp_path, mesh={"trial": 3, "data": 2}, batching="shard/map").run()
    for name in ("val_loss", "hyperparams.log_rate"):
        np.testing.assert_allclose(result.table[name], reference.table[name], rtol=2e-3)
    np.testing.assert_array_equal(result.table["trial"], reference.table["trial"])


# --- stopping and going on --------------------------------------------------------------------


def goes_on(storage, first, undisturbed):
    """Run some generations, then the others, then what is left to do: nothing."""
    sweep(storage, generations=first).run()
    result = sweep(storage).run()
    assert_same_tables(result, undisturbed)
    assert result.report.generations == GENERATIONS - first
    done = sweep(storage).run()
    assert done.report is None
    assert_same_tables(done, undisturbed)


def test_going_on_gives_the_same(tmp_path, reference):
    goes_on(tmp_path, 4, reference)


@pytest.mark.parametrize("first", [1, GENERATIONS - 1])
def test_going_on_at_either_end_gives_the_same(tmp_path, expected, numpy_steps, first):
    goes_on(tmp_path, first, expected)


def test_only_two_generations_and_the_best_are_kept(tmp_path, numpy_steps):
    made = sweep(tmp_path, scheduler=RandomSearch(trial_generations=2))
    result = made.run()
    there = {path.parent.name for path in (tmp_path / "checkpoints").glob("*/*.arrays")}
    assert there <= {f"{g:06d}" for g in (GENERATIONS - 1, GENERATIONS - 2, result.best.generation)}
    assert len(list((tmp_path / "checkpoints").glob("*/*.arrays"))) <= 9
    assert result.best.score == np.nanmin(result.table["val_loss"])


def test_the_callback_sees_saved_generations(tmp_path, numpy_steps):
    seen = []

    def callback(generation, table):
        assert (tmp_path / "journal.jsonl").read_bytes().count(b"\n") == generation
        seen.append((generation, float(np.nanmin(table["val_loss"]))))

    result = sweep(tmp_path, generations=3).run(callback)
    assert [generation for generation, _ in seen] == [1, 2, 3]
    assert min(score for _, score in seen) == result.best.score


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_generation_and_says_how_to_go_on(
    tmp_path, expected, numpy_steps, number, capfd
):
    made = sweep(tmp_path, progress=None)

    def interrupt(generation, table):
        del table
        if generation == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = made.run(interrupt)
    assert result.generations == 4  # it had been computed when the third was saved
    assert signal.getsignal(number) == before
    shown = capfd.readouterr().err
    assert "finishing this generation" in shown
    assert f"gradhpo resume {tmp_path}" in shown
    assert "\r" not in shown
    assert_same_tables(sweep(tmp_path).run(), expected)


# --- damage -------------------------------------------------------------------------------------


def flip(path, share=0.5):
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "what"),
    list(itertools.product([flip, cut, Path.unlink], ["checkpoint", "table", "line"])),
)
def test_the_generation_before_is_used(after_5, expected, damage, what):
    tmp_path = after_5
    if what == "line":
        path = tmp_path / "journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        last = tmp_path / "last"
        last.write_bytes(lines[-1])
        damage(last)
        path.write_bytes(b"".join(lines[:-1]) + (last.read_bytes() if last.exists() else b""))
    elif what == "checkpoint":
        damage(next((tmp_path / "checkpoints/000004").glob("shard-0002*")))
    else:
        damage(next((tmp_path / "tables").glob("000004*")))
    made = sweep(tmp_path)
    result = made.run()
    assert result.report.generations == GENERATIONS - 4  # one more than without damage
    assert_same_tables(result, expected)
    told = [event for event in made.events if isinstance(event, events.Damaged)]
    assert told or (what == "line" and damage is Path.unlink)


def test_a_damaged_line_inside_the_journal_costs_nothing(after_5, expected):
    path = after_5 / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    changed = bytearray(lines[1])
    changed[40] ^= 1
    path.write_bytes(lines[0] + changed + b"".join(lines[2:]))
    result = sweep(after_5).run()
    assert result.report.generations == GENERATIONS - 5
    assert_same_tables(result, expected)


def test_two_damaged_generations_stop_with_both_names(after_5):
    tmp_path = after_5
    for generation in ("000003", "000004"):
        next((tmp_path / "checkpoints" / generation).glob("shard-0002*")).unlink()
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(SweepError, match=r"000004/shard-0002.*000003/shard-0002"):
        sweep(tmp_path).run()
    assert (tmp_path / "journal.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_winner_survives_the_loss_of_its_checkpoint(tmp_path):
    made = sweep(tmp_path, scheduler=RandomSearch(trial_generations=2), generations=6)
    result = made.run()
    found = result._winner().checkpoint
    expected = result.best.state
    flip(tmp_path / found.file)
    again = made.result()
    with pytest.raises(gradhpo.cluster.DamagedFile, match="checksum"):
        _ = again.best
    chex.assert_trees_all_equal(again.replay(), expected, strict=True)


# --- SIGKILL of the driver ----------------------------------------------------------------------

DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
os.environ["XLA_FLAGS"] = {flags!r}
from tests.sweeps import sweep
sweep({storage!r}, generations=60, checkpoint_every={every}).run(
    lambda g, table: print(g, flush=True)
)
"""


def driver(storage, every):
    flags = os.environ["XLA_FLAGS"]
    code = DRIVER.format(root=str(ROOT), storage=str(storage), flags=flags, every=every)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_sigkill_of_the_driver_at_random_instants(tmp_path_factory, tmp_path):
    """Two kills: while it starts, and while it runs, at an instant within a generation."""
    every = 3
    rng = np.random.default_rng(every)
    undisturbed = sweep(tmp_path_factory.mktemp("undisturbed"), generations=60).run()
    for kill in range(2):
        with driver(tmp_path, every) as process:
            lines = []
            if kill:
                lines.append(process.stdout.readline())  # a generation is done
                assert lines[0].strip(), process.stderr.read()
                time.sleep(rng.uniform(0, 0.06))
            else:
                time.sleep(rng.uniform(0.5, 4))
            process.kill()
            lines += process.stdout.read().split()
        done = [int(line) for line in lines if line.strip()]
        journal = tmp_path / "journal.jsonl"
        whole = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        # What was said to be done is in the journal; at most the generation in flight is lost.
        assert whole >= max(done, default=0)
    result = sweep(tmp_path, generations=60).run()
    assert_same_tables(result, undisturbed)


def test_a_worker_that_was_given_up_cannot_commit(tmp_path, numpy_steps):
    """The order was sent before its shard got a new owner, and executed after."""
    made = sweep(tmp_path, generations=1)
    made.run()
    host, numbers = ShardHost(made._spec()), Incarnations(tmp_path)
    host.prepare(0, "map")
    old, new = numbers.new(), numbers.new()
    rules = Rules(made.identity.scheduler, made.identity.space, 0, made.identity.objectives)
    order = orders(first_plan(made.layout, rules), [None] * 4, made.layout, made.identity.space)[0]
    before = contents(tmp_path / "checkpoints")
    numbers.own({0: new})
    with pytest.raises(Superseded):
        host.run(order, old)
    assert contents(tmp_path / "checkpoints") == before
    host.run(order, new)
    assert host.checkpoint(order.shard, order.generation).file not in before
    host.close()


# --- refusals -----------------------------------------------------------------------------------


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"scheduler": PBT(quantile=0.2)}, "scheduler"),
        ({"space": SearchSpace({"log_rate": uniform(-3, -2)})}, "space"),
        ({"population": 16}, "population"),
        ({"shards": 2}, "shards"),
        ({"steps_per_generation": 6}, "steps_per_generation"),
        ({"batching": "vmap"}, "batching"),
        ({"optimizer": sweep_problems.optimizer()}, "optimizer"),
    ],
)
def test_another_run_on_a_storage_is_refused_and_changes_nothing(after_1, changes, name):
    before = contents(after_1)
    with pytest.raises(SweepError, match=f"holds another run: its {name} is"):
        sweep(after_1, **changes).run()
    assert contents(after_1) == before


def test_settings_that_were_refused_leave_the_storage_to_others(tmp_path):
    wrong = SearchSpace(SPACE.hyperparams, lr_hyper=0.1)
    with pytest.raises(ValueError, match="lr_hyper is given, and the optimizer has an outer_opt"):
        sweep(tmp_path, space=wrong).run()
    assert sweep(tmp_path, generations=1).run().generations == 1
    with pytest.raises(SweepError, match="holds another run: its space is"):
        sweep(tmp_path, space=wrong).run()


def test_a_second_driver_is_refused(after_1):
    lock = FolderLock(after_1, "storage", "sweep")
    with pytest.raises(StorageInUse, match=f"process {os.getpid()}"):
        sweep(after_1).run()
    lock.release()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": "tests.sweep_problems"}, "problem must be"),
        ({"problem": 3}, "problem must be"),
        ({"optimizer": "a b:c"}, "optimizer must be"),
        ({"space": {}}, "space must be"),
        ({"population": 0}, "population"),
        ({"generations": 1.5}, "generations"),
        ({"steps_per_generation": 0}, "steps_per_generation"),
        ({"scheduler": PBT}, "scheduler must be"),
        ({"mode": "least"}, "mode"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"shards": 5}, "shards must divide"),
        ({"mesh": {"model": 2}}, "mesh must be"),
        ({"mesh": {"trial": 2}}, "do not divide over trial=2"),
        ({"workers": 0}, "workers"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"executor": "slurm"}, "executor"),
        ({"deadline": 0}, "deadline"),
        ({"resources": {"GPU": 1}}, "write num_gpus"),
        ({"resources": {"num_gpus": -1}}, "num_gpus"),
        ({"processes": 2}, "processes"),
        ({"processes": 2, "executor": "ray", "batching": "auto"}, 'batching other than "auto"'),
        ({"placement": "NEAR"}, "placement must be one of"),
        ({"env": 3}, "env must be a dictionary"),
        ({"resources": [1]}, "resources must be a dictionary"),
        ({"space": dataclasses.replace(SPACE, choices={"a": list(range(5))})}, "multiple of the 5"),
    ],
)
def test_wrong_arguments_are_named_before_anything_starts(tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sweep(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": SearchSpace({"rate": uniform(0, 1)})}, "'rate'; the problem's .*'log_rate'"),
        ({"space": SearchSpace(lr_hyper=0.1)}, "lr_hyper is given"),
        ({"space": dataclasses.replace(SPACE, choices={"depth": [1]})}, "choice 'depth'"),
        ({"problem": "tests.sweep_problems:nothing"}, "has no 'nothing'"),
        ({"problem": "tests.no_such_module:problem"}, "no_such_module"),
        ({"problem": "tests.sweep_problems:optimizer"}, "must return a Problem"),
        ({"metric": "accuracy"}, "'accuracy' is not in the table.*test_loss"),
        ({"data": {"x": np.zeros(2)}}, "data is given"),
    ],
)
def test_what_a_problem_lacks_is_said(tmp_path, changes, message):
    with pytest.raises(Exception, match=message):
        sweep(tmp_path, **changes).run()


def test_a_storage_that_cannot_be_written_or_holds_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(SweepError, match=r"holds no sweep.*thesis.txt"):
        sweep(tmp_path).run()
    with pytest.raises(OSError, match="cannot be written"):
        sweep("/proc/no/such").run()


def test_lr_hyper_is_asked_for(tmp_path):
    made = gradhpo.FOOptimizer(sweep_problems.optimizer().inner_optimizer)
    with pytest.raises(ValueError, match="lr_hyper"):
        sweep(tmp_path, optimizer=made).run()


def test_metrics_may_not_take_the_tables_own_names(tmp_path):
    taken = ["trial", "val_loss", "generation", "hyperparams.x", "a|b"]
    assert not any(map(columns.is_free, taken))
    assert columns.is_free("test_loss")
    made = dataclasses.replace(
        sweep_problems.problem(), metrics=lambda w, lam, data: {taken[0]: w.sum()}
    )
    with pytest.raises(ValueError, match="must return scalars, under names"):
        sweep(tmp_path, problem=made).run()


def test_another_number_of_workers_goes_on_with_the_same_shards(tmp_path, numpy_steps):
    first = sweep(tmp_path, shards=None, workers=1, generations=1)
    first.run()
    second = sweep(tmp_path, shards=None, workers=3, generations=2)
    assert second.layout == first.layout
    assert second.run().generations == 2


@pytest.mark.parametrize("content", ["{", None])
def test_damaged_incarnations_cost_nothing(after_5, expected, content):
    path = after_5 / "incarnations.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert_same_tables(sweep(after_5).run(), expected)


def test_an_error_of_the_problem_is_not_taken_for_the_storages(tmp_path):
    def opens_a_file():
        return (tmp_path / "no such file").read_text()

    with pytest.raises(FileNotFoundError, match="no such file"):
        sweep(tmp_path / "run", problem=opens_a_file).run()


def test_a_scheduler_cannot_change_the_table(tmp_path, numpy_steps):
    def renumbers(table, space, rng):
        table.trial[:] = 7

    with pytest.raises(SweepError, match="read-only"):
        sweep(tmp_path, scheduler=renumbers).run()


def test_the_best_is_there_when_the_last_line_is_not(tmp_path, numpy_steps):
    """Generation by generation: a new best, and then its line is cut."""
    for generations in range(2, GENERATIONS):
        made = sweep(tmp_path, generations=generations)
        made.run()
        path = tmp_path / "journal.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        assert np.isfinite(made.result().best.score)
        path.write_bytes(whole)


@pytest.mark.slow
def test_a_host_that_is_done_is_forgotten(tmp_path):
    def count():
        gc.collect()
        return sum(isinstance(x, ShardHost) for x in gc.get_objects())

    before = count()
    sweep(tmp_path, generations=1).run()
    assert count() == before


def test_it_runs_in_another_thread(tmp_path, reference):
    results = []
    thread = threading.Thread(target=lambda: results.append(sweep(tmp_path).run()))
    thread.start()
    thread.join()
    assert_same_tables(results[0], reference)


@pytest.mark.slow
def test_a_full_disk_stops_with_a_clear_error_and_goes_on(tmp_path, reference, monkeypatch):
    """A file system of the size of the sweep's own files, then a larger one."""
    small = tmp_path / "disk"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a file system")
    try:
        filler = small / ".filler"
        filler.write_bytes(b"x" * 220_000)
        with pytest.raises(SweepError, match="No space left") as caught:
            sweep(small / "run").run()
        assert str(small / "run") in str(caught.value)
        assert not list((small / "run").rglob("*.tmp"))
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        assert_same_tables(sweep(small / "run").run(), reference)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_checkpoints_name_only_plain_arrays(after_1):
    files = list(after_1.rglob("*.arrays"))
    assert files
    for path in files:
        assert all(array.dtype.kind in "biuf" for array in checkpoints.read(path)[0].values())
    assert choice([1, 2]).describe() == {"choice": [1.0, 2.0]}
    assert checkpoints.find(after_1, "tables/000000") is not None

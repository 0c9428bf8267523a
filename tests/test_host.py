"""Host data at every door: which pairs a step takes, what resumes, what is refused."""

import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from gradhpo.cluster import PBT, SearchSpace, SuccessiveHalving, Sweep, trial_key, uniform
from gradhpo.parallel import Population, data_parallel, make_mesh
from gradhpo.timetable import Timetable
from tests import host_problems, pages
from tests.host_problems import ROWS, SOURCES, drawn, pair, problem, shuffled
from tests.problems import assert_close, assert_same_bits
from tests.quick import slow_but
from tests.small import BATCH, build, start, train_loss, val_loss
from tests.sweeps import assert_same_tables

KEY = jax.random.key(4)
KEYS = jax.random.split(KEY, 3)
ONE_STEP, _ = build("one-step", outer=True)
HYPERDISTILL, _ = build("hyperdistill", outer=True, T=4, estimation_period=2)
REPTILE = {"episode_length": 4, "lr_reptile": 0.5}
CASES = [*((name, ONE_STEP, {}) for name in SOURCES), ("start", HYPERDISTILL, REPTILE)]
SWEPT = ["start", "of none", "loader"]  # a stream a trial, one for all, one with a state
LEFT = {"executor": "local", "progress": False, "seed": 3, "batching": "map"}


def generations(population, state, keys, n, steps):
    """The state after n generations, and all rows."""
    rows = []
    for _ in range(n):
        state, row = population.run(state, steps, keys)
        rows.append(row)
    return state, {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def counting(read, source=drawn):
    """A source that writes down the numbers of the pairs that it gives."""

    def pairs(rng, start):
        for number, made in zip(itertools.count(start), source(rng, start), strict=False):
            read.append(number)
            yield made

    return pairs


# --- which pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "optimizer", "episodes"),
    slow_but(CASES, compiler=[CASES[-1]]),
)
def test_a_trial_takes_the_same_pairs_at_every_door(name, optimizer, episodes, tmp_path):
    key = trial_key(3, 0)
    solution = gradhpo.solve(problem(name), optimizer, 18, key, **episodes)
    trials = Population(problem(name), optimizer, 1, batching="map", **episodes)
    _, rows = generations(trials, trials.init(key[None]), key[None], 3, 6)
    for metric in gradhpo.state.METRICS:
        assert_same_bits(rows[metric][:, 0], solution.metrics[metric])
    if name not in SWEPT:
        return
    result = Sweep(
        problem(name), optimizer, SearchSpace(), population=1, generations=3,
        steps_per_generation=6, storage=tmp_path, **episodes, **LEFT,
    ).run()  # fmt: skip
    for metric in (*gradhpo.state.METRICS, "first"):
        of_trial = {**solution.metrics, **solution.evals}[metric][-1]
        np.testing.assert_array_equal(result.table[metric][-1], of_trial)


@pytest.mark.parametrize("name", ["start", "of none"])
@pytest.mark.slow
def test_runs_of_a_batch_and_slots_take_what_they_take_alone(name):
    together = gradhpo.solve(problem(name), ONE_STEP, 9, KEYS)
    slots = Population(problem(name), ONE_STEP, 3, batching="map")
    _, rows = slots.run(slots.init(KEYS), 9, KEYS)
    for i, key in enumerate(KEYS):
        alone = gradhpo.solve(problem(name), ONE_STEP, 9, key).metrics["train_loss"]
        assert_close(together.metrics["train_loss"][:, i], alone, rtol=1e-5)
        assert_close(rows["train_loss"][:, i], alone, rtol=1e-5)


def test_a_shared_stream_is_read_once_for_all_slots():
    read = []

    def pairs():
        return counting(read)(np.random.default_rng(0), 0)

    given = dataclasses.replace(problem("start"), batches=pairs)
    trials = Population(given, ONE_STEP, 3, batching="vmap")
    state, _ = trials.run(trials.init(KEYS), 5, KEYS)
    trials.run(state, 5, KEYS)
    assert read[:1] + read[1:11] in ([0, *range(10)], list(range(11)))  # one to see its shapes
    assert set(read) <= set(range(200))


@pytest.mark.parametrize(("name", "layout"), [("start", "map"), ("of none", "vmap")])
@pytest.mark.slow
def test_slots_of_different_ages_keep_their_own_time(name, layout):
    trials = Population(problem(name), HYPERDISTILL, 3, batching=layout, episode_length=4)
    first = trials.init(KEYS)
    older, _ = trials.run(first, 7, KEYS)
    mixed = jax.tree.map(lambda a, b: a.at[2:].set(b[2:]), older, first)
    state, _ = trials.run(mixed, 7, KEYS)  # the same program
    for slot, steps in ((0, 14), (2, 7)):
        alone = gradhpo.solve(problem(name), HYPERDISTILL, steps, KEYS[slot], episode_length=4)
        found = jax.tree.map(lambda x: x[slot], jax.device_get(state))  # noqa: B023
        assert found.metadata["trial_step"] == steps
        assert_close(found.params, alone.state.params, rtol=1e-5)
        assert_close(found.metadata["theta"], alone.state.metadata["theta"], rtol=1e-4)


def test_a_generation_that_is_run_again_gives_the_same_bits():
    trials = Population(problem("function"), ONE_STEP, 3, batching="vmap")
    state, _ = trials.run(trials.init(KEYS), 4, KEYS)
    assert_same_bits(trials.run(state, 7, KEYS), trials.run(state, 7, KEYS))


def test_a_slot_that_diverges_does_not_disturb_the_others():
    def loss(w, lam, batch):
        return train_loss(w, lam, batch[:2]) * batch[2]

    def val(w, lam, batch):
        return val_loss(w, lam, batch[:2])

    def pairs(rng):
        bad = int(rng.integers(2, 30))
        for step in itertools.count():
            factor = np.float32(np.nan if step >= bad else 1)
            yield (*pair(step)[0], factor), (*BATCH, np.float32(1))

    given = gradhpo.Problem(start, loss, val, batches=pairs)
    trials = Population(given, ONE_STEP, 3, batching="vmap")
    bad = [int(np.random.default_rng(np.asarray(k)).integers(2, 30)) for k in _data(KEYS)]
    state, rows = generations(trials, trials.init(KEYS), KEYS, 4, 10)
    np.testing.assert_array_equal(state.metadata["diverged_at"], np.array(bad) + 1)
    np.testing.assert_array_equal(np.isfinite(rows["train_loss"]).sum(0), bad)


def _data(keys):
    return np.asarray(jax.random.key_data(keys))


@pytest.mark.parametrize(("name", "layout"), [("start", "shard/map"), ("list", "shard/vmap")])
@pytest.mark.slow
def test_divided_over_a_mesh(name, layout):
    keys = jax.random.split(KEY, 4)
    mesh = make_mesh(trial=2, data=1, devices=jax.devices()[:2])
    apart = Population(problem(name), HYPERDISTILL, 4, mesh, layout)
    alone = Population(problem(name), HYPERDISTILL, 4, batching=layout.removeprefix("shard/"))
    found, expected = (p.run(p.init(keys), 6, keys)[1]["val_loss"] for p in (apart, alone))
    assert_close(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_batches_of_slots_are_divided_too():
    keys = jax.random.split(KEY, 4)
    mesh = make_mesh(trial=2, data=2, devices=jax.devices()[:4])
    both = Population(problem("start"), data_parallel(ONE_STEP, mesh), 4, batching="shard/map")
    alone = Population(problem("start"), ONE_STEP, 4, batching="map")
    found, expected = (p.run(p.init(keys), 6, keys)[1]["val_loss"] for p in (both, alone))
    assert_close(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_lists_and_tuples_are_programs_of_their_own():
    def lists(rng, start):
        return ([list(train), val] for train, val in drawn(rng, start))

    rows = []
    for batches in (drawn, lists, drawn):
        given = dataclasses.replace(problem(), batches=batches)
        trials = Population(given, ONE_STEP, 3, batching="map")
        rows.append(trials.run(trials.init(KEYS), 3, KEYS)[1])
    assert_same_bits(rows[0], rows[1])
    assert_same_bits(rows[0], rows[2])


@pytest.mark.slow
def test_the_first_pair_is_remembered_and_keys_are_typed():
    """HyperDistill's distilled batch starts from the slot's own first pair."""

    def noisy(w, lam, batch):
        x, y, key = batch
        return train_loss(w, lam, (x + 0.1 * jax.random.normal(key, x.shape), y))

    def pairs(rng):
        for i in itertools.count(int(rng.integers(100))):
            yield (*pair(i)[0], jax.random.key(i)), pair(i)[1]

    given = gradhpo.Problem(start, noisy, val_loss, batches=pairs)
    trials = Population(given, ONE_STEP, 3, batching="map")
    _, rows = trials.run(trials.init(KEYS), 4, KEYS)
    alone = gradhpo.solve(given, ONE_STEP, 4, KEYS[1])
    assert_same_bits(rows["train_loss"][:, 1], alone.metrics["train_loss"])

    remembering, _ = build("hyperdistill", outer=True, T=4, distill_data=True)
    trials = Population(problem("start"), remembering, 3, batching="map")
    state = trials.init(KEYS)
    alone = gradhpo.solve(problem("start"), remembering, 4, KEYS[1])
    np.testing.assert_array_equal(
        state.metadata["d_star"][0][1], next(drawn(np.random.default_rng(_data(KEYS)[1]), 0))[0][0]
    )
    _, rows = trials.run(state, 4, KEYS)
    assert_same_bits(rows["train_loss"][:, 1], alone.metrics["train_loss"])


@pytest.mark.slow
def test_layouts_programs_and_fit_on_host_data():
    trials = Population(problem("start"), ONE_STEP, 3)
    state = trials.init(KEYS)
    assert trials.resolve(state) in ("map", "vmap")
    blob = trials.compile(state, 5).serialize()
    again = Population(problem("start"), ONE_STEP, 3, batching=trials.batching)
    again.load(blob, again.init(KEYS), 5)
    assert_same_bits(again.run(state, 5, KEYS)[1], trials.run(state, 5, KEYS)[1])
    fitting = Population(problem("start"), ONE_STEP, "fit", batching="vmap", memory=2**20)
    assert fitting.slots > 1
    state, keys = fitting.init(KEY), jax.random.split(KEY, fitting.slots)
    assert np.isfinite(fitting.run(state, 3, keys)[1]["val_loss"]).all()


@pytest.mark.slow
def test_a_population_calibrates_on_the_pairs_that_come_next():
    trials = Population(problem("start"), HYPERDISTILL, 3, batching="map")
    state = trials.init(KEYS)
    theta = trials.calibrate(state, KEYS).metadata["theta"]
    after, _ = trials.run(state, 1, KEYS)  # calibrates on the same pairs
    assert_same_bits(theta, after.metadata["theta"])
    assert set(np.asarray(theta).tolist()) != {1.0}


# --- what resumes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(SOURCES, "list"))
def test_solve_resumes_to_the_same_bits(name):
    whole = gradhpo.solve(problem(name), HYPERDISTILL, 40, KEY, episode_length=4)
    part = gradhpo.solve(problem(name), HYPERDISTILL, 14, KEY, episode_length=4)
    gone_on = gradhpo.solve(problem(name), HYPERDISTILL, 40, KEY, episode_length=4, resume=part)
    assert_same_bits(gone_on.state, whole.state)
    assert_same_bits(gone_on.metrics, whole.metrics)


@pytest.mark.slow
def test_an_iterator_that_refuses_its_state_is_read_again(monkeypatch):
    whole = gradhpo.solve(problem("loader"), ONE_STEP, 20, KEY)
    part = gradhpo.solve(problem("loader"), ONE_STEP, 7, KEY)
    monkeypatch.setattr(host_problems.Rows, "__repr__", lambda self: "another name")
    with pytest.warns(RuntimeWarning, match=r"refuses the state .* 7 pairs before are read again"):
        gone_on = gradhpo.solve(problem("loader"), ONE_STEP, 20, KEY, resume=part)
    assert_same_bits(gone_on.state, whole.state)


def test_what_can_begin_in_the_middle_does_not_read_what_came_before():
    read = []
    given = dataclasses.replace(problem("start"), batches=counting(read))
    part = gradhpo.solve(given, HYPERDISTILL, 14, KEY, episode_length=4)
    assert read == list(range(14 + 2 * 4))  # θ at 0 and 8 took four each
    gradhpo.solve(given, HYPERDISTILL, 30, KEY, episode_length=4, resume=part)
    assert read[22:] == list(range(22, 30 + 4 * 4))

    asked = []

    def slow(i):
        asked.append(int(i))
        return pair(i)

    def dataset():
        return host_problems.grain.MapDataset.range(100).map(slow).to_iter_dataset()

    given = dataclasses.replace(given, batches=dataset())
    part = gradhpo.solve(given, ONE_STEP, 14, KEY)
    del asked[:]
    gradhpo.solve(given, ONE_STEP, 20, KEY, resume=part)
    # Grain reads some ahead in threads of its own; what came before 14 it does not touch again.
    assert min(asked) == 14


@pytest.mark.parametrize("make", [host_problems.dataset, host_problems.loader])
@pytest.mark.slow
def test_an_iterator_with_a_state_goes_on_in_another_process(make):
    """Stopped in the middle of a stack, and its place put into a new iterator."""
    given = [dataclasses.replace(problem(), batches=iter(make())) for _ in range(3)]
    whole = gradhpo.solve(given[0], ONE_STEP, 40, KEY)
    stopped = gradhpo.solve(
        given[1], ONE_STEP, 40, KEY, eval_every=3, callback=lambda steps, state: steps >= 15
    )
    assert stopped.steps == 15
    assert_same_bits(gradhpo.solve(given[2], ONE_STEP, 40, KEY, resume=stopped).state, whole.state)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("dataset", SuccessiveHalving(reduction=2)), ("function", PBT(quantile=0.5))],
)
@pytest.mark.slow
def test_a_sweep_goes_on_with_the_same_bits(name, scheduler, tmp_path):
    """Trials are copied and begun anew, so that slots differ in stream and age."""
    settings = {
        "problem": problem(name), "optimizer": HYPERDISTILL, "population": 4, "shards": 2,
        "steps_per_generation": 5, **REPTILE, "scheduler": scheduler,
        "space": SearchSpace({"decay": uniform(-4.0, -2.0)}), **LEFT,
    }  # fmt: skip
    whole = Sweep(generations=5, storage=tmp_path / "whole", **settings).run()
    for generations in (2, 5):
        parts = Sweep(generations=generations, storage=tmp_path / "parts", **settings).run()
    assert_same_tables(parts, whole)
    assert (whole.table["parent"] != whole.table["slot"]).sum() > 4
    assert_same_bits(whole.replay(), whole.best.state)


@pytest.mark.slow
def test_a_sweep_on_grain_that_is_killed_gives_the_same_bits(tmp_path):
    code = (
        "import sys\n"
        "from tests.test_host import killed_sweep\n"
        "killed_sweep(sys.argv[1]).run(callback=lambda g, table: print(g, flush=True))\n"
    )
    whole = killed_sweep(tmp_path / "whole").run()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "killed")], stdout=subprocess.PIPE,
        text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    with child.stdout as lines:
        for line in lines:
            if int(line) == 3:
                os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert_same_tables(killed_sweep(tmp_path / "killed").run(), whole)


def killed_sweep(storage):
    """A sweep on a Grain pipeline, by reference."""
    return Sweep(
        "tests.host_problems:problem", HYPERDISTILL,
        SearchSpace({"decay": uniform(-4.0, -2.0)}, choices={"batches": ["dataset", "loader"]}),
        population=4, generations=5, steps_per_generation=5, storage=storage,
        scheduler=PBT(quantile=0.5), **LEFT,
    )  # fmt: skip


# --- while the device computes --------------------------------------------------------------------


@pytest.mark.parametrize("door", ["solve", "population"])
def test_the_next_pairs_are_read_while_the_device_computes(door):
    """A step waits, in the middle of its program, until a later pair has been read."""
    later = threading.Event()

    def wait(x):
        if not later.wait(60):
            raise RuntimeError("nothing was read while a step computed")
        return x

    def loss(w, lam, batch):
        x, y = batch
        x = jax.pure_callback(wait, x, x, vmap_method="sequential")
        return train_loss(w, lam, (x, y))

    def pairs():
        for i in itertools.count():
            if i == 1:
                later.set()
            yield pair(i)

    given = gradhpo.Problem(start, loss, val_loss, batches=pairs)
    optimizer, _ = build("first-order", outer=True)
    if door == "solve":
        later.clear()
        assert gradhpo.solve(given, optimizer, 4, KEY).steps == 4
        return
    trials = Population(given, optimizer, 2, batching="map")
    state = trials.init(KEYS[:2])
    later.clear()
    trials.run(state, 4, KEYS[:2])


# --- the page -------------------------------------------------------------------------------------

RECIPES = ["shuffled", "seekable", "shared", "dataset", "own_dataset", "by_torch"]


@functools.cache
def recipes():
    """What the page's code defines."""
    return pages.run("host-data")


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(RECIPES, "shared"))
def test_the_recipes_of_the_page(name):
    if name == "by_torch":
        pytest.importorskip("torch")
    given = gradhpo.Problem(start, train_loss, val_loss, batches=recipes()[name])
    whole = gradhpo.solve(given, ONE_STEP, 20, KEY)
    part = gradhpo.solve(given, ONE_STEP, 9, KEY)
    assert_same_bits(gradhpo.solve(given, ONE_STEP, 20, KEY, resume=part).state, whole.state)
    if "dataset" in name:  # which read far ahead for every slot
        return
    trials = Population(given, ONE_STEP, 3, batching="map")
    _, rows = trials.run(trials.init(KEYS), 4, KEYS)
    alone = gradhpo.solve(given, ONE_STEP, 4, KEYS[2])
    assert_same_bits(rows["train_loss"][:, 2], alone.metrics["train_loss"])


# --- PyTorch --------------------------------------------------------------------------------------


def test_a_torch_loader():
    torch = pytest.importorskip("torch")
    tensors = [torch.as_tensor(np.asarray(x)) for x in BATCH]
    validation = tuple(np.asarray(x) for x in pair(0)[1])

    def pairs(rng):
        order = torch.Generator().manual_seed(int(rng.integers(2**31)))
        dataset = torch.utils.data.TensorDataset(*tensors)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=5, shuffle=True, drop_last=True, generator=order
        )
        while True:
            for batch in loader:
                yield batch, validation

    given = gradhpo.Problem(start, train_loss, val_loss, batches=pairs)
    whole = gradhpo.solve(given, ONE_STEP, 12, KEY)
    part = gradhpo.solve(given, ONE_STEP, 5, KEY)
    assert_same_bits(gradhpo.solve(given, ONE_STEP, 12, KEY, resume=part).state, whole.state)
    trials = Population(given, ONE_STEP, 1, batching="map")
    _, rows = trials.run(trials.init(KEY[None]), 12, KEY[None])
    assert_same_bits(rows["train_loss"][:, 0], whole.metrics["train_loss"])

    class Once:
        """A loader that shuffles by PyTorch's global generator, and gives other pairs each time."""

        def __iter__(self):
            dataset = torch.utils.data.TensorDataset(*tensors)
            loader = torch.utils.data.DataLoader(dataset, 5, shuffle=True, drop_last=True)
            return ((batch, validation) for _ in range(99) for batch in loader)

    given = dataclasses.replace(given, batches=Once())
    part = gradhpo.solve(given, ONE_STEP, 5, KEY)
    with pytest.raises(ValueError, match="does not give the pairs again that it gave before"):
        gradhpo.solve(given, ONE_STEP, 12, KEY, resume=part)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.slow
def test_iterators_go_on_in_a_population_and_nowhere_else(tmp_path):
    given = dataclasses.replace(problem(), batches=(pair(i) for i in range(100)))
    trials = Population(given, ONE_STEP, 2, batching="vmap")
    state = trials.init(KEYS[:2])
    later, rows = generations(trials, state, KEYS[:2], 2, 6)
    alone = gradhpo.solve(problem("list"), ONE_STEP, 12, KEYS[0])
    assert_close(rows["train_loss"][:, 0], alone.metrics["train_loss"], rtol=1e-5)
    with pytest.raises(ValueError, match="an iterator that stands before pair 12, and pair 0 is"):
        trials.run(state, 6, KEYS[:2])
    trials.run(later, 6, KEYS[:2])
    for batches in (
        iter([pair(0)]),
        shuffled(np.random.default_rng(0)),
        iter(SOURCES["dataset"]()),
    ):
        with pytest.raises(ValueError, match=r"an iterator .* which a sweep cannot read again"):
            Sweep(
                dataclasses.replace(given, batches=batches), ONE_STEP, SearchSpace(), 1, 1, 1,
                tmp_path, executor="local",
            )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (3, "Problem.batches must be an iterable of .* got int"),
        (lambda a, b: [], r"got a function of \(a, b\)"),
        (lambda *, rng: [], r"got a function of \(rng\)"),
    ],
)
def test_wrong_sources(batches, message):
    with pytest.raises(TypeError, match=message):
        gradhpo.Problem(start, train_loss, val_loss, batches=batches)


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (lambda: [], (False, False)),
        (lambda rng: [], (True, False)),
        (lambda generator: [], (True, False)),
        (lambda rng, start: [], (True, True)),
        (lambda start: [], (False, True)),
        (lambda rng=None, size=3: [], (True, False)),
        (lambda size=3: [], (False, False)),
        (lambda *args: [], (True, False)),
    ],
)
def test_what_a_function_takes_is_in_its_signature(function, takes):
    source = gradhpo.host.Source(function)
    assert (source.own, source._starts) == takes


@pytest.mark.slow
def test_a_generation_without_enough_batches_is_refused():
    given = dataclasses.replace(problem(), batches=[pair(i) for i in range(8)])
    trials = Population(given, ONE_STEP, 2, batching="map")
    state, _ = trials.run(trials.init(KEYS[:2]), 6, KEYS[:2])
    with pytest.raises(ValueError, match="2 of the generation's 6 steps have batches"):
        trials.run(state, 6, KEYS[:2])
    with pytest.raises(ValueError, match=r"Problem\.batches is empty"):
        Population(dataclasses.replace(given, batches=[]), ONE_STEP, 2).resolve(state)


def test_what_a_reader_raises_is_raised_by_the_run():
    def broken(rng):
        yield pair(0)
        raise OSError("the disk is gone")

    given = dataclasses.replace(problem(), batches=broken)
    trials = Population(given, ONE_STEP, 2, batching="map")
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            trials.run(trials.init(KEYS[:2]), 6, KEYS[:2])
    with pytest.raises(OSError, match="the disk is gone"):
        gradhpo.solve(given, ONE_STEP, 6, KEY)


def test_a_source_that_gives_other_pairs_when_it_is_read_again():
    count = itertools.count()

    def other(rng):
        return (pair(next(count)) for _ in range(50))

    given = dataclasses.replace(problem(), batches=other)
    part = gradhpo.solve(given, ONE_STEP, 5, KEY)
    with pytest.raises(ValueError, match="its first pair differs"):
        gradhpo.solve(given, ONE_STEP, 9, KEY, resume=part)


def test_a_state_that_cannot_be_kept_is_refused():
    class Pairs:
        def __iter__(self):
            return self

        def __next__(self):
            return pair(0)

        def get_state(self):
            return object()

        def set_state(self, state):
            raise AssertionError

    given = dataclasses.replace(problem(), batches=Pairs())
    with pytest.raises(TypeError, match=r"get_state .* must return bytes or what JSON can hold"):
        gradhpo.solve(given, ONE_STEP, 5, KEY)
    part = gradhpo.solve(problem(), ONE_STEP, 5, KEY)
    damaged = dataclasses.replace(part, data_state=b"3")
    with pytest.raises(ValueError, match="data_state is not one of gradhpo"):
        gradhpo.solve(problem(), ONE_STEP, 9, KEY, resume=damaged)


@pytest.mark.parametrize("episode_length", [None, 4])
def test_pairs_before_a_step_are_those_of_steps_and_calibrations(episode_length):
    timetable = Timetable.of(HYPERDISTILL, episode_length)
    pairs = 0
    for step in range(40):
        assert timetable.pairs_before(step) == pairs
        pairs += 1 + 4 * bool(timetable.calibrates_at(step))
    assert len(ROWS) == 40
    assert jnp.shape(KEY) == ()

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo.parallel import Population, compiled, data_parallel, make_mesh
from gradhpo.parallel.compilations import CompileCounter
from tests import loops, wide_problems
from tests.problems import assert_close, assert_same_bits
from tests.quick import slow_but
from tests.small import (
    INNER,
    OUTER,
    X,
    Y,
    build,
    start,
    train_loss,
    val_loss,
)

SLOTS = 8
KEY = jax.random.key(0)
KEYS = jax.random.split(jax.random.key(1), SLOTS)


def batch(key, data):
    rows = jax.random.permutation(key, 12)[:8]
    return (data[0][rows], data[1][rows]), (data[0][:8], data[1][:8])


PROBLEM = gradhpo.Problem(
    start, train_loss, val_loss, batch=batch, data=lambda key: (jnp.asarray(X), jnp.asarray(Y))
)
LAYOUTS = {
    "vmap": ("vmap", None),
    "map": ("map", None),
    "chunk": (3, None),
    "shard": ("shard", (4, 1)),
    "shard-map": ("shard/map", (4, 1)),
    "trial-data": ("shard", (4, 2)),
    "trial-data-chunk": ("shard/1", (2, 2)),
    "data": ("vmap", (1, 4)),
}


def population(name, layout="vmap", problem=PROBLEM, slots=SLOTS, **settings):
    """Return a population, and the step size of its λ as a tuple of 0 or 1."""
    outer = settings.pop("outer", False)
    own = {key: settings.pop(key) for key in ("inner_optimizer", "T") if key in settings}
    optimizer, rate = build(name, outer=outer, **own)
    batching, shape = LAYOUTS.get(layout, (layout, None))
    mesh = None
    if shape is not None:
        mesh = make_mesh(trial=shape[0], data=shape[1])
        optimizer = data_parallel(optimizer, mesh) if shape[1] > 1 else optimizer
    return Population(problem, optimizer, slots, mesh, batching, **settings), rate


@pytest.mark.slow
def test_slots_are_runs_of_solve(x64):
    trials, rate = population("hyperdistill")
    keys = jax.random.split(KEY, SLOTS)
    # As many steps as in `walked`, whose program it is.
    state, metrics = trials.run(trials.init(KEY), 3, keys, *rate)
    solution = gradhpo.solve(PROBLEM, trials.optimizer, 3, keys, lr_hyper=rate[0])
    assert_close(state.params, solution.state.params, rtol=1e-12)
    assert_close(metrics["val_loss"], solution.metrics["val_loss"], rtol=1e-12)
    assert set(metrics) == set(gradhpo.state.METRICS)
    assert metrics["val_loss"].shape == (3, SLOTS)


@functools.cache
def walked(name, layout):
    """The state and metrics after two generations, a selection and a calibration."""
    trials, rate = population(name, layout)
    state, _ = trials.run(trials.init(KEY), 3, KEYS, *rate)
    state = trials.select(state, [0, 0, 2, 3, 4, 5, 7, 7])
    return jax.device_get(trials.run(trials.calibrate(state, KEYS), 3, KEYS, *rate))


@pytest.mark.parametrize(
    ("name", "layout"),
    # Each layout and each kind of method once, with what is hardest for it: branches and loops of
    # a method's own, inside which devices sum, and that become selections under vmap.
    [
        ("one-step", "chunk"),
        ("one-step", "data"),
        ("greedy", "map"),
        ("forward", "shard"),
        ("hyperdistill", "shard-map"),  # calibrates slot by slot
        ("t1t2", "trial-data-chunk"),
        ("implicit", "trial-data"),
        ("drmad", "trial-data"),
    ],
)
@pytest.mark.slow
def test_layouts_agree(name, layout, x64):
    # One of the hyperparameters stays float32.
    assert_close(walked(name, layout), walked(name, "vmap"), rtol=1e-5, atol=1e-7)


PLATEAU = optax.chain(INNER, optax.contrib.reduce_on_plateau(patience=1))


@pytest.mark.parametrize(
    ("layout", "models"),
    [
        ("shard", ["scan_from_zeros", "constant_branch", "running_total"]),
        ("trial-data", ["scan_from_zeros", "poisson_noise"]),
    ],
)
@pytest.mark.slow
def test_loops_that_start_from_a_constant(layout, models, x64):
    weights, predict = loops.together(*models)
    problem = gradhpo.Problem(
        lambda key: (weights, loops.LAM | {"scale": jax.random.uniform(key)}),
        *loops.losses(predict),
        batch=lambda key, data: (data, data),
        data=lambda key: jax.tree.map(jnp.asarray, loops.BATCH),
    )
    found = []
    for laid_out in ("vmap", layout):
        trials, rate = population("one-step", laid_out, problem, slots=4, inner_optimizer=PLATEAU)
        found.append(jax.device_get(trials.run(trials.init(KEY), 3, KEYS[:4], *rate)))
    assert_close(found[1], found[0], rtol=1e-10, atol=1e-13)


def test_a_divided_population_refuses_what_differs_between_devices():
    class Part(gradhpo.OneStepOptimizer):
        def estimate(self, state, task):
            done = super().estimate(state, task)
            scaled = optax.tree.scale(jnp.mean(task.train_batch[1]), done.hypergradient)
            return done._replace(hypergradient=scaled)

    parallel = data_parallel(Part(INNER, OUTER), make_mesh(trial=2, data=2))
    trials = Population(PROBLEM, parallel, 2, batching="shard")
    with pytest.raises(ValueError, match=r"leaf \.hyperparams.* differs .* axis 'data'"):
        trials.run(trials.init(KEY), 2, KEYS[:2])


@pytest.mark.parametrize(
    ("name", "layout"),
    slow_but(
        [
            *(("one-step", "vmap"), ("one-step", "trial-data")),
            *(("greedy", "shard"), ("hyperdistill", "chunk")),
        ],
        ("one-step", "vmap"),
        compiler=[("one-step", "vmap"), ("one-step", "trial-data")],
    ),
)
def test_a_slots_bits_do_not_depend_on_its_neighbours(name, layout):
    trials, rate = population(name, layout)
    first = trials.init(KEY)
    poisoned = jax.tree.map(np.array, jax.device_get(first))
    poisoned.params[1:4] = np.nan
    poisoned.params[5:] *= 1e3
    keys = jax.random.split(jax.random.key(9), SLOTS).at[0].set(KEYS[0]).at[4].set(KEYS[4])
    alone, rows = trials.run(first, 6, KEYS, *rate)
    among, others = trials.run(poisoned, 6, keys, *rate)
    for slot in (0, 4):
        a, b = (jax.tree.map(lambda x: x[slot], jax.device_get(s)) for s in (alone, among))  # noqa: B023
        assert_same_bits(b, a)
        assert_same_bits(others["val_loss"][:, slot], rows["val_loss"][:, slot])
    assert (np.asarray(among.metadata["diverged_at"])[1:4] == 1).all()


@pytest.mark.slow
def test_a_slot_that_diverges_is_frozen_in_its_last_finite_state():
    trials, _ = population("one-step", "vmap")
    rates = np.full(SLOTS, 0.05)
    rates[2] = 1e30
    state = trials.init(KEY)
    state, _ = trials.run(state, 2, KEYS, 0.05)
    state, rows = trials.run(state, 4, KEYS, rates)
    at = np.asarray(state.metadata["diverged_at"])
    assert at[2] > 2
    assert (np.delete(at, 2) == 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert np.isnan(rows["val_loss"][at[2] - 3 :, 2]).all()
    assert np.isfinite(rows["val_loss"][: at[2] - 3]).all()
    assert np.isfinite(np.delete(rows["val_loss"], 2, axis=1)).all()
    # Frozen: another generation changes nothing, at whatever rate.
    later, _ = trials.run(state, 3, KEYS, 0.05)
    a, b = (jax.tree.map(lambda x: x[2], jax.device_get(s)) for s in (state, later))
    assert_same_bits(b.params, a.params)
    assert b.metadata["diverged_at"] == at[2]
    # A copy of a healthy slot in its place goes on.
    mended = trials.select(later, [0, 1, 0, 3, 4, 5, 6, 7])
    mended, rows = trials.run(mended, 2, KEYS, 0.05)
    assert np.isfinite(rows["val_loss"]).all()


def test_numbers_never_compile_again():
    def adam(lam):
        return optax.adam(jnp.exp(lam["decay"]))

    trials, rate = population("one-step", "vmap", inner_optimizer=adam)
    state = trials.init(KEY)
    state, _ = trials.run(state, 3, KEYS, *rate)
    state = trials.select(state, range(SLOTS))
    before = compiled.counts()
    rng = np.random.default_rng(0)
    settings = []
    for _ in range(4):
        keys = [jax.random.key(int(s)) for s in rng.integers(1000, size=SLOTS)]
        settings.append((rng.uniform(0.01, 0.1, SLOTS), rng.integers(SLOTS, size=SLOTS), keys))
    stacked = [jnp.stack(keys) for _, _, keys in settings]
    with CompileCounter() as programs:
        for (rates, parents, _), keys in zip(settings, stacked, strict=True):
            state, _ = trials.run(trials.select(state, parents), 3, keys, rates)
            moved = state.hyperparams["decay"] * np.float32(1.01)
            state = state.update(hyperparams=state.hyperparams | {"decay": moved})
    assert compiled.counts() == before
    assert programs.count <= 1  # the product above, which is this test's own


@pytest.mark.parametrize("layout", ["vmap", "shard"])
def test_select_gathers_and_checks(layout):
    trials, _ = population("hyperdistill", layout)
    state = trials.init(KEY)
    parents = [7, 0, 0, 3, 2, 2, 1, 5]
    chosen = trials.select(state, parents)
    expected = jax.tree.map(lambda x: np.asarray(x)[np.asarray(parents)], state)
    assert_same_bits(jax.device_get(chosen), jax.device_get(expected))
    for wrong in ([0] * 7, [0] * 7 + [8], [-1] * 8, [0.5] * 8):
        with pytest.raises(ValueError, match="parents must be 8 integers, each a slot from 0 to 7"):
            trials.select(state, wrong)


def test_hyperparameters_of_ones_own():
    trials, rate = population("one-step")
    given = {"l": np.zeros((SLOTS, 3), np.float32), "decay": np.linspace(-5, -1, SLOTS)}
    state = trials.init(KEY, hyperparams=given)
    assert_close(state.hyperparams["decay"], given["decay"].astype(np.float32), rtol=1e-6)
    trials.run(state, 2, KEYS, *rate)
    with pytest.raises(ValueError, match=r"hyperparams must .* 8 slots; leaf .*decay.* shape \(\)"):
        trials.init(KEY, hyperparams={"l": given["l"], "decay": np.zeros(())})


@pytest.mark.slow
def test_data_of_each_slot():
    problem = gradhpo.Problem(
        start, train_loss, val_loss, batch=batch,
        data=lambda key: (jnp.asarray(X) + jax.random.normal(key, ()), jnp.asarray(Y)),
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(5), SLOTS)
    results = []
    for layout in ("vmap", "shard-map"):
        trials, rate = population("one-step", layout, problem, data_key=keys)
        assert trials.data[0].shape == (SLOTS, 12, 3)
        assert len(np.unique(np.asarray(trials.data[0])[:, 0, 0])) == SLOTS
        results.append(trials.run(trials.init(KEY), 3, KEYS, *rate)[1]["val_loss"])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)
    shared, rate = population("one-step", "vmap", problem, data_key=keys[3])
    _, rows = shared.run(shared.init(KEY), 3, KEYS, *rate)
    np.testing.assert_allclose(results[0][:, 3], rows["val_loss"][:, 3], rtol=1e-4)


@pytest.mark.slow
def test_auto_measures_once_and_says_what_it_chose():
    problem, optimizer = wide_problems.problem(), wide_problems.optimizer()
    trials = Population(problem, optimizer, SLOTS)
    assert trials.batching == "auto"
    state = trials.init(KEY)
    trials.run(state, 3, KEYS)
    assert trials.batching in ("vmap", 4)
    before = compiled.counts().compiles
    again = Population(problem, optimizer, SLOTS)
    again.run(again.init(KEY), 3, KEYS)
    assert again.batching == trials.batching
    assert compiled.counts().compiles == before
    fixed = Population(problem, optimizer, SLOTS, batching=trials.batching)
    assert_same_bits(fixed.run(state, 3, KEYS)[0], trials.run(state, 3, KEYS)[0])


@pytest.mark.slow
def test_fit_finds_the_most_slots_that_memory_holds():
    def loss(w, lam, batch):
        return jnp.sum(w * lam["l"]) + jnp.sum(lam["l"] ** 2)

    problem = gradhpo.Problem(start, loss, loss, batch=lambda key: (None, None))
    optimizer = gradhpo.FOOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    limit = 100_000
    trials = Population(problem, optimizer, "fit", batching="vmap", memory=limit, steps=50)

    def needs(slots):
        other = Population(problem, optimizer, slots, batching="vmap")
        return other.compile(other.init(KEY), 50).bytes_needed()

    assert needs(trials.slots) <= limit < needs(int(trials.slots * 1.03) + 2)
    trials.run(trials.init(KEY), 50, jax.random.split(KEY, trials.slots))
    with pytest.raises(ValueError, match=r'slots="fit": one slot .* needs [\d,]+ bytes, and 10'):
        Population(problem, optimizer, "fit", batching="vmap", memory=10)


@pytest.mark.parametrize(
    ("name", "layout"),
    slow_but([("one-step", "vmap"), ("hyperdistill", "shard")], compiler=[("one-step", "vmap")]),
)
def test_another_process_loads_the_program_and_gives_the_same_bits(name, layout, tmp_path):
    trials, rate = population(name, layout)
    state = trials.init(KEY)
    blob = trials.compile(state, 4, *rate).serialize()
    (tmp_path / "program").write_bytes(blob)
    expected, _ = trials.run(state, 4, KEYS, *rate)
    script = Path(__file__).parent / "load_program.py"
    command = [sys.executable, str(script), name, layout, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = np.load(tmp_path / "result.npz")
    assert_same_bits(
        [found[n] for n in found.files], [np.asarray(x) for x in jax.tree.leaves(expected)]
    )
    assert "runs compiled: 0, loaded: 1" in done.stdout


DAMAGE = {
    "cut": (lambda blob: blob[:-9], r"the program is cut: \d+ of \d+ bytes"),
    "flipped": (lambda blob: blob[:-9] + bytes(9), "its checksum does not match"),
    "foreign": (lambda blob: b"{}" + blob, "not a serialized program"),
    "header": (lambda blob: compiled.MAGIC + b"{]\n", "the header of the program is damaged"),
    "version": (
        lambda blob: blob.replace(jax.__version__.encode(), b"0.0.1"),
        "its jax is 0.0.1, here",
    ),
    "layout": (
        lambda blob: blob.replace(b'"layout": "vmap"', b'"layout": "mapv"'),
        "its layout is mapv",
    ),
}


def double(x):
    return 2 * x


@pytest.mark.parametrize("kind", DAMAGE)
def test_bytes_that_cannot_be_used_are_refused_with_the_reason(kind):
    damage, message = DAMAGE[kind]
    compiled.clear()
    blob = compiled.compile(double, np.ones(3), layout="vmap").serialize()
    compiled.clear()
    before = compiled.counts()
    with pytest.warns(compiled.CompileWarning, match=f"{message}.*is compiled here"):
        program = compiled.load(damage(blob), double, np.ones(3), layout="vmap")
    after = compiled.counts()
    assert (after.refusals, after.compiles) == (before.refusals + 1, before.compiles + 1)
    assert_same_bits(program(np.ones(3)), np.full(3, 2.0))


@pytest.mark.slow
def test_a_population_refuses_damage_and_programs_of_another():
    trials, rate = population("one-step", "vmap")
    state = trials.init(KEY)
    blob = trials.compile(state, 4, *rate).serialize()
    expected = trials.run(state, 4, KEYS, *rate)
    compiled.clear()
    with pytest.warns(compiled.CompileWarning, match="its checksum does not match"):
        trials.load(DAMAGE["flipped"][0](blob), state, 4, *rate)
    assert_same_bits(trials.run(state, 4, KEYS, *rate), expected)
    other, rate = population("first-order", "vmap")
    with pytest.warns(compiled.CompileWarning, match="made for something else: its computation"):
        other.load(blob, other.init(KEY), 4, *rate)


OPTIMIZER, _ = build("one-step")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batching": "rows"}, "batching must be .*, got 'rows'"),
        ({"batching": 0}, "batching must be .*, got 0"),
        ({"batching": True}, "batching must be .*, got True"),
        ({"batching": "shard"}, "batching='shard' needs a mesh"),
        ({"slots": 0}, "slots must be at least 1, got 0"),
        (
            {"slots": 6, "mesh": (4, 1), "batching": "shard"},
            "multiple of the mesh's 4 trials, got 6",
        ),
        ({"data_key": KEYS[:3]}, r"one for each of 8 slots, got shape \(3,\)"),
    ],
)
def test_bad_arguments(arguments, message):
    given = {"problem": PROBLEM, "optimizer": OPTIMIZER, "slots": SLOTS} | arguments
    if "mesh" in given:
        given["mesh"] = make_mesh(trial=given["mesh"][0], data=given["mesh"][1])
    with pytest.raises(ValueError, match=message):
        Population(**given)


def test_bad_arguments_of_run():
    trials, rate = population("one-step")
    state = trials.init(KEY)
    with pytest.raises(ValueError, match=r"keys must have shape \(8,\), one a slot; got \(3,\)"):
        trials.run(state, 3, KEYS[:3], *rate)
    with pytest.raises(TypeError, match=r"keys must be an array of keys from jax\.random\.key"):
        trials.run(state, 3, range(8), *rate)
    with pytest.raises(ValueError, match=r"lr_hyper must be a number or 8, one a slot; got \(3,\)"):
        trials.run(state, 3, KEYS, np.ones(3))
    with pytest.raises(
        ValueError, match="exactly one of outer_optimizer and lr_hyper; got neither"
    ):
        trials.run(state, 3, KEYS)
    with pytest.raises(
        ValueError, match=r"state must have a leading axis of 8 slots; leaf \.params"
    ):
        trials.run(jax.tree.map(lambda x: x[:4], state), 3, KEYS, *rate)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        trials.run(state, 0, KEYS, *rate)
    mesh = make_mesh(trial=1, data=2)
    optimizer = data_parallel(OPTIMIZER, mesh, backend="pmap")
    with pytest.raises(ValueError, match=r'needs backend="shard_map" or "auto", got "pmap"'):
        Population(PROBLEM, optimizer, 2)


@pytest.mark.slow
def test_a_loss_that_calls_python_runs_and_is_not_shared():
    def calling(value):
        def loss(w, lam, batch):
            made = jax.pure_callback(
                lambda: np.float32(value), jax.ShapeDtypeStruct((), np.float32)
            )
            return train_loss(w, lam, batch) + jax.lax.stop_gradient(made)

        return loss

    found = []
    for value in (0.0, 5.0):
        problem = gradhpo.Problem(start, calling(value), val_loss, batch, data=PROBLEM.data)
        trials, rate = population("first-order", "map", problem, slots=2)
        state = trials.init(KEY)
        found.append(trials.run(state, 2, KEYS[:2], *rate)[1]["train_loss"])
        with pytest.raises(ValueError, match="calls back into Python cannot be serialized"):
            trials.compile(state, 2, *rate).serialize()
    np.testing.assert_allclose(found[1] - found[0], 5, rtol=1e-5)


@pytest.mark.slow
def test_populations_on_other_devices_compute_there():
    devices = jax.devices()[4:]
    mesh = make_mesh(trial=4, data=1, devices=devices)
    trials = Population(PROBLEM, OPTIMIZER, SLOTS, mesh, "shard")
    state, _ = trials.run(trials.init(KEY), 2, KEYS, 0.05)
    assert state.params.sharding.device_set == set(devices)
    for device in jax.devices()[1:3]:
        trials = Population(PROBLEM, OPTIMIZER, SLOTS, batching="vmap")
        first = jax.device_put(trials.init(KEY), device)
        trials.data = jax.device_put(trials.data, device)
        state, _ = trials.run(first, 2, jax.device_put(KEYS, device), jnp.float32(0.05))
        assert state.params.devices() == {device}


def test_calibrate_leaves_frozen_slots_alone():
    trials, _rate = population("hyperdistill", "vmap", T=4)
    state = trials.init(KEY)
    frozen = jnp.zeros(SLOTS, jnp.int32).at[2].set(1)
    state = trials.calibrate(state.update(metadata={"diverged_at": frozen}), KEYS)
    theta = np.asarray(state.metadata["theta"])
    assert theta[2] == 1
    assert (np.delete(theta, 2) != 1).all()


def test_states_and_axes_that_do_not_fit():
    trials, rate = population("one-step")
    foreign = jax.vmap(lambda key: OPTIMIZER.init(*start(key)))(jax.random.split(KEY, SLOTS))
    with pytest.raises(
        ValueError, match="state must come from the population's init, run or select"
    ):
        trials.run(foreign, 2, KEYS, *rate)
    with pytest.raises(TypeError, match=r"lr_hyper must be a number .*, got True"):
        trials.run(trials.init(KEY), 2, KEYS, True)
    mesh = make_mesh(trial=4, data=2)
    with pytest.raises(ValueError, match='needs an axis other than "trial"'):
        Population(PROBLEM, data_parallel(OPTIMIZER, mesh, axis="trial"), SLOTS)


@pytest.mark.slow
def test_map_takes_operations_that_have_no_rule_for_vmap():
    def rows(key, data):
        given = batch(key, data)
        return jax.pure_callback(lambda pairs: pairs, given, given)

    problem = dataclasses.replace(PROBLEM, batch=rows)
    trials, rate = population("one-step", "map", problem)
    found = trials.run(trials.init(KEY), 2, KEYS, *rate)
    plain, _ = population("one-step", "map")
    assert_same_bits(found, plain.run(plain.init(KEY), 2, KEYS, *rate))

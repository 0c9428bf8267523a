import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import gradhpo
from gradhpo.parallel import (
    Population,
    data_parallel,
    fully_sharded,
    global_batch,
    make_mesh,
    pad_batch,
)
from gradhpo.parallel.compilations import CompileCounter
from tests import loops
from tests.pairs import run_both
from tests.problems import assert_close
from tests.quick import slow_but
from tests.small import OPTIMIZERS, REFERENCES, UNROLLING

pytestmark = pytest.mark.usefixtures("only_x64")

ROWS, EXAMPLES = 16, 32
_rng = np.random.default_rng(0)
X, Y = _rng.normal(size=(EXAMPLES, 3)), _rng.normal(size=EXAMPLES)
PARAMS = {"w": _rng.normal(size=(3, 4)), "b": np.zeros(4), "out": _rng.normal(size=4)}
LAM = {"logits": np.zeros(EXAMPLES), "decay": np.full((), -3.0)}
VAL = {"x": _rng.normal(size=(ROWS, 3)), "y": _rng.normal(size=ROWS)}
# At its first step Adam divides a gradient by itself, and its derivative is what eps leaves of a
# difference of equal numbers: with 1e-8, eight digits fewer than the gradient has.
ADAM, MOMENTUM = optax.adam(0.02, eps=1e-3), optax.sgd(0.1, momentum=0.9)
OUTER = optax.adam(0.05)  # one, so that optimizers are equal, and a step is compiled once
KEY = jax.random.key(0)


def rows(step):
    index = np.random.default_rng(step).permutation(EXAMPLES)[:ROWS]
    return {"x": X[index], "y": Y[index], "index": index}


def errors(params, batch):
    return (jnp.tanh(batch["x"] @ params["w"] + params["b"]) @ params["out"] - batch["y"]) ** 2


def looped_errors(params, batch):
    """The same, unit by unit in a loop that starts from a constant."""

    def add(total, unit):
        w, b, out = unit
        return total + jnp.tanh(batch["x"] @ w + b) * out, None

    units = (params["w"].T, params["b"], params["out"])
    total, _ = jax.lax.scan(add, jnp.zeros(len(batch["x"])), units)
    return (total - batch["y"]) ** 2


def train_loss(params, lam, batch, errors=errors):
    weights = jax.nn.sigmoid(lam["logits"][batch["index"]])
    return jnp.mean(weights * errors(params, batch)) + jnp.exp(lam["decay"]) * jnp.sum(
        params["w"] ** 2
    )


def val_loss(params, lam, batch, errors=errors):
    return jnp.mean(errors(params, batch)) + 0.01 * jnp.sum(lam["logits"] ** 2)


def looped_train(params, lam, batch):
    return train_loss(params, lam, batch, looped_errors)


def looped_val(params, lam, batch):
    return val_loss(params, lam, batch, looped_errors)


LOOPED = (looped_train, looped_val)


def build(name, **settings):
    own = {"unroll_steps": 3} if name in UNROLLING else {}
    own |= {"T": 3} if name == "hyperdistill" else {}
    own |= settings
    if "update_fn" not in own:
        own["inner_optimizer"] = ADAM
    return (OPTIMIZERS | REFERENCES)[name](outer_optimizer=OUTER, **own)


def walk(optimizer, steps, losses=(train_loss, val_loss), start=(PARAMS, LAM)):
    state = optimizer.init(*jax.tree.map(jnp.asarray, start))
    for i in range(steps):
        state = optimizer.step(state, rows(i), VAL, *losses)
    return state


class OwnOptimizer(gradhpo.BilevelOptimizer):
    """A user's: the direct term and one from the train loss."""

    inner_optimizer, outer_optimizer = ADAM, OUTER

    def __init__(self):
        super().__init__(ADAM, OUTER)

    def init(self, params, hyperparams):
        inner, outer = self.inner_optimizer.init(params), self.outer_optimizer.init(hyperparams)
        return gradhpo.BilevelState.create(params, hyperparams, inner, outer)

    def compute_hypergradient(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn):
        def both(lam):
            loss = train_loss_fn(state.params, lam, train_batch)
            return loss + val_loss_fn(state.params, lam, val_batch) ** 2

        return jax.grad(both)(state.hyperparams)


STEPS = 8


@functools.cache
def on_one_device(name):
    """The state after some steps of losses with a loop."""
    return jax.device_get(walk(build(name), STEPS, LOOPED))


@pytest.mark.parametrize(
    ("name", "devices"),
    slow_but(
        [(name, 8) for name in [*OPTIMIZERS, *REFERENCES]] + [("one-step", 2)],
        ("one-step", 8),
        ("hyperdistill", 8),
    ),
)
def test_shard_map_equals_one_device(name, devices):
    one, parallel = on_one_device(name), data_parallel(build(name), make_mesh(data=devices))
    before = gradhpo.optimizer._step._cache_size()
    many = walk(parallel, STEPS, LOOPED)
    steps = gradhpo.optimizer._step._cache_size()
    assert steps - before == 1  # not one for each step
    assert_close(jax.device_get(many), one, rtol=1e-10, atol=1e-13)
    assert len(many.params["w"].sharding.device_set) == devices
    with CompileCounter() as compiled:
        walk(parallel, 2, LOOPED)
    assert gradhpo.optimizer._step._cache_size() == steps
    assert compiled.count == 0


@pytest.mark.parametrize(
    ("name", "backend"),
    slow_but(
        [("hyperdistill", "auto"), ("t1t2", "pmap"), ("greedy", "pmap")], ("hyperdistill", "auto")
    ),
)
def test_other_backends_equal_one_device(name, backend):
    many = walk(data_parallel(build(name), make_mesh(data=4), backend=backend), STEPS, LOOPED)
    assert_close(jax.device_get(many), on_one_device(name), rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_models_with_loops_and_branches_that_start_from_a_constant():
    """All at once: what one of them gets wrong shows in its weights and in λ."""
    # Scans are in the losses of every method above, Poisson noise in `test_population`.
    models = set(loops.MODELS) - {"scan_from_zeros", "poisson_noise"}
    weights, predict = loops.together(*sorted(models))
    optimizer = build("one-step", inner_optimizer=MOMENTUM)
    parallel = data_parallel(optimizer, make_mesh(data=4))
    batches, losses = (loops.BATCH, loops.BATCH), loops.losses(predict)
    one, many = (
        jax.device_get(tuner.step(tuner.init(weights, loops.LAM), *batches, *losses))
        for tuner in (optimizer, parallel)
    )
    assert_close(many, one, rtol=1e-10, atol=1e-13)
    assert abs(one.hyperparams["scale"] - loops.LAM["scale"]) > 1e-3
    for name, leaves in one.params.items():
        assert not np.allclose(jax.tree.leaves(leaves)[0], jax.tree.leaves(weights[name])[0]), name


def reductions(optimizer):
    """Return how many all-reduces the compiled step holds."""
    state = optimizer.init(*jax.tree.map(jnp.asarray, (PARAMS, LAM)))
    hlo = optimizer.lower_step(state, rows(0), VAL, train_loss, val_loss).compile().as_text()
    return len(re.findall(r"= .* all-reduce(?:-start)?\(", hlo))


@pytest.mark.parametrize(
    ("name", "needed"),
    # T1-T2 has one more, in a branch for outsized weights; Greedy's are in a loop, however long.
    slow_but([("one-step", 3), ("t1t2", 4), ("hyperdistill", 3), ("greedy", 6)], ("one-step", 3)),
)
def test_a_step_reduces_once_for_each_gradient(name, needed):
    own = {"unroll_steps": 5} if name == "greedy" else {}
    assert reductions(data_parallel(build(name, **own), make_mesh(data=4))) == needed


def test_a_mixed_mode_reduces_no_more():
    optimizer = build("one-step", mode="forward-over-reverse")
    assert reductions(data_parallel(optimizer, make_mesh(data=4))) == 3


def update_fn(params, lam, batch):
    return optax.tree.add_scale(params, -0.05, jax.grad(train_loss)(params, lam, batch))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    slow_but([("t1t2", "shard_map"), ("unrolled", "pmap")], ("t1t2", "shard_map")),
)
def test_an_update_function(name, backend):
    optimizer = build(name, update_fn=update_fn)
    many = walk(data_parallel(optimizer, make_mesh(data=4), backend=backend), 4)
    one = walk(optimizer, 4)
    # T1-T2 differences an update coordinate by coordinate; rounding is divided by a small step.
    rtol = 1e-6 if name == "t1t2" else 1e-10
    assert_close(jax.device_get(many), jax.device_get(one), rtol=rtol, atol=rtol * 1e-2)


def test_an_optimizer_that_a_user_wrote():
    many = walk(data_parallel(OwnOptimizer(), make_mesh(data=4)), 5)
    assert_close(jax.device_get(many), jax.device_get(walk(OwnOptimizer(), 5)), atol=1e-13)


class PartOptimizer(OwnOptimizer):
    """Scales its hypergradient by what it finds in its part of the batch, in a loop."""

    def __init__(self, average):
        super().__init__()
        self.average = average

    def compute_hypergradient(self, state, train_batch, *rest):
        total = jax.lax.fori_loop(0, 2, lambda _, sum: sum + jnp.mean(train_batch["y"]), 0.0)
        g = super().compute_hypergradient(state, train_batch, *rest)
        return optax.tree.scale(self.average(total), g)


@pytest.mark.slow
def test_an_optimizer_that_uses_its_part_of_the_batch():
    def many(average):
        return data_parallel(PartOptimizer(average), make_mesh(data=4))

    with pytest.raises(
        ValueError, match=r"leaf \.hyperparams.* differs between the devices of axis"
    ):
        walk(many(lambda x: x), 1)
    averaged = walk(many(lambda x: jax.lax.pmean(x, "data")), 3)
    one = walk(PartOptimizer(lambda x: x), 3)
    assert_close(jax.device_get(averaged), jax.device_get(one), atol=1e-13)


def of_all(mean):
    return jax.lax.pmean(mean, "data")


def summed_val(params, lam, batch):
    return jnp.sum(errors(params, batch))


@functools.cache
def centred(mean):
    """Losses that sum what is left of the errors without their mean."""

    def loss(params, lam, batch):
        error = errors(params, batch) - batch["y"] ** 2
        weight = jax.nn.sigmoid(lam["logits"][batch["index"]])
        return jnp.sum(weight * (error - mean(jnp.mean(error))) ** 2)

    return loss, summed_val


@pytest.mark.filterwarnings("ignore:.*'decay'. gets no hypergradient")  # these losses have none
@pytest.mark.parametrize("backend", ["shard_map", "pmap"])
@pytest.mark.slow
def test_losses_that_sum_with_statistics_of_the_whole_batch(backend):
    optimizer = build("one-step")
    parallel = data_parallel(optimizer, make_mesh(data=4), backend=backend, reduction="sum")
    many = walk(parallel, 3, centred(of_all))
    one = walk(optimizer, 3, centred(jnp.asarray))
    assert_close(jax.device_get(many), jax.device_get(one), rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_compute_hypergradient_is_that_of_the_whole_batch():
    optimizer = build("one-step")
    parallel = data_parallel(optimizer, make_mesh(data=8))
    start = jax.tree.map(jnp.asarray, (PARAMS, LAM))
    args = (rows(0), VAL, train_loss, val_loss)
    many = parallel.compute_hypergradient(parallel.init(*start), *args)
    one = optimizer.compute_hypergradient(optimizer.init(*start), *args)
    assert_close(jax.device_get(many), jax.device_get(one), atol=1e-13)


def problem():
    def batch(key, data):
        index = jax.random.permutation(key, EXAMPLES)[:ROWS]
        val = jax.tree.map(jnp.asarray, VAL)
        return {"x": data[0][index], "y": data[1][index], "index": index}, val

    return gradhpo.Problem(
        lambda key: jax.tree.map(jnp.asarray, (PARAMS, LAM)),
        train_loss,
        val_loss,
        batch=batch,
        data=lambda key: (jnp.asarray(X), jnp.asarray(Y)),
    )


@pytest.mark.slow
def test_under_solve_with_calibration():
    optimizer = build("hyperdistill", T=4)
    parallel = data_parallel(optimizer, make_mesh(data=4))
    one = gradhpo.solve(problem(), optimizer, 8, jax.random.key(0))
    many = gradhpo.solve(problem(), parallel, 8, jax.random.key(0))
    assert_close(jax.device_get(many.state), jax.device_get(one.state), atol=1e-13)


@pytest.mark.parametrize("name", ["greedy", "hyperdistill"])
@pytest.mark.slow
def test_run_in_episodes(name):
    # Its steps are those of `test_shard_map_equals_one_device`.
    optimizer = build(name)

    def run(optimizer):
        state = optimizer.init(*jax.tree.map(jnp.asarray, (PARAMS, LAM)))
        batches = (lambda: rows(0), lambda: VAL)
        return optimizer.run(state, 2, *batches, *LOOPED, lr_reptile=0.5)

    many = run(data_parallel(optimizer, make_mesh(data=8)))
    assert_close(jax.device_get(many), jax.device_get(run(optimizer)), atol=1e-13)


@pytest.mark.slow
def test_weights_state_and_hyperparameters_are_divided():
    def wide_train(params, lam, batch):
        return jnp.mean((batch["x"] @ params["w"]) ** 2) + jnp.sum(
            lam * jnp.mean(params["w"] ** 2, 0)
        )

    def wide_val(params, lam, batch):
        return jnp.mean((batch["x"] @ params["w"] - 1) ** 2) + jnp.sum(lam**2)

    start = ({"w": np.ones((3, 512))}, np.zeros(512))
    mesh, optimizer = make_mesh(data=8), build("hyperdistill")
    sharded = data_parallel(optimizer, mesh, backend="auto", rules=fully_sharded(mesh))
    losses = (wide_train, wide_val)
    state = walk(sharded, 3, losses, start)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for device in mesh.devices.ravel():
        held = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert held < total / 7
    assert state.get_metric("w_star")["w"].sharding.spec == P(None, "data")
    one = walk(optimizer, 3, losses, start)
    assert_close(jax.device_get(state), jax.device_get(one), atol=1e-12)


@pytest.mark.slow
def test_a_hundred_million_hyperparameters_take_a_step():
    n, mesh = 100_000_000, make_mesh(data=8)

    def train(params, lam, batch):
        weights = jax.nn.sigmoid(lam[batch["index"]])
        return jnp.mean(weights * (batch["x"] @ params - batch["y"]) ** 2)

    def val(params, lam, batch):
        return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)

    rule = fully_sharded(mesh)
    own = gradhpo.OneStepOptimizer(inner_optimizer=optax.sgd(0.1))
    optimizer = data_parallel(own, mesh, backend="auto", rules=rule)
    lam = jax.jit(
        lambda: jnp.zeros(n, np.float32), out_shardings=jax.NamedSharding(mesh, P("data"))
    )()
    state = optimizer.init(jnp.zeros(3, np.float32), lam)

    def single(x):
        return np.asarray(x, np.int32 if x.dtype.kind == "i" else np.float32)

    first, val_batch = jax.tree.map(single, (rows(0), VAL))
    batch = first | {"index": np.arange(ROWS, dtype=np.int32) * (n // ROWS)}
    state = optimizer.step(state, batch, val_batch, train, val, lr_hyper=1.0)
    moved = jax.jit(lambda lam: (jnp.sum(lam != 0), lam[batch["index"]]))(state.hyperparams)
    assert int(moved[0]) == ROWS
    assert state.hyperparams.addressable_shards[0].data.nbytes == 4 * n // 8
    expected = own.compute_hypergradient(
        own.init(jnp.zeros(3), jnp.zeros(EXAMPLES)), first, val_batch, train, val
    )
    np.testing.assert_allclose(moved[1], -expected[rows(0)["index"]], rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*'decay'. gets no hypergradient")  # these losses have none
@pytest.mark.slow
def test_a_padded_batch_gives_the_mean_of_its_rows():
    uneven = jax.tree.map(lambda x: x[:13], rows(0))
    padded, weights = pad_batch(uneven, 4)

    def weighted(params, lam, batch):
        own = jax.nn.sigmoid(lam["logits"][batch["index"]])
        return jnp.mean(batch["weights"] * own * errors(params, batch))

    def plain(params, lam, batch):
        return jnp.mean(jax.nn.sigmoid(lam["logits"][batch["index"]]) * errors(params, batch))

    optimizer = build("one-step")
    parallel = data_parallel(optimizer, make_mesh(data=4))
    start = jax.tree.map(jnp.asarray, (PARAMS, LAM))
    many = parallel.step(
        parallel.init(*start), padded | {"weights": weights}, VAL, weighted, val_loss
    )
    one = optimizer.step(optimizer.init(*start), uneven, VAL, plain, val_loss)
    assert_close(jax.device_get(many), jax.device_get(one), rtol=1e-6, atol=1e-9)


def test_a_batch_that_does_not_divide_is_an_error():
    parallel = data_parallel(build("one-step"), make_mesh(data=8))
    state = parallel.init(*jax.tree.map(jnp.asarray, (PARAMS, LAM)))
    uneven = jax.tree.map(lambda x: x[:13], rows(0))
    with pytest.raises(
        ValueError, match=r"train_batch .*multiple of 8 .*8 devices; got shape \(13,\)"
    ):
        parallel.step(state, uneven, VAL, train_loss, val_loss)
    with pytest.raises(ValueError, match="val_batch must have a multiple of 8"):
        parallel.step(state, rows(0), jax.tree.map(lambda x: x[:3], VAL), train_loss, val_loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "mpi"}, r"backend must be one of .*shard_map.*, got 'mpi'"),
        ({"reduction": "max"}, r"reduction must be one of .*mean.*, got 'max'"),
        ({"axis": "model"}, r"axis must be one of .*trial.*data.*, got 'model'"),
        ({"rules": lambda path, leaf: P()}, 'rules need backend="auto"'),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        data_parallel(build("one-step"), make_mesh(data=2), **settings)


def test_padding_copies_a_row_so_that_its_derivatives_are_finite():
    padded, weights = pad_batch({"x": np.ones((7, 3)), "key": jax.random.split(KEY, 7)}, 4)
    assert padded["x"].shape == (8, 3)
    assert padded["key"].shape == (8,)

    def mean_norm(w):
        return jnp.mean(weights * jnp.linalg.norm(padded["x"] * w, axis=1))

    np.testing.assert_allclose(jax.grad(mean_norm)(jnp.ones(3)), 3**-0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="batch has no rows"):
        pad_batch(np.ones((0, 2)), 4)


def test_a_global_batch_holds_keys_and_divides():
    mesh = make_mesh()
    made = global_batch({"x": np.ones((16, 2)), "key": jax.random.split(KEY, 16)}, mesh)
    assert made["key"].shape == (16,)
    assert made["x"].sharding.spec == P("data")
    with pytest.raises(ValueError, match=r"multiple of 8 rows .* got shape \(5, 2\)"):
        global_batch(np.ones((5, 2)), mesh)


def test_make_mesh_says_what_there_is():
    with pytest.raises(ValueError, match="trial=3 does not divide 8 devices: give data= too"):
        make_mesh(trial=3)
    with pytest.raises(ValueError, match="trial=0 times data=0 devices wanted, 8 found"):
        make_mesh(trial=0)
    with pytest.raises(ValueError, match="trial=3 times data=4 devices wanted, 8 found"):
        make_mesh(trial=3, data=4)


@pytest.mark.slow
def test_two_processes_give_the_single_process_result(tmp_path):
    run_both(Path(__file__).parent / "two_processes.py", tmp_path)
    one = jax.tree.leaves(jax.device_get(walk(build("one-step"), 5)))
    trials = Population(problem(), build("one-step"), 2, batching="vmap")
    slots = trials.init(KEY)
    for _ in range(2):
        slots, _ = trials.run(slots, 3, jax.random.split(KEY, 2))
    slots = jax.tree.leaves(jax.device_get(slots))
    for rank in range(2):
        mine = [leaf[rank : rank + 1] for leaf in slots]
        for name, expected in ((rank, one), (f"slot{rank}", mine)):
            found = np.load(tmp_path / f"{name}.npz")
            many = [found[leaf] for leaf in found.files]
            assert_close(many, expected, rtol=1e-10, atol=1e-13)

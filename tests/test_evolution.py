"""Evolution strategies and forward gradients: their means, and what needs no derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import ESOptimizer, ForwardGradientOptimizer, NRESOptimizer, PESOptimizer, Task
from gradhpo.cluster import PBT, SearchSpace, Sweep, uniform
from gradhpo.horizon import moved
from gradhpo.parallel import Population, data_parallel, make_mesh
from tests import small
from tests.problems import assert_close, assert_same_bits
from tests.quick import slow_but
from tests.sweeps import assert_same_tables

KINDS = {"es": ESOptimizer, "pes": PESOptimizer, "nres": NRESOptimizer}
INNER, OUTER = optax.sgd(0.05, momentum=0.9), optax.adam(0.05)
SMALL = {"particles": 16, "sigma": 0.1, "unroll_steps": 2}


PROBLEM = gradhpo.Problem(
    small.start, small.train_loss, small.val_loss, batch=lambda key: (small.BATCH, small.BATCH)
)
"""The small regression problem."""


# --- Against closed forms -----------------------------------------------------------------------
#
# w_t = a w_{t-1} + b λ_t, and cos(w_t) counts: the smoothed loss is known, and is another one for
# each method. What λ does in window j reaches w_t as c_j = b a^(t-j).

DECAY, GAIN, W_0, LAM, SIGMA, WINDOWS = 0.9, 1.0, 0.3, 0.2, 0.5, 4


def linear(w, lam, batch):
    """A linear recurrence."""
    del batch
    return DECAY * w + GAIN * lam


def cosine(w, lam, batch):
    """Its loss."""
    del lam, batch
    return jnp.cos(w)


def expected(name):
    """The gradient of the smoothed loss of each window."""
    t = np.arange(1, WINDOWS + 1)
    weights = DECAY**t * W_0 + LAM * GAIN * (1 - DECAY**t) / (1 - DECAY)
    c = [GAIN * DECAY ** np.arange(n) for n in t]
    if name == "es":
        c = [GAIN * np.ones(1)] * WINDOWS
    total, squares = np.array([x.sum() for x in c]), np.array([x @ x for x in c])
    spread = total**2 if name == "nres" else squares
    return -np.sin(weights) * total * np.exp(-(SIGMA**2) * spread / 2)


@pytest.mark.slow
def test_forward_gradients_are_the_exact_one_in_the_mean_and_of_a_basis(x64):
    del x64
    given = {"inner_optimizer": INNER, "unroll_steps": 3}
    exact = gradhpo.UnrolledOptimizer(**given)
    drawn = ForwardGradientOptimizer(**given, directions=4)
    task = Task(small.BATCH, small.BATCH, small.train_loss, small.val_loss)
    state = exact.init(*small.start())
    truth = jax.flatten_util.ravel_pytree(exact.hypergradient(state, task))[0]

    def estimate(key):
        state = drawn.init(*small.start(), key=key)
        return jax.flatten_util.ravel_pytree(drawn.hypergradient(state, task))[0]

    found = np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), 400)))
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert np.abs((found.mean(axis=0) - truth) / error).max() < 3.5
    # ⟨g, v⟩ v: its product with the gradient is never negative, and 4 numbers of λ add up so.
    assert (found @ truth >= 0).all()
    variance = (truth @ truth - truth**2) / 4
    np.testing.assert_allclose(found.var(axis=0, ddof=1), variance, rtol=0.3)


@pytest.mark.parametrize("name", slow_but(["pes", "nres"], "nres"))
def test_a_window_is_the_sum_over_pairs_that_the_paper_writes(name):
    optimizer = KINDS[name](update_fn=linear, particles=6, sigma=SIGMA, unroll_steps=2)
    task = Task(jnp.zeros(()), jnp.zeros(()), cosine, cosine)

    def window(state, _):
        done = optimizer.estimate(state, task)
        state = moved(state, done)
        return state, (done.hypergradient, state.metadata["perturbations"])

    state = optimizer.init(jnp.asarray(W_0), jnp.asarray(LAM))
    found, weights = jax.jit(lambda s: jax.lax.scan(window, s, length=3)[1])(state)
    weights = np.asarray(weights, float)
    shifts = weights if name == "nres" else np.diff(weights, axis=0, prepend=0)
    assert (weights[1:] == weights[:-1]).all() == (name == "nres")
    walkers = np.full((2, 3), W_0)
    for g, weight, shift in zip(found, weights, shifts, strict=True):
        for _ in range(2):
            walkers = DECAY * walkers + GAIN * (LAM + np.stack([shift, -shift]))
        plus, minus = np.cos(walkers)
        np.testing.assert_allclose(g, ((plus - minus) * weight).mean() / (2 * SIGMA**2), rtol=1e-4)


@functools.cache
def sampled(name):
    """Estimates of every window from 100 runs of 1000 pairs, `(runs, windows)`."""
    optimizer = KINDS[name](update_fn=linear, particles=2000, sigma=SIGMA)
    task = Task(jnp.zeros(()), jnp.zeros(()), cosine, cosine)

    def run(key):
        def window(state, _):
            done = optimizer.estimate(state, task)
            return moved(state, done), done.hypergradient

        state = optimizer.init(jnp.asarray(W_0), jnp.asarray(LAM), key=key)
        return jax.lax.scan(window, state, length=WINDOWS)[1]

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(7), 100)))


@pytest.mark.parametrize("name", slow_but(KINDS, "pes"))
def test_the_mean_is_the_gradient_of_the_smoothed_loss(name):
    found = sampled(name)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert np.abs((found.mean(axis=0) - expected(name)) / error).max() < 3.5
    for other in KINDS.keys() - {name}:  # and of no other
        assert np.abs((found.mean(axis=0) - expected(other)) / error)[-1] > 20


@pytest.mark.slow
def test_reused_noise_has_the_lower_variance():
    spread = {name: sampled(name).var(axis=0, ddof=1) for name in ("pes", "nres")}
    np.testing.assert_allclose(spread["nres"][0], spread["pes"][0], rtol=1e-4)  # one window
    assert (spread["nres"][1:] < spread["pes"][1:]).all()
    whole = {name: sampled(name).sum(axis=1).var(ddof=1) for name in ("pes", "nres")}
    assert whole["nres"] < whole["pes"]


@pytest.mark.compiler
@pytest.mark.slow
def test_memory_of_forward_gradients_does_not_grow_with_the_horizon():
    T = 400

    def bytes_of(kind):
        optimizer = kind(INNER, OUTER, T)
        state = optimizer.init(*small.start())
        losses = (small.train_loss, small.val_loss)
        lowered = optimizer.lower_step(state, small.BATCH, small.BATCH, *losses)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # Of a step its number and its training loss; and what needs no more for more steps.
    assert bytes_of(ForwardGradientOptimizer) <= 8 * T + 1024
    assert bytes_of(gradhpo.UnrolledOptimizer) >= 12 * T  # the weights of each


# --- Without a derivative -----------------------------------------------------------------------


def halved(w, lam, batch):
    """Steps until the loss is small, with weights masked by λ."""
    x, y = batch
    mask = (lam["mask"] > 0).astype(w.dtype)

    def going(carry):
        w, n = carry
        return (jnp.mean((x @ (mask * w) - y) ** 2) > 0.5) & (n < 20)

    def step(carry):
        w, n = carry
        gradient = x.T @ (x @ (mask * w) - y) / len(y)
        return w - jnp.exp(lam["rate"]) * gradient, n + 1

    return jax.lax.while_loop(going, step, (w, 0))[0]


def accuracy(w, lam, batch):
    """A loss of zeros and ones, less an accuracy."""
    x, y = batch
    right = (x @ (w * (lam["mask"] > 0)) > 0) == (y > 0)
    return 1 - jnp.mean(right.astype(w.dtype))


MASKED = {"mask": jnp.asarray([0.02, 0.03, -0.02]), "rate": jnp.asarray(-2.0)}


def test_masks_loops_and_accuracies_are_tuned():
    optimizer = PESOptimizer(None, OUTER, update_fn=halved, **(SMALL | {"particles": 64}))
    state = optimizer.init(-jnp.ones(3), MASKED)
    state = optimizer.step(state, small.BATCH, small.BATCH, accuracy, accuracy)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b), state.hyperparams, MASKED)
    assert bool(state.finite())
    assert min(float(x.min()) for x in jax.tree.leaves(moved)) > 1e-3
    exact = gradhpo.UnrolledOptimizer(None, OUTER, update_fn=halved)
    state = exact.init(-jnp.ones(3), MASKED)
    with pytest.raises(ValueError, match=r"is it an accuracy|no derivative goes through"):
        exact.step(state, small.BATCH, small.BATCH, accuracy, accuracy)


@pytest.mark.slow
def test_an_unused_leaf_is_told_and_one_that_is_held_is_not_perturbed():
    def val(w, lam, batch):
        return accuracy(w, lam, batch) + (lam["held"] > 0)

    held = optax.multi_transform(
        {"move": OUTER, "hold": optax.set_to_zero()},
        {"mask": "move", "rate": "move", "nobody": "move", "held": "hold"},
    )
    optimizer = PESOptimizer(None, held, update_fn=halved, **SMALL)
    lam = MASKED | {"nobody": jnp.ones(()), "held": jnp.asarray(1e-6)}
    state = optimizer.init(-jnp.ones(3), lam)
    with pytest.warns(gradhpo.UnreachedWarning, match=r"\['nobody'\] gets no hypergradient: nei"):
        state = optimizer.step(state, small.BATCH, small.BATCH, accuracy, val)
    drawn = state.metadata["perturbations"]
    assert not drawn["held"].any()
    assert bool((drawn["mask"] != 0).all())


@pytest.mark.slow
def test_forward_mode_goes_through_a_loop_without_a_reverse():
    lam = {"rate": jnp.asarray(-2.0), "mask": jnp.ones(3)}

    def val(w, lam, batch):
        del lam
        return small.val_loss(w, {"l": jnp.zeros(3)}, batch)

    optimizer = ForwardGradientOptimizer(None, OUTER, update_fn=halved)
    state = optimizer.init(-jnp.ones(3), lam)
    with pytest.warns(gradhpo.UnreachedWarning, match="mask"):
        found = optimizer.compute_hypergradient(state, small.BATCH, small.BATCH, val, val)["rate"]

    def objective(rate):
        return val(halved(-jnp.ones(3), lam | {"rate": rate}, small.BATCH), None, small.BATCH)

    along = jax.jvp(objective, (lam["rate"],), (jnp.ones(()),))[1]
    assert_close(found, along, rtol=1e-5)
    assert float(abs(found)) > 1e-3


# --- Episodes, resuming, doors ------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_goes_on_within_an_episode_has_the_same_bits():
    optimizer = NRESOptimizer(INNER, OUTER, **SMALL)
    solve = functools.partial(
        gradhpo.solve, PROBLEM, optimizer, key=jax.random.key(3), episode_length=3,
        lr_reptile=0.0, progress=False,
    )  # fmt: skip
    whole, part = solve(8), solve(4)
    again = solve(8, resume=part)
    assert_same_bits(again.state, whole.state)
    drawn = whole.state.metadata["perturbations"]["decay"]
    assert len(np.unique(drawn)) == SMALL["particles"] // 2


@pytest.mark.slow
def test_particles_start_anew_with_an_episode_and_walk_as_the_weights_do():
    """With one perturbation that is 0, a particle's weights are the state's own."""
    optimizer = PESOptimizer(INNER, optax.chain(optax.set_to_zero()), **SMALL)
    found = gradhpo.solve(
        PROBLEM, optimizer, 5, jax.random.key(0), episode_length=3, progress=False
    )
    walkers = found.state.metadata["particles"]
    each = np.broadcast_to(found.state.params, walkers.params.shape)
    np.testing.assert_allclose(walkers.params, each, rtol=1e-6)
    assert not jax.flatten_util.ravel_pytree(found.state.metadata["perturbations"])[0].any()


@pytest.mark.slow
def test_one_slot_of_a_population_is_a_solve():
    optimizer, key = NRESOptimizer(INNER, OUTER, **SMALL), jax.random.key(3)
    alone = gradhpo.solve(PROBLEM, optimizer, 4, key, episode_length=3, progress=False)
    trials = Population(PROBLEM, optimizer, 2, batching="map", episode_length=3)
    keys = jnp.stack([key, jax.random.key(4)])
    state, _ = trials.run(trials.init(keys), 4, keys)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(lambda a, b: close(a[0], b), state.hyperparams, alone.state.hyperparams)
    assert not np.allclose(state.hyperparams["l"][0], state.hyperparams["l"][1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PESOptimizer, ForwardGradientOptimizer])
def test_divided_batches_give_the_estimate_of_whole_ones(kind):
    given = SMALL if kind is PESOptimizer else {"unroll_steps": 2, "directions": 3}
    optimizer = kind(INNER, OUTER, **given)
    divided = data_parallel(optimizer, make_mesh(data=4))
    losses = (small.BATCH, small.BATCH, small.train_loss, small.val_loss)
    found = [
        one.compute_hypergradient(one.init(*small.start()), *losses) for one in (divided, optimizer)
    ]
    assert_close(*found, rtol=1e-3, atol=1e-5)


def method(method):
    """The optimizer of a sweep, by the name of its choice."""
    return KINDS[method](INNER, OUTER, **SMALL)


@pytest.mark.slow
def test_methods_of_a_sweep_by_name_go_on_after_a_generation(tmp_path):
    def sweep(folder, generations):
        space = SearchSpace({"decay": uniform(-4.0, -2.0)}, choices={"method": ["pes"]})
        return Sweep(
            problem=PROBLEM, optimizer=method, space=space, population=2,
            generations=generations, steps_per_generation=2, episode_length=3,
            scheduler=PBT(), storage=tmp_path / folder, executor="local", batching="map",
            progress=False,
        )  # fmt: skip

    whole = sweep("whole", 3).run()
    sweep("parts", 1).run()
    assert_same_tables(sweep("parts", 3).run(), whole)


@pytest.mark.slow
def test_losses_may_remember_and_draw():
    def train(w, lam, batch, model_state, key):
        x, y = batch
        noisy = x + 0.1 * jax.random.normal(key, x.shape)
        mean = 0.9 * model_state + 0.1 * noisy.mean(0)
        loss = jnp.mean(((noisy - mean) @ w - y) ** 2) + jnp.exp(lam["decay"]) * w @ w
        return loss, gradhpo.Aux(mean, {"largest": jnp.abs(w).max()})

    def val(w, lam, batch, model_state):
        del lam
        x, y = batch
        return jnp.mean(((x - model_state) @ w - y) ** 2)

    problem = gradhpo.Problem(
        lambda key: (jnp.ones(3), {"decay": jnp.asarray(-3.0)}, jnp.zeros(3)),
        train, val, batch=lambda key: (small.BATCH, small.BATCH),
    )  # fmt: skip
    optimizer = PESOptimizer(INNER, OUTER, objective="mean", **SMALL)
    found = gradhpo.solve(problem, optimizer, 4, jax.random.key(0), progress=False)
    walkers = found.state.metadata["particles"]
    assert walkers.model_state.shape == (8, 2, 3)
    assert len(np.unique(walkers.model_state[:, :, 0])) == 1  # all see the same data and keys
    assert len(np.unique(walkers.params[:, :, 0])) == 16
    assert np.isfinite(found.metrics["train_largest"]).all()


# --- Layouts ------------------------------------------------------------------------------------


TASK = (small.BATCH, small.BATCH, small.train_loss, small.val_loss)


@functools.cache
def stepped(devices=None, chunk=None, kind=PESOptimizer):
    """An optimizer, and its state after three steps."""
    mesh = None if devices is None else make_mesh(trial=devices, data=1)
    given = {"directions": 16, "unroll_steps": 2} if kind is ForwardGradientOptimizer else SMALL
    if kind is not ForwardGradientOptimizer:
        given = given | {"particles": 32}
    optimizer = kind(INNER, OUTER, chunk=chunk, mesh=mesh, **given)
    state = optimizer.init(*small.start(), key=jax.random.key(5))
    for _ in range(3):
        state = optimizer.step(state, *TASK)
    return optimizer, state


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PESOptimizer, ForwardGradientOptimizer])
def test_eight_devices_give_the_numbers_of_one_with_one_reduction(kind):
    (_, one), (optimizer, eight) = stepped(kind=kind), stepped(8, kind=kind)
    program = optimizer.lower_step(eight, *TASK).compile().as_text()
    assert program.count(" all-reduce(") + program.count(" all-reduce-start(") == 1
    assert not any(f" {name}(" in program for name in ("all-gather", "all-to-all"))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        eight.hyperparams, one.hyperparams,
    )  # fmt: skip
    if kind is PESOptimizer:
        # What is drawn does not depend on where: the same bits.
        noise = [state.metadata["perturbations"] for state in (one, eight)]
        assert_same_bits(*noise)
        walkers = eight.metadata["particles"].params
        assert {part.data.shape for part in walkers.addressable_shards} == {(2, 2, 3)}
        np.testing.assert_allclose(walkers, one.metadata["particles"].params, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [None, 2])
def test_chunks_change_nothing_but_rounding(devices):
    whole, chunked = stepped()[1], stepped(devices, chunk=4)[1]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, chunked.hyperparams, whole.hyperparams)
    assert_same_bits(chunked.metadata["perturbations"], whole.metadata["perturbations"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"particles": 7}, "particles must be even, as they walk in pairs; got 7"),
        ({"sigma": 0.0}, "sigma must be a number in"),
        ({"objective": "best"}, "objective must be one of"),
        ({"chunk": 3}, r"chunk must divide the particles / 2 of a device, 8; got 3"),
        ({"mesh": (8, "trial"), "particles": 12}, r"must be a multiple of 8 devices, got 6"),
        ({"mesh": (8, "trial"), "axis": "row"}, r"axis must be one of the mesh's .*, got 'row'"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_by_name(wrong, message):
    if "mesh" in wrong:
        wrong = wrong | {"mesh": make_mesh(trial=8)}
    with pytest.raises(ValueError, match=message):
        PESOptimizer(INNER, OUTER, **(SMALL | wrong))


def test_batches_or_slots_and_particles_are_not_divided_both():
    mesh = make_mesh(trial=8)
    optimizer = PESOptimizer(INNER, OUTER, mesh=mesh, **SMALL)
    with pytest.raises(ValueError, match=r"divides batches, and .* give one of the two"):
        data_parallel(optimizer, mesh)
    with pytest.raises(ValueError, match=r"divides slots, and .* give one of the two"):
        Population(PROBLEM, optimizer, 8, mesh)


@pytest.mark.slow
def test_a_population_whose_particles_lie_over_devices():
    def states(mesh):
        optimizer = PESOptimizer(INNER, OUTER, mesh=mesh, **SMALL)
        trials = Population(PROBLEM, optimizer, 2, batching="vmap")
        state, keys = trials.init(jax.random.key(0)), jax.random.split(jax.random.key(1), 2)
        for _ in range(2):
            state, _ = trials.run(state, 2, keys)
        return trials.select(state, np.asarray([1, 0])).hyperparams

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, states(make_mesh(trial=8)), states(None))

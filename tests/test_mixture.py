"""Data mixtures: mirror descent, sampling without bias, and mixtures that are known to be best."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import mixture
from gradhpo.mixture.sampling import systematic
from gradhpo.mixture.simplex import raised

CORNERS = np.array([[0, 0], [4, 0], [0, 4]], np.float32)
BEST = np.array([0.2, 0.5, 0.3], np.float32)
"""The mixture of the corners whose mean is the target."""
NAMES = ("a", "b", "c")
INNER = optax.sgd(0.5)


def point(row, n=5):
    """Return a domain of equal rows, so that a batch of it has no noise."""
    return np.tile(np.asarray(row, np.float32), (n, 1))


def loss(w, rows):
    """A model is a point, and a loss the squared distance: it ends at the mixture's mean."""
    return 0.5 * jnp.sum((rows - w) ** 2, axis=-1)


def start(key):
    return jnp.ones(2) + 0 * jax.random.normal(key, (2,))


def corners(**changes):
    settings = {
        "init": start,
        "loss": loss,
        "domains": dict(zip(NAMES, map(point, CORNERS), strict=True)),
        "targets": {"mean": point(BEST @ CORNERS)},
        "rows": 6,
        "target_rows": 2,
    }
    return mixture.Mixture(**{**settings, **changes})


def outer(rate=0.1, floor=0.0):
    return optax.chain(mixture.scale_by_spread(0.9), mixture.entropic_descent(rate, floor=floor))


def falling(rate, steps):
    return optax.linear_schedule(rate, 0.0, steps)


# --- the simplex ---------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_entropic_descent_is_the_exponentiated_gradient(smoothing):
    rng = np.random.default_rng(0)
    gradients, p = rng.normal(size=(20, 4)), np.full(4, 0.25)
    descent = mixture.entropic_descent(lambda count: 0.1 * (count + 1), smoothing=smoothing)
    q = jnp.full(4, 0.25)
    state = descent.init(q)
    for step, g in enumerate(gradients):
        p = p * np.exp(-0.1 * (step + 1) * g)
        p = (1 - smoothing) * p / p.sum() + smoothing / 4
        moves, state = descent.update(jnp.asarray(g, jnp.float32), state, q)
        q = optax.apply_updates(q, moves)
    np.testing.assert_allclose(q, p, rtol=2e-4)


@pytest.mark.parametrize("p", [(0.9, 0.05, 0.05), (0.98, 0.015, 0.005), (0, 0, 1), (0.3, 0.3, 0.4)])
def test_the_floor_is_the_nearest_point_by_kl(p):
    p, floor = np.asarray(p, np.float32), 0.1
    q = np.asarray(raised(jnp.asarray(p), floor))
    assert q.min() >= floor - 1e-6
    np.testing.assert_allclose(q.sum(), 1, rtol=1e-5)
    free = q > floor + 1e-6
    ratios = q[free] / p[free]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)
    assert (p[~free] * ratios[0] <= floor + 1e-6).all()


def test_a_floor_holds_over_a_run_of_steps():
    descent, p = mixture.entropic_descent(1.0, floor=0.02), jnp.full(3, 1 / 3)
    state = descent.init(p)
    for _ in range(30):
        moves, state = descent.update(jnp.asarray([1.0, 0.0, -1.0]), state, p)
        p = optax.apply_updates(p, moves)
    np.testing.assert_allclose(p, [0.02, 0.02, 0.96], atol=1e-5)


def test_softmax_descent_moves_logits():
    z, floor = jnp.asarray([0.3, -0.2, 0.5]), 0.05

    def weights(z):
        return floor + (1 - 3 * floor) * jax.nn.softmax(z)

    g = jnp.asarray([1.0, -2.0, 0.5])
    descent = mixture.softmax_descent(optax.sgd(0.1), floor=floor)
    p = weights(z)
    moves, _ = descent.update(g, descent.init(p), p)
    expected = weights(z - 0.1 * jax.grad(lambda z: g @ weights(z))(z))
    np.testing.assert_allclose(p + moves, expected, rtol=1e-5)


def test_a_spread_has_one_scale_and_no_mean():
    scale, g = mixture.scale_by_spread(), jnp.asarray([3.0, 1.0, 2.0])
    moves, _ = scale.update(g, scale.init(g))
    np.testing.assert_allclose(moves, np.array([1, -1, 0]) / math.sqrt(2 / 3), rtol=1e-5)
    same, _ = scale.update(100 * g + 7, scale.init(g))
    np.testing.assert_allclose(same, moves, rtol=1e-4)
    np.testing.assert_array_equal(scale.update(jnp.ones(3), scale.init(g))[0], np.zeros(3))


# --- sampling ------------------------------------------------------------------------------------


def test_systematic_sampling_has_the_weights_in_the_mean():
    weights, rows = jnp.asarray([0.05, 0.62, 0.33]), 7
    offsets = (jnp.arange(1000) + 0.5) / 1000
    found = jax.vmap(lambda u: systematic(u, weights, rows))(offsets)
    counts = np.stack([(np.asarray(found) == i).sum(1) for i in range(3)], axis=1)
    assert np.abs(counts - rows * np.asarray(weights)).max() < 1
    np.testing.assert_allclose(counts.mean(0), rows * np.asarray(weights), atol=0.02)


def test_sampled_domains_give_the_weighted_loss_and_its_derivatives_in_the_mean():
    weighted, sampled = corners(), corners(draw="sampled")
    w, p = jnp.asarray([1.0, 2.0]), jnp.asarray([0.1, 0.6, 0.3])
    pool = {which: jnp.asarray(CORNERS)[:, None].repeat(n, 1) for which, n in ((0, 2), (1, 6))}

    def mixed(w, p, offset):
        """The loss, its gradient in the model, and how that moves with the mixture."""

        def of(w, p):
            if offset is None:
                return weighted.train_loss(w, {"weights": p}, {"rows": pool[0]})
            batch = {"rows": pool[1], "offset": offset}
            return sampled.train_loss(w, {"weights": p}, batch)

        return of(w, p), jax.grad(of)(w, p), jax.jacobian(jax.grad(of), 1)(w, p)

    offsets = (jnp.arange(2000) + 0.5) / 2000
    every = jax.jit(jax.vmap(lambda u: mixed(w, p, u)))(offsets)
    for found, expected in zip(
        jax.tree.map(lambda x: x.mean(0), every), jax.jit(lambda: mixed(w, p, None))(), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)


def test_rows_are_drawn_of_their_own_domain():
    sizes = (3, 1, 6)
    domains = {n: point(c, s) for n, c, s in zip(NAMES, CORNERS, sizes, strict=True)}
    made = corners(domains=domains)
    data = made.problem.start_data(jax.random.key(0))
    train, val = made.problem.draw_at(jax.random.key(1), 0, data)
    np.testing.assert_array_equal(train["rows"], CORNERS[:, None].repeat(2, 1))
    assert val.shape == (1, 2, 2)
    np.testing.assert_allclose(made.proportional, np.array(sizes) / 10)


# --- the best mixture is known -------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["weighted", pytest.param("sampled", marks=pytest.mark.slow)])
def test_the_mixture_that_is_best_is_found(draw):
    made, steps = corners(draw=draw, rows=24), 400
    tuner = gradhpo.OneStepOptimizer(INNER, outer(falling(0.2, steps)))
    solution = gradhpo.solve(made.problem, tuner, steps, jax.random.key(0), record=["weights"])
    found = mixture.mean_weights(solution, skip=0.75)
    np.testing.assert_allclose(found, BEST, atol=0.04)
    np.testing.assert_allclose(np.asarray(solution.record["weights"]).sum(-1), 1, atol=1e-5)


def test_a_useless_domain_ends_at_the_floor_and_a_changed_one_is_priced_anew():
    def flat(row):  # the far domain leads out of the plane of all others
        return point([*row, 0])

    in_plane = {name: flat(row) for name, row in zip(NAMES, CORNERS, strict=True)}
    settings = {"init": lambda key: jnp.ones(3), "rows": 8, "targets": {"m": flat(BEST @ CORNERS)}}
    with_far = {**in_plane, "far": point([0, 0, 9])}
    made, steps = corners(domains=with_far, **settings), 300
    tuner = gradhpo.OneStepOptimizer(INNER, outer(falling(0.2, steps), floor=0.005))
    first = gradhpo.solve(made.problem, tuner, steps, jax.random.key(0), record=["weights"])
    found = np.asarray(first.state.hyperparams["weights"])
    assert 0.005 - 1e-6 < found[3] < 0.02
    np.testing.assert_allclose(found[:3], BEST, atol=0.05)

    # What was far is the target itself now, and the three others go on as they were.
    now = {**with_far, "far": flat(BEST @ CORNERS)}
    changed = corners(domains=now, **settings).continued(first, ["far"])
    np.testing.assert_allclose(changed.first_weights[3], 0.25)
    ratios = changed.first_weights[:3] / found[:3]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-4)
    data = changed.problem.start_data(jax.random.key(0))
    np.testing.assert_array_equal(changed.problem.start(jax.random.key(5))[0], first.state.params)
    assert data["domains"].shape == (20, 3)


def test_several_targets_are_one_by_the_objective():
    targets = {"left": point([0, 0]), "right": point([4, 0])}
    made = corners(targets=targets, objective=jnp.max)
    _, val = made.problem.draw_at(jax.random.key(0), 0, made.problem.start_data(jax.random.key(0)))
    w, lam = jnp.asarray([1.0, 0.0]), {"weights": jnp.full(3, 1 / 3)}
    np.testing.assert_allclose(made.problem.val_loss(w, lam, val), 0.5 * 9)
    mean = corners(targets=targets).problem.val_loss(w, lam, val)
    np.testing.assert_allclose(mean, 0.5 * (1 + 9) / 2)


# --- without hypergradients ----------------------------------------------------------------------


def test_a_lattice_has_every_mixture_once():
    grid = mixture.simplex_grid(3, 8)
    assert grid.shape == (math.comb(10, 2), 3)
    assert len({tuple(row) for row in grid.tolist()}) == len(grid)
    np.testing.assert_allclose(grid.sum(1), 1)
    assert grid.min() == 0


def test_a_regression_finds_the_minimum_of_a_quadratic():
    grid = mixture.simplex_grid(3, 6)
    losses = ((grid - BEST) ** 2).sum(1)
    losses[3] = np.nan
    np.testing.assert_allclose(mixture.predicted_best(grid, losses), BEST, atol=0.02)
    assert mixture.predicted_best(grid, -grid[:, 0], floor=0.1).min() >= 0.1


@pytest.mark.slow
def test_fixed_mixtures_train_to_their_means():
    grid = mixture.simplex_grid(3, 2)
    keys = jax.random.split(jax.random.key(0), len(grid))
    found = mixture.train_fixed(corners(), grid, INNER, 25, keys, batching="vmap")
    expected = 0.5 * ((grid @ CORNERS - BEST @ CORNERS) ** 2).sum(1)
    np.testing.assert_allclose(found["target/mean"], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_group_dro_is_the_algorithm_in_numpy():
    steps, rate, smoothing = 4, 0.3, 0.05
    found = mixture.group_dro(
        corners(), INNER, steps, jax.random.split(jax.random.key(0), 2),
        learning_rate=rate, smoothing=smoothing, batching="vmap",
    )  # fmt: skip

    def losses(w):
        return 0.5 * ((CORNERS - w) ** 2).sum(1)

    uniform = np.full(3, 1 / 3)
    reference, w, p, seen = np.ones(2), np.ones(2), uniform, []
    for _ in range(steps):
        reference = reference - 0.5 * (reference - uniform @ CORNERS)
    for _ in range(steps):
        w = w - 0.5 * (w - p @ CORNERS)
        p = p * np.exp(rate * np.maximum(losses(w) - losses(reference), 0))
        p = (1 - smoothing) * p / p.sum() + smoothing / 3
        seen.append(p)
    np.testing.assert_allclose(found[0], found[1])
    # A step's metrics are measured before λ moves.
    np.testing.assert_allclose(found[0], np.mean([uniform, *seen[:-1]], axis=0), rtol=1e-4)


def test_ranks_are_spearmans():
    a, b = [3.0, 1.0, 2.0, 5.0, 4.0], [30.0, 10.0, 20.0, 40.0, 50.0]
    assert mixture.rank_correlation(a, b) == pytest.approx(0.9)
    assert mixture.rank_correlation([1, 1, 2], [1, 1, 3]) == pytest.approx(1)


# --- compared ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_ways_are_compared_at_counted_flops():
    made, steps = corners(), 40
    grid = mixture.simplex_grid(3, 4)
    tuner = gradhpo.OneStepOptimizer(INNER, outer(falling(0.5, steps)))
    told = []
    found = mixture.compare(
        made, {"One-Step": tuner}, INNER, steps, jax.random.key(0),
        seeds=2, swarm=grid, batching="vmap", progress=told.append,
    )  # fmt: skip
    baselines = ["uniform", "proportional", "group DRO", "swarm", "swarm + regression"]
    assert list(found.losses) == [*baselines, "One-Step"]
    assert {x.shape for x in found.weights.values()} == {(2, 3)}
    off = (np.full(3, 1 / 3) - BEST) @ CORNERS
    np.testing.assert_allclose(found.losses["uniform"], 0.5 * off @ off, rtol=1e-3)
    assert found.gain("uniform") == 0
    assert found.gain("swarm") == 1
    assert found.gain("One-Step") > 0.5
    assert found.flops["uniform"] == 0
    assert found.flops["swarm"] == len(grid) * found.training_flops
    assert 1 < found.flops["One-Step"] / found.training_flops < 6
    assert 2 < found.flops["group DRO"] / found.training_flops < 4
    assert found.paths["One-Step"].shape == (2, steps, 3)
    text = str(found).splitlines()
    assert len(text) == 7
    assert "weights: a, b, c" in text[0]
    assert found._repr_html_().count("<tr") == 7
    assert len(told) == 4


@pytest.mark.slow
def test_an_unrolled_step_takes_a_stack_and_costs_as_many_trainings():
    made = corners(stack=4)
    tuner = gradhpo.UnrolledOptimizer(INNER, outer(0.3), unroll_steps=4, batches="stack")
    solution = gradhpo.solve(made.problem, tuner, 3, jax.random.key(0), record=["weights"])
    assert solution.metrics["val_loss"][-1] < solution.metrics["val_loss"][0]
    train, val = made.problem.draw_at(
        jax.random.key(0), 0, made.problem.start_data(jax.random.key(0))
    )
    assert train["rows"].shape == (4, 3, 2, 2)
    assert val.shape == (1, 2, 2)
    one = mixture.training_flops(corners(), INNER)
    assert 4 < mixture.search_flops(made, tuner, 1) / one < 40


# --- data of the host ----------------------------------------------------------------------------


def loader(row, rows):
    def read(rng):
        while True:
            yield point(row, rows) + 0 * rng.normal(size=(rows, 2)).astype(np.float32)

    return read


@pytest.mark.parametrize(("draw", "stack"), [("weighted", None), ("sampled", 2)])
def test_loaders_of_domains_give_the_same_batches(draw, stack):
    n = 2 if draw == "weighted" else 6
    loaders = {name: loader(row, n) for name, row in zip(NAMES, CORNERS, strict=True)}
    made = corners(domains=loaders, draw=draw, stack=stack, sizes=[1, 1, 2])
    pairs = made.problem.batches(np.random.default_rng(0))
    train, val = next(iter(pairs))
    expected = CORNERS[:, None].repeat(n, 1)
    np.testing.assert_array_equal(train["rows"] if stack is None else train["rows"][1], expected)
    assert val.shape == (1, 2, 2)
    np.testing.assert_allclose(made.proportional, [0.25, 0.25, 0.5])
    if stack is None:
        tuner = gradhpo.OneStepOptimizer(INNER, outer(falling(0.5, 40)))
        done = gradhpo.solve(made.problem, tuner, 40, jax.random.key(0), record=["weights"])
        assert done.metrics["val_loss"][-1] < 0.2 * done.metrics["val_loss"][0]


def test_a_loader_with_another_number_of_rows_is_named():
    loaders = {"a": loader([0, 0], 2), "b": loader([0, 0], 3), "c": loader([0, 0], 2)}
    pairs = corners(domains=loaders).problem.batches(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"domains\['b'\] must have a leading axis of length 2"):
        next(iter(pairs))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"rows": 7}, ValueError, "rows must be a multiple of the 3 domains"),
        ({"draw": "mixed"}, ValueError, 'draw must be "weighted" or "sampled"'),
        ({"weights": [0.5, 0.5]}, ValueError, "weights must have 3 numbers"),
        ({"weights": [0.5, 0.6, 0.5]}, ValueError, "add up to 1"),
        ({"domains": {}}, ValueError, "domains must have names"),
        ({"targets": [1, 2]}, TypeError, "targets must be a mapping"),
        ({"sizes": [1, 2]}, ValueError, "sizes must have shape"),
        ({"hyperparams": {"weights": 1.0}}, ValueError, "hyperparams must not have"),
        ({"domains": {"a": point([0, 0]), "b": np.zeros((4, 3), np.float32)}, "rows": 6},
         ValueError, "domains"),
        ({"domains": {"a": loader([0, 0], 2), "b": point([0, 0])}, "rows": 6}, TypeError,
         "must be a function"),
        ({"stack": 0}, ValueError, "stack must be at least 1"),
    ],
)  # fmt: skip
def test_what_a_mixture_refuses(changes, error, match):
    with pytest.raises(error, match=match):
        corners(**changes)


def test_what_the_functions_refuse():
    made, keys = corners(), jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="floor must be below 1/3"):
        mixture.entropic_descent(0.1, floor=0.4).init(jnp.full(3, 1 / 3))
    with pytest.raises(ValueError, match="add up to 1"):
        mixture.train_fixed(made, [[1, 1, 1], [0, 0, 1]], INNER, 1, keys)
    tuner = gradhpo.OneStepOptimizer(INNER, outer())
    with pytest.raises(ValueError, match="other names than the baselines"):
        mixture.compare(made, {"swarm": tuner}, INNER, 1, jax.random.key(0))
    with pytest.raises(ValueError, match="score must be one of"):
        mixture.compare(made, {}, INNER, 1, jax.random.key(0), score="nothing")
    with pytest.raises(ValueError, match="two finite numbers"):
        mixture.predicted_best(np.eye(3), [1.0, np.nan, np.nan])
    loose = corners(loss=lambda w, rows: jnp.mean(loss(w, rows)))
    with pytest.raises(ValueError, match="loss of each of 6 rows"):
        loose.train_loss(
            jnp.ones(2), {"weights": jnp.full(3, 1 / 3)}, {"rows": jnp.ones((3, 2, 2))}
        )

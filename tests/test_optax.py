"""Every optimizer of optax and optax.contrib as an inner optimizer: exact, at zero too, or refused.

The names are read from the modules, so that what a new optax brings is tested or noticed.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from gradhpo import OneStepOptimizer, Task, UnrolledOptimizer
from tests.quick import slow_but

# Some of optax's own are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LR = 0.05
SGD = optax.sgd(LR)
MOMENTUM = optax.sgd(LR, momentum=0.9)


def optimizers_of(module):
    """The names of a module's public functions that return a gradient transformation."""
    untold = {"dog", "dowg", "hutchinson_estimator_diag_hessian", "monitor"}  # not in their types
    found = set()
    for name, function in vars(module).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            returns = str(inspect.signature(function).return_annotation)
            told = "GradientTransformation" in returns and "Callable" not in returns
            if told or name in untold or name.startswith("scale_by_"):
                found.add(name)
    return found


NAMES = sorted(optimizers_of(optax)) + sorted(f"contrib.{n}" for n in optimizers_of(contrib))

# What takes more than a learning rate, or is made of other optimizers: of Adam where its roots at
# zero come into another form, and else of momentum, which compiles sooner.
BUILT = {
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), SGD),
    "add_noise": lambda: optax.chain(optax.add_noise(0.01, 0.5, key=0), SGD),
    "apply_every": lambda: optax.chain(optax.apply_every(2), SGD),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(LR), 2),
    "chain": lambda: optax.chain(optax.clip(0.1), optax.adam(LR)),
    "clip": lambda: optax.chain(optax.clip(0.1), SGD),
    "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.1), SGD),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), SGD),
    "conditionally_mask": lambda: optax.conditionally_mask(optax.adam(LR), lambda step: step < 9),
    "conditionally_transform": lambda: optax.conditionally_transform(
        optax.adam(LR), lambda step: step < 9
    ),
    "ema": lambda: optax.chain(optax.ema(0.9), SGD),
    "flatten": lambda: optax.flatten(optax.adam(LR)),
    "freeze": lambda: optax.chain(SGD, optax.freeze({"w": False})),
    "masked": lambda: optax.masked(MOMENTUM, {"w": True}),
    "multi_transform": lambda: optax.multi_transform({"a": MOMENTUM}, {"w": "a"}),
    "named_chain": lambda: optax.named_chain(("momentum", MOMENTUM)),
    "noisy_sgd": lambda: optax.noisy_sgd(LR, key=0),
    "normalize_by_update_norm": lambda: optax.chain(optax.normalize_by_update_norm(), SGD),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(LR),
    "partition": lambda: optax.partition({"a": MOMENTUM}, {"w": "a"}),
    "polyak_sgd": lambda: optax.polyak_sgd(LR),
    "scale": lambda: optax.scale(-LR),
    "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(LR),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: -LR / (1 + count)),
    "selective_transform": lambda: optax.selective_transform(MOMENTUM, freeze_mask={"w": False}),
    "snapshot": lambda: optax.chain(
        optax.snapshot("norm", lambda updates, *_, **__: optax.tree.norm(updates)), SGD
    ),
    "stateless": lambda: optax.stateless(lambda g, _: jax.tree.map(lambda x: -LR * x, g)),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda g, _: -LR * g),
    "trace": lambda: optax.chain(optax.trace(0.9), SGD),
    "with_extra_args_support": lambda: optax.with_extra_args_support(MOMENTUM),
    "contrib.mechanize": lambda: contrib.mechanize(optax.adam(LR)),
    "contrib.reduce_on_plateau": lambda: optax.chain(SGD, contrib.reduce_on_plateau(patience=1)),
    "contrib.sam": lambda: contrib.sam(SGD, optax.chain(contrib.normalize(), optax.sgd(0.01))),
    "contrib.scale_by_galore": lambda: optax.chain(contrib.scale_by_galore(rank=1), SGD),
    "contrib.galore": lambda: contrib.galore(LR, rank=1),
    "contrib.scale_by_muon": lambda: optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers={"w": contrib.MuonDimensionNumbers()}), SGD
    ),
    "contrib.schedule_free": lambda: contrib.schedule_free(SGD, LR),
    "contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(MOMENTUM),
}
MORE = {
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(LR), 2),
    "MultiSteps of polyak_sgd": lambda: optax.MultiSteps(optax.polyak_sgd(LR), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(LR),
    "adafactor, factored": lambda: optax.adafactor(LR, min_dim_size_to_factor=2),
    "rmsprop, centered": lambda: optax.rmsprop(LR, centered=True, eps=1e-3),
    "rmsprop, eps outside": lambda: optax.rmsprop(LR, eps_in_sqrt=False),
    "lbfgs without a line search": lambda: optax.lbfgs(LR, linesearch=None),
    "sam in a chain": lambda: optax.chain(optax.clip(1.0), BUILT["contrib.sam"]()),
}

ASKS = "inner_optimizer asks for {}: it evaluates the loss anew"
PER_EXAMPLE = r"inner_optimizer's update has shape \(4,\), not \(3, 4\)"
REFUSED = {
    "lbfgs": (optax.lbfgs, ASKS.format("value_fn")),
    "scale_by_backtracking_linesearch": (
        lambda: optax.scale_by_backtracking_linesearch(5),
        ASKS.format("value_fn"),
    ),
    "scale_by_zoom_linesearch": (
        lambda: optax.scale_by_zoom_linesearch(5),
        ASKS.format("value_fn"),
    ),
    "contrib.hutchinson_estimator_diag_hessian": (
        contrib.hutchinson_estimator_diag_hessian,
        ASKS.format("obj_fn"),
    ),
    "contrib.sophia": (lambda: contrib.sophia(LR), ASKS.format("obj_fn")),
    "contrib.sam, opaque": (
        lambda: contrib.sam(SGD, SGD, opaque_mode=True),
        ASKS.format("grad_fn"),
    ),
    # They take a gradient for every example.
    "contrib.differentially_private_aggregate": (
        lambda: contrib.differentially_private_aggregate(1.0, 0.1, 0),
        PER_EXAMPLE,
    ),
    "contrib.dpsgd": (lambda: contrib.dpsgd(LR, 1.0, 0.1, 0), PER_EXAMPLE),
    # Its weights are of a kind of its own, `LookaheadParams`.
    "lookahead": (lambda: optax.lookahead(SGD, 2, 0.5), "has no attribute 'fast'"),
    # Its state grows at the first update, and fits no scan.
    "monitor": (
        lambda: optax.chain(optax.monitor({"norm": optax.tree.norm}), SGD),
        r"inner_optimizer's new state has the leaf \[0\]\.measurements\['norm'\]",
    ),
    # Its update is the measurement.
    "measure_with_ema": (
        lambda: optax.measure_with_ema(optax.tree.norm, 0.9),
        "inner_optimizer's update",
    ),
}
TAKEN = [name for name in [*NAMES, *MORE] if name not in REFUSED]
# What a transformation does over several steps, and at zero, the optimizer made of it does too;
# and what it does in a step, where that optimizer has its name.
WHOLE = [name for name in TAKEN if "scale_by_" not in name]
# Of each kind of update one: moments and decay, signs, norms, factors, the loss itself.
QUICK = ["adamw", "lion", "lamb", "adafactor", "polyak_sgd"]
FIRST_ROOT = {"radam", "contrib.mechanize"}  # autodiff has NaN in the first step
# The derivative of all steps has that of the last one in it: alone are seen what has none of all,
# one of each kind, and what acts in the steps of its own that One-Step differentiates.
ALONE = {*QUICK, *FIRST_ROOT, "MultiSteps", "contrib.sam", "contrib.schedule_free"}
STEPS = [
    name
    for name in TAKEN
    if (name in ALONE if name in WHOLE else name.replace("scale_by_", "") not in WHOLE)
]
# Linear in the gradient, as what momentum is wrapped in here: nothing happens at zero.
LINEAR = {"apply_every", "ema", "freeze", "masked", "multi_transform", "named_chain", "partition"}
LINEAR |= {"scale", "selective_transform", "sgd", "snapshot", "stateless", "trace"}
LINEAR |= {"stateless_with_tree_map", "with_extra_args_support"}
LINEAR |= {"contrib.split_real_and_imaginary"}
ROOTED = [name for name in WHOLE if name not in LINEAR]
EVERY_OTHER = {"MultiSteps", "MultiSteps of polyak_sgd", "apply_every"}  # act in the second step
RANDOM = {"add_noise", "noisy_sgd"}  # draw other numbers in another precision


def build(name):
    if name in BUILT | MORE:
        return (BUILT | MORE)[name]()
    module = contrib if name.startswith("contrib.") else optax
    factory = getattr(module, name.removeprefix("contrib."))
    if "learning_rate" in inspect.signature(factory).parameters:
        return factory(LR)
    return optax.chain(factory(), SGD)


# --- A layer of four units, the last of which may be dead; λ weighs the examples -----------------

_RNG = np.random.default_rng(0)
X, Y = np.abs(_RNG.normal(size=(3, 3))) + 0.1, _RNG.normal(size=3)
W, DEAD = _RNG.normal(size=(3, 4)), np.array([1.0, 1.0, 1.0, 0.0])


@functools.cache
def losses(dtype, activation):
    x, y = np.asarray(X, dtype), np.asarray(Y, dtype)

    def error(w, x):
        return (activation(x @ w["w"]).sum(-1) - y) ** 2

    def train(w, lam, batch):
        del batch
        return jnp.mean(jnp.exp(lam) * error(w, x))

    def val(w, lam, batch):
        del lam, batch
        return jnp.mean(error(w, x + np.asarray(0.1, dtype)))

    return train, val


def start(dtype, dead=False):
    w = np.where(DEAD, W, -np.abs(W)) if dead else W
    return {"w": jnp.asarray(w, dtype)}, jnp.zeros(3, dtype)


def plain_loop(inner, train, w, lam, state, steps):
    """Steps of optax alone, with the loss for those that look at it."""
    inner = inner if isinstance(inner, optax.MultiSteps) else optax.with_extra_args_support(inner)
    for _ in range(steps):
        value, gradient = jax.value_and_grad(train)(w, lam, None)
        extra = {"value": value, "grad": gradient}
        try:
            updates, state = inner.update(gradient, state, w, **extra)
        except TypeError:  # optax.contrib.sam
            updates, state = inner.update(gradient, state, w)
        w = optax.apply_updates(w, updates)
    return w, state


def exact(inner, train, val, w, lam, state, steps):
    return jax.grad(lambda lam: val(plain_loop(inner, train, w, lam, state, steps)[0], lam, None))(
        lam
    )


def evaluate(function, *args):
    """Compile cheaply what runs once."""
    cheap = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=cheap)(*args)


def assert_near(found, expected, rtol, floor=1e-15):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * scale + floor)


@pytest.mark.parametrize("name", slow_but(STEPS, *QUICK))
def test_one_step_is_the_derivative_of_the_last_step(name):
    with jax.enable_x64(True):
        inner, (train, val) = build(name), losses(np.float64, jnp.tanh)
        optimizer = OneStepOptimizer(inner, SGD)

        def both(w, lam):
            state = optimizer.init(w, lam)
            w, s = plain_loop(inner, train, w, lam, state.inner_opt_state, 1)
            state = state.update(params=w, inner_opt_state=s)
            found = optimizer.estimate(state, Task(None, None, train, val)).hypergradient
            return found, exact(inner, train, val, w, lam, s, 1)

        found, expected = evaluate(both, *start(np.float64))
        assert_near(found, expected, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_unrolled_is_the_derivative_of_all_steps(name):
    with jax.enable_x64(True):
        inner, (train, val) = build(name), losses(np.float64, jnp.tanh)
        steps = 3 if name in EVERY_OTHER | FIRST_ROOT else 2
        optimizer = UnrolledOptimizer(inner, SGD, unroll_steps=steps)

        def both(w, lam):
            state = optimizer.init(w, lam)
            found = optimizer.estimate(state, Task(None, None, train, val)).hypergradient
            return found, exact(inner, train, val, w, lam, state.inner_opt_state, steps)

        found, expected = evaluate(both, *start(np.float64))
        if name in FIRST_ROOT:
            assert np.isfinite(found).all()
            assert np.isnan(expected).all()
        else:
            assert_near(found, expected, 1e-9)


@pytest.mark.parametrize("name", slow_but(ROOTED, "adamw", "adafactor"))
def test_a_dead_unit_leaves_float32_near_float64(name):
    found = []
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            inner, (train, val) = build(name), losses(dtype, jax.nn.relu)
            optimizer = OneStepOptimizer(inner, SGD)

            def after_one(w, lam, inner=inner, train=train, val=val, optimizer=optimizer):
                state = optimizer.init(w, lam)
                w, s = plain_loop(inner, train, w, lam, state.inner_opt_state, 1)
                state = state.update(params=w, inner_opt_state=s)
                return optimizer.estimate(state, Task(None, None, train, val)).hypergradient

            found.append(np.asarray(evaluate(after_one, *start(dtype, dead=True))))
    assert np.isfinite(found).all()
    if name not in RANDOM:
        assert_near(*found, 0.02, floor=1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_differentiated_is_refused_before_it_is_compiled(name):
    make, message = REFUSED[name]
    with jax.enable_x64(True):
        optimizer = OneStepOptimizer(make(), SGD)
        with pytest.raises((TypeError, ValueError, AttributeError), match=message):
            optimizer.compute_hypergradient(
                optimizer.init(*start(np.float64)), None, None, *losses(np.float64, jnp.tanh)
            )

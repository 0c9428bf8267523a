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
    "scale_by_lbfgs": lambda: optax.chain(optax.scale_by_lbfgs(memory_size=2), SGD),
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
    "contrib.mechanize": lambda: contrib.mechanize(optax.adam(LR), num_betas=2),
    "contrib.reduce_on_plateau": lambda: optax.chain(SGD, contrib.reduce_on_plateau(patience=1)),
    "contrib.sam": lambda: contrib.sam(SGD, optax.chain(contrib.normalize(), optax.sgd(0.01))),
    "contrib.scale_by_galore": lambda: optax.chain(contrib.scale_by_galore(rank=1), SGD),
    "contrib.galore": lambda: contrib.galore(LR, rank=1),
    "contrib.muon": lambda: contrib.muon(LR, ns_steps=2),
    "contrib.scale_by_muon": lambda: optax.chain(
        contrib.scale_by_muon(
            ns_steps=2, weight_dimension_numbers={"w": contrib.MuonDimensionNumbers()}
        ),
        SGD,
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
    "lbfgs without a line search": lambda: optax.lbfgs(LR, memory_size=2, linesearch=None),
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
# A transformation is in the optimizer that has its name, and these in what they put together: Adam
# and a decay, a branch around Adam.
TOGETHER = {"adam", "adamaxw", "conditionally_mask", "contrib.schedule_free_sgd", "optimistic_adam"}
STEPS = [
    name
    for name in TAKEN
    if name not in TOGETHER and not ("scale_by_" in name and name.replace("scale_by_", "") in TAKEN)
]
# Of each kind of update one: moments and decay, signs, norms, factors, the loss itself.
QUICK = ["adamw", "lion", "lamb", "adafactor", "polyak_sgd"]
# Of each kind of state one, through which several steps are differentiated.
STATES = [
    *("adafactor, factored", "adamw", "amsgrad", "apply_every", "apply_if_finite", "freeze"),
    *("inject_hyperparams", "lbfgs without a line search", "masked", "multi_transform"),
    *("MultiSteps", "MultiSteps of polyak_sgd", "noisy_sgd", "novograd", "polyak_sgd", "radam"),
    *("rprop", "sgd", "sm3", "snapshot", "contrib.ademamix", "contrib.cocob", "contrib.dog"),
    *("contrib.galore", "contrib.madgrad", "contrib.mechanize", "contrib.momo_adam"),
    *("contrib.muon", "contrib.prodigy", "contrib.reduce_on_plateau", "contrib.sam"),
    *("contrib.schedule_free_adamw",),
]
FIRST_ROOT = {"radam", "contrib.mechanize"}  # autodiff has NaN in the first step
# Linear in the gradient, as what momentum is wrapped in here: nothing happens at zero.
LINEAR = {"apply_every", "ema", "freeze", "masked", "multi_transform", "named_chain", "partition"}
LINEAR |= {"scale", "selective_transform", "sgd", "snapshot", "stateless", "trace"}
LINEAR |= {"stateless_with_tree_map", "with_extra_args_support"}
LINEAR |= {"contrib.split_real_and_imaginary"}
# Without a root, a norm or a quotient: there is nothing that could be infinite.
ROOTLESS = {"add_decayed_weights", "add_noise", "centralize", "clip", "identity", "lion"}
ROOTLESS |= {"keep_params_nonnegative", "noisy_sgd", "optimistic_gradient_descent", "rprop"}
ROOTLESS |= {"set_to_zero", "sign_sgd", "signum", "zero_nans", "contrib.reduce_on_plateau"}
# Their roots are those of what they are made of here.
ROOTLESS |= {"chain", "MultiSteps of polyak_sgd", "sam in a chain"}
ROOTED = [name for name in STEPS if name not in LINEAR | ROOTLESS and "scale_by_" not in name]
EVERY_OTHER = {"MultiSteps", "MultiSteps of polyak_sgd", "apply_every"}  # act in the second step


def build(name):
    if name in BUILT | MORE:
        return (BUILT | MORE)[name]()
    module = contrib if name.startswith("contrib.") else optax
    factory = getattr(module, name.removeprefix("contrib."))
    if "learning_rate" in inspect.signature(factory).parameters:
        return factory(LR)
    return optax.chain(factory(), SGD)


@functools.cache
def one_step(name):
    return OneStepOptimizer(build(name), SGD)


# --- A layer of four units, the last of which may be dead; λ weighs the examples -----------------

_RNG = np.random.default_rng(0)
X, Y = np.abs(_RNG.normal(size=(3, 3))) + 0.1, _RNG.normal(size=3)
W, DEAD = np.abs(_RNG.normal(size=(3, 4))) / 2 + 0.1, np.array([1.0, 1.0, 1.0, -1.0])


@functools.cache
def losses(dtype):
    x, y = np.asarray(X, dtype), np.asarray(Y, dtype)

    def error(w, x):
        return (jax.nn.relu(jnp.tanh(x @ w["w"])).sum(-1) - y) ** 2

    def train(w, lam, batch):
        del batch
        return jnp.mean(jnp.exp(lam) * error(w, x))

    def val(w, lam, batch):
        del lam, batch
        return jnp.mean(error(w, x + np.asarray(0.1, dtype)))

    return train, val


def start(dtype, dead=False):
    return {"w": jnp.asarray(W * DEAD if dead else W, dtype)}, jnp.zeros(3, dtype)


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
    """By autodiff, operation by operation: what these compile to serves all optimizers."""
    return jax.grad(lambda lam: val(plain_loop(inner, train, w, lam, state, steps)[0], lam, None))(
        lam
    )


# What runs once is compiled cheaply.
CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnums=(0, 3, 4), compiler_options=CHEAP)
def of_two_steps(optimizer, w, lam, train, val):
    """The hypergradients of the first two steps of the library, from a first state."""

    def step(state, _):
        done = optimizer.estimate(state, Task(None, None, train, val))
        moved = {"params": done.params, "inner_opt_state": done.inner_opt_state}
        return state.update(**moved), done.hypergradient

    return jax.lax.scan(step, optimizer.init(w, lam), length=2)[1]


def assert_near(found, expected, rtol, floor=1e-15):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * scale + floor)


@pytest.mark.parametrize("name", slow_but(STEPS, *QUICK))
def test_one_step_is_the_derivative_of_the_last_step(name):
    with jax.enable_x64(True):
        optimizer, (train, val) = one_step(name), losses(np.float64)
        w, lam = start(np.float64)
        found = of_two_steps(optimizer, w, lam, train, val)[1]
        inner = optimizer.inner_optimizer
        w, s = plain_loop(inner, train, w, lam, inner.init(w), 1)
        assert_near(found, exact(inner, train, val, w, lam, s, 1), 1e-9)


@functools.partial(jax.jit, static_argnums=(0, 3, 4), compiler_options=CHEAP)
def hypergradient(optimizer, w, lam, train, val):
    state = optimizer.init(w, lam)
    return optimizer.estimate(state, Task(None, None, train, val)).hypergradient


@pytest.mark.parametrize("name", slow_but(STATES, "adamw"))
def test_unrolled_is_the_derivative_of_all_steps(name):
    with jax.enable_x64(True):
        inner, (train, val) = build(name), losses(np.float64)
        steps = 3 if name in EVERY_OTHER | FIRST_ROOT else 2
        w, lam = start(np.float64)
        optimizer = UnrolledOptimizer(inner, SGD, unroll_steps=steps)
        found = hypergradient(optimizer, w, lam, train, val)
        expected = exact(inner, train, val, w, lam, inner.init(w), steps)
        if name in FIRST_ROOT:
            assert np.isfinite(found).all()
            assert np.isnan(expected).all()
        else:
            assert_near(found, expected, 1e-9)


@pytest.mark.parametrize("name", slow_but(ROOTED, "adamw", "adafactor"))
def test_a_dead_unit_leaves_float32_near_float64(name):
    found = []
    for dtype in (np.float32, np.float64):  # the latter by the program of the test above
        with jax.enable_x64(dtype == np.float64):
            both = of_two_steps(one_step(name), *start(dtype, dead=True), *losses(dtype))
            found.append(np.asarray(both[1]))
    assert np.isfinite(found).all()
    assert_near(*found, 0.02, floor=1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_differentiated_is_refused_before_it_is_compiled(name):
    make, message = REFUSED[name]
    with jax.enable_x64(True):
        optimizer = OneStepOptimizer(make(), SGD)
        with pytest.raises((TypeError, ValueError, AttributeError), match=message):
            optimizer.compute_hypergradient(
                optimizer.init(*start(np.float64)), None, None, *losses(np.float64)
            )

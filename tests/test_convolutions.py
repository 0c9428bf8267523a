"""Convolutions on a CPU: the same numbers in every form, and no slow form inside a loop."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import gradhpo
from gradhpo import compilation
from gradhpo.parallel import Population, data_parallel, make_mesh
from tests.problems import assert_close, assert_same_bits
from tests.quick import slow_but

_rng = np.random.default_rng(0)
IMAGES, ROWS, CUBES = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC"), ("NDHWC", "DHWIO", "NDHWC")


def case(lhs, rhs, dimensions=IMAGES, strides=None, padding="SAME", **params):
    """Shapes of the operands, and the convolution as a function of them."""
    strides = strides or (1,) * (len(lhs) - 2)

    convolve = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=dimensions,
        **params,
    )
    return lhs, rhs, convolve


ODD = ((2, 0), (0, 3))
CASES = {
    "2-D": case((2, 6, 5, 3), (3, 3, 3, 4)),
    "2-D, strided": case((2, 7, 6, 3), (3, 2, 3, 4), strides=(2, 3), padding=ODD),
    "2-D, NCHW": case((2, 3, 6, 5), (4, 3, 3, 3), ("NCHW", "OIHW", "NCHW")),
    "2-D, mixed": case((6, 2, 3, 5), (3, 4, 3, 3), ("HNCW", "HOIW", "CWNH"), padding="VALID"),
    "2-D, negative padding": case((2, 8, 8, 3), (3, 3, 3, 4), padding=((-1, -2), (1, -1))),
    "2-D, kernel larger": case((2, 2, 2, 3), (3, 3, 3, 4)),
    "2-D, dilated": case((2, 7, 7, 3), (3, 3, 3, 4), rhs_dilation=(2, 1), padding=ODD),
    "2-D, transposed": case((2, 4, 4, 3), (3, 3, 3, 4), lhs_dilation=(2, 2), padding=ODD),
    "2-D, 1x1": case((2, 5, 5, 3), (1, 1, 3, 4)),
    "2-D, no rows": case((0, 5, 5, 3), (3, 3, 3, 4)),
    "1-D": case((3, 9, 4), (5, 4, 6), ROWS),
    "1-D, strided": case((3, 10, 4), (3, 4, 6), ROWS, (3,), ((1, 2),)),
    "3-D": case((2, 4, 3, 4, 2), (2, 3, 2, 2, 3), CUBES),
    "0-D": case((3, 4), (4, 5), ("NC", "IO", "NC"), (), ()),
    "depthwise": case((2, 6, 5, 4), (3, 3, 1, 4), feature_group_count=4),
    "depthwise, strided": case(
        (2, 7, 7, 4), (3, 2, 1, 4), strides=(2, 2), padding=ODD, feature_group_count=4
    ),
    "depthwise, multiplied": case(
        (2, 6, 5, 4), (3, 3, 1, 8), rhs_dilation=(1, 2), feature_group_count=4
    ),
    "depthwise, transposed": case(
        (2, 4, 4, 4), (3, 3, 1, 4), lhs_dilation=(2, 3), padding=ODD, feature_group_count=4
    ),
    "depthwise, 1-D": case((3, 9, 4), (5, 1, 4), ROWS, feature_group_count=4),
    "depthwise, long kernel": case((2, 90, 3), (70, 1, 3), ROWS, feature_group_count=3),
    "grouped": case((2, 6, 5, 4), (3, 3, 2, 6), strides=(2, 1), feature_group_count=2),
    "grouped, larger kernel": case((2, 2, 2, 4), (3, 3, 2, 6), feature_group_count=2),
    "batch groups": case((6, 5, 4, 3), (3, 3, 3, 4), batch_group_count=2),
}
QUICK = ["2-D", "depthwise, multiplied"]
# Sums in another order: these equal XLA's to rounding, the others to the bit.
ROUNDED = re.compile("depthwise|group|larger|transposed|negative")


def operands(name, dtype):
    lhs, rhs, convolve = CASES[name]
    x, w = (jnp.asarray(_rng.normal(size=shape), dtype) for shape in (lhs, rhs))
    return x, w, convolve


def derivatives(convolve):
    """The value, the gradients and a product of second derivatives, of a loss of it."""

    def loss(x, w):
        return jnp.sum(jnp.sin(convolve(x, w)))

    def all_of_them(x, w):
        gradient, pull = jax.vjp(jax.grad(loss, (0, 1)), x, w)
        return convolve(x, w), gradient, pull(gradient)

    return all_of_them


# What XLA chooses is in its own program; how LLVM compiles that is not looked at.
CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def slow(program, *args):
    """The convolutions of a compiled program that XLA's fast kernels do not take."""
    text = jax.jit(program).lower(*args).compile().as_text() if callable(program) else program
    lines = [line for line in text.splitlines() if re.search(r" convolution\(", line)]
    fast = re.compile(r"dim_labels=b(\d*)f_\1io->b\1f")
    turned = re.compile("rhs_reversal|(feature|batch)_group_count")
    return [line for line in lines if not fast.search(line) or turned.search(line)]


def looped(function):
    """The function in a scan, where XLA brings no convolution into another form."""

    def loop(x, w):
        return lax.scan(lambda w, x: (w, function(x, w)), w, x[None])[1]

    return loop


@pytest.mark.parametrize("name", slow_but(CASES, *QUICK))
def test_values_and_derivatives_are_those_of_xla_and_no_form_in_a_loop_is_slow(name, x64):
    x, w, convolve = operands(name, np.float64)
    function = derivatives(convolve)
    program = compilation.jit(looped(function)).lower(x, w).compile(CHEAP)
    found = jax.tree.map(lambda leaf: leaf[0], program(x, w))
    assert_close(found, jax.jit(function)(x, w), rtol=1e-11, atol=1e-11)
    if "0-D" not in name and "no rows" not in name:
        assert slow(program.as_text()) == []


@pytest.mark.compiler
@pytest.mark.parametrize("name", slow_but(["2-D", "depthwise", "grouped", "1-D"], "2-D"))
def test_no_form_in_a_loop_is_slow(name):
    x, w, convolve = operands(name, np.float32)
    program = compilation.jit(looped(derivatives(convolve))).lower(x, w).compile(CHEAP)
    assert slow(program.as_text()) == []


@pytest.mark.compiler
def test_xla_alone_is_slow_in_a_loop():
    x, w, convolve = operands("2-D", np.float32)
    program = jax.jit(looped(derivatives(convolve))).lower(x, w).compile(CHEAP)
    assert slow(program.as_text())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("2-D", np.float32), ("2-D", jnp.bfloat16), ("depthwise, multiplied", jnp.bfloat16)],
)
def test_low_precision_and_its_wider_results_are_kept(name, dtype):
    x, w, convolve = operands(name, dtype)
    wide = functools.partial(convolve, preferred_element_type=jnp.float32)
    for function in (convolve, wide):
        found, expected = compilation.jit(function)(x, w), jax.jit(function)(x, w)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(
            np.asarray(found, np.float64), np.asarray(expected, np.float64), rtol=1e-2, atol=1e-2
        )
        if "depthwise" not in name:
            assert_same_bits(found, expected)


def inside(kind, convolve):
    """The convolution in a loop, a branch or a call."""
    mesh = make_mesh(data=1)
    return {
        "scan": lambda x, w: lax.scan(lambda c, _: (c + convolve(x, w).sum(), None), 0.0, length=2),
        "while": lambda x, w: lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, convolve(x + c[0], w)), (0, convolve(x, w))
        ),
        "map": lambda x, w: lax.map(lambda x: convolve(x, w), x[None]),
        "cond": lambda x, w: lax.cond(x.sum() > 0, convolve, lambda x, w: -convolve(x, w), x, w),
        "jit": jax.jit(convolve),
        "checkpoint": jax.grad(jax.checkpoint(lambda x, w: convolve(x, w).sum())),
        "custom_jvp": jax.custom_jvp(convolve),
        "custom_vjp": jax.custom_vjp(convolve),
        "vmap": lambda x, w: jax.vmap(convolve)(x[None], w[None]),
        "shard_map": jax.shard_map(convolve, mesh=mesh, in_specs=P(), out_specs=P()),
    }[kind]


KINDS = ["scan", "while", "map", "cond", "jit", "checkpoint"]
KINDS += ["custom_jvp", "custom_vjp", "vmap", "shard_map"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_convolution_is_found(kind):
    x, w, convolve = operands("2-D", np.float32)
    function = inside(kind, convolve)
    if kind == "custom_jvp":
        function.defjvp(lambda primals, tangents: (convolve(*primals), convolve(*tangents)))
    if kind == "custom_vjp":
        function.defvjp(lambda x, w: (convolve(x, w), (x, w)), lambda kept, _: kept)
    fast = compilation.jit(function)
    text = str(jax.make_jaxpr(fast)(x, w))
    assert "gradhpo_convolution" in text
    assert "conv_general_dilated[" not in text
    assert_close(fast(x, w), jax.jit(function)(x, w), rtol=1e-5, atol=1e-5)


def test_a_program_without_convolutions_is_jax_jit_s(capsys):
    def function(n, x):
        """Some loop."""
        print("traced")
        return lax.fori_loop(0, n, lambda _, x: {"y": jnp.sin(x["y"])}, x)

    x = {"y": jnp.arange(3.0)}
    ours = compilation.jit(function, static_argnums=0)
    assert ours.lower(2, x).as_text() == jax.jit(function, static_argnums=0).lower(2, x).as_text()
    assert capsys.readouterr().out.count("traced") == 1  # JAX remembers it
    assert_same_bits(ours(2, x), jax.jit(function, static_argnums=0)(2, x))


def test_what_is_compiled_can_be_differentiated_batched_and_run_without_jit():
    x, w, convolve = operands("depthwise", np.float32)
    fast = compilation.jit(convolve)

    def total(function):
        return lambda x, w: jnp.sum(jnp.sin(function(x, w)))

    expected = jax.jit(jax.hessian(total(convolve), 1))(x, w)
    assert_close(jax.jit(jax.hessian(total(fast), 1))(x, w), expected, rtol=1e-4, atol=1e-4)
    batched = jax.vmap(fast, (None, 0))(x, jnp.stack([w, 2 * w]))
    assert_close(batched[1], convolve(x, 2 * w), rtol=1e-5, atol=1e-5)
    with jax.disable_jit():
        assert_same_bits(fast(x, w), convolve(x, w))


# --- Kinds of methods, and every place that compiles a step --------------------------------------

X, Y = _rng.normal(size=(4, 6, 6, 2)), _rng.normal(size=4)
PARAMS = {"first": _rng.normal(size=(3, 3, 2, 4)) / 4, "second": _rng.normal(size=(3, 3, 1, 4)) / 3}


def predict(params, x):
    x = jnp.tanh(CASES["2-D"][2](x, params["first"]))
    x = lax.conv_general_dilated(
        x, params["second"], (2, 2), "SAME", dimension_numbers=IMAGES, feature_group_count=4
    )
    return x.mean((1, 2, 3))


def train_loss(params, lam, batch):
    x, y = batch
    errors = (predict(params, x) - y) ** 2
    return jnp.mean(jax.nn.sigmoid(lam["weights"]) * errors) + jnp.exp(lam["decay"]) * jnp.sum(
        params["first"] ** 2
    )


def val_loss(params, lam, batch):
    del lam
    x, y = batch
    return jnp.mean((predict(params, x) - y) ** 2)


def problem():
    def init(key):
        del key
        lam = {"weights": jnp.zeros(4), "decay": jnp.asarray(-3.0)}
        return jax.tree.map(jnp.asarray, PARAMS), lam

    def batch(key):
        del key
        return (jnp.asarray(X), jnp.asarray(Y)), (jnp.asarray(X[::-1]), jnp.asarray(Y))

    return gradhpo.Problem(init, train_loss, val_loss, batch=batch)


SGD = optax.sgd(0.1, momentum=0.9)
# One that differentiates a step, in reverse and over coordinates, one that calibrates in a loop,
# one that solves in a loop.
METHODS = {
    "one-step": gradhpo.OneStepOptimizer(SGD, SGD),
    "hyperdistill": gradhpo.OnlineHypergradientOptimizer(SGD, SGD, T=2),
    "forward": gradhpo.ForwardOptimizer(SGD, SGD, unroll_steps=2),
    "implicit": gradhpo.ImplicitOptimizer(optax.sgd(0.1), SGD),
}


@pytest.mark.parametrize("method", slow_but(METHODS, "one-step"))
def test_solve_is_the_loop_of_steps(method, x64):
    made, optimizer = problem(), METHODS[method]
    solved = gradhpo.solve(made, optimizer, 3, jax.random.key(0), progress=False)
    params, hyperparams = made.init(None)
    state, batches = optimizer.init(params, hyperparams), made.batch(None)
    if optimizer.calibration_period:
        stack = jax.tree.map(lambda x: jnp.stack([x] * optimizer.T), batches[0])
        state = optimizer.calibrate(state, gradhpo.Task(stack, batches[1], train_loss, val_loss))
    for _ in range(3):
        state = optimizer.step(state, *batches, train_loss, val_loss)
    found, expected = ((s.params, s.hyperparams) for s in (solved.state, state))
    assert_close(found, expected, rtol=1e-10)
    text = str(optimizer.lower_step(state, *batches, train_loss, val_loss).as_text())
    assert "feature_group_count = 4" not in text


@pytest.mark.parametrize("batching", ["map", "vmap"])
@pytest.mark.slow
def test_a_population_has_no_slow_form(batching):
    population = Population(problem(), METHODS["one-step"], 2, batching=batching)
    state = population.init(jax.random.key(0))
    assert slow(population.compile(state, 2).executable.as_text()) == []
    keys = jax.random.split(jax.random.key(1), 2)
    end, _ = population.run(state, 2, keys)
    alone = gradhpo.solve(problem(), METHODS["one-step"], 2, jax.random.key(0), progress=False)
    assert_close(jax.tree.map(lambda x: x[1], end.params), alone.state.params, rtol=1e-4, atol=1e-5)


@pytest.mark.compiler
def test_auto_tries_no_groups_on_a_cpu():
    population = Population(problem(), METHODS["one-step"], 8)
    state = population.init(jax.random.key(0))
    before = gradhpo.parallel.compiled.counts().compiles
    assert population.resolve(state) == "map"
    assert gradhpo.parallel.compiled.counts().compiles == before


def plain_loss(params, lam, batch):
    x, y = batch
    decay = lam["decay"] ** 2 * jnp.sum(params["second"] ** 2)
    return jnp.mean((predict(params, x) - y) ** 2) + decay + jnp.sum(lam["weights"] ** 2)


@pytest.mark.parametrize("backend", ["shard_map", "auto"])
@pytest.mark.slow
def test_data_parallel_convolves_as_one_device(backend):
    one = METHODS["one-step"]
    many = data_parallel(one, make_mesh(data=2), backend=backend)
    ends = []
    for optimizer in (one, many):
        state = optimizer.init(*problem().init(None))
        batches = (jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32))
        ends.append(optimizer.step(state, batches, batches, plain_loss, plain_loss))
    assert_close(ends[0].hyperparams, ends[1].hyperparams, rtol=1e-4, atol=1e-5)
    assert_close(ends[0].params, ends[1].params, rtol=1e-4, atol=1e-5)

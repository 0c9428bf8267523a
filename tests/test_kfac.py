"""The Kronecker solver against definitions in float64: the layers it finds, and what it inverts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gradhpo
from gradhpo import kfac
from gradhpo.dense_layers import DenseLayers
from gradhpo.parallel import Population, data_parallel, make_mesh
from tests import problems

pytestmark = pytest.mark.usefixtures("x64")

RNG, RHO, KEY = np.random.default_rng(0), 0.05, jax.random.key(0)
ROWS, CLASSES = 24, 3
X, Y = RNG.normal(size=(ROWS, 5)), RNG.integers(0, CLASSES, ROWS)
PARAMS = {
    "w": RNG.normal(size=(5, 4)), "b": RNG.normal(size=4),
    "v": RNG.normal(size=(4, CLASSES)), "c": RNG.normal(size=CLASSES),
}  # fmt: skip
TARGET = {name: RNG.normal(size=leaf.shape) for name, leaf in PARAMS.items()}


def head(z, p, y=Y):
    entropy = optax.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()
    return entropy + 0.02 * jnp.sum(p["w"] ** 2) + 0.01 * jnp.sum(p["v"] ** 2)


def plain(p):
    return head(jnp.tanh(X @ p["w"] + p["b"]) @ p["v"] + p["c"], p)


def by_example(p):
    """As frameworks write a model of one example, the matrices being `(outputs, inputs)` there."""

    def one(x):
        return p["v"].T @ jnp.tanh(p["w"].T @ x + p["b"]) + p["c"]

    return head(jax.vmap(one)(X), p)


def jitted_and_rematerialized(p):
    hidden = jax.jit(lambda p: jnp.einsum("nd,dk->nk", X, p["w"]) + p["b"][None])(p)
    return head(jax.checkpoint(lambda h, p: jnp.tanh(h) @ p["v"] + p["c"])(hidden, p), p)


def of_sequences(p):
    z = jnp.tanh(X.reshape(4, 6, 5) @ p["w"] + p["b"]) @ p["v"] + p["c"]
    return head(z.reshape(-1, CLASSES), p)


def solved(function=plain, params=PARAMS, samples=CLASSES, target=TARGET):
    solve = jax.jit(lambda p, t: kfac.inverse(function, p, samples, RHO, KEY)(t))
    return solve(params, target)


def by_definition():
    """`(A ⊗ G + r I)⁻¹` from Jacobians of each example, written out as matrices."""
    hidden = np.tanh(X @ PARAMS["w"] + PARAMS["b"])
    z = hidden @ PARAMS["v"] + PARAMS["c"]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    bent = np.einsum("ni,ij->nij", p, np.eye(CLASSES)) - np.einsum("ni,nj->nij", p, p)
    back = np.einsum("nh,hk->nhk", 1 - hidden**2, PARAMS["v"])  # ∂z/∂s of the first layer
    found = {}
    for w, b, a, jacobian, decay in (
        ("w", "b", X, back, 0.02),
        ("v", "c", hidden, np.tile(np.eye(CLASSES), (ROWS, 1, 1)), 0.01),
    ):
        ones = np.hstack([a, np.ones((ROWS, 1))])
        g = np.einsum("nhi,nij,nkj->hk", jacobian, bent / ROWS, jacobian)
        matrix = np.kron(ones.T @ ones / ROWS, g)
        matrix += (RHO + 2 * decay) * np.eye(len(matrix))
        rows = np.vstack([TARGET[w], TARGET[b]])
        x = np.linalg.solve(matrix, rows.ravel()).reshape(rows.shape)
        found |= {w: x[:-1], b: x[-1]}
    return found


def biases_as_rows(p):
    return head(jnp.tanh(X @ p["w"] + p["b"][None]) @ p["v"] + p["c"].reshape(1, -1), p)


@pytest.mark.parametrize(
    "write", [plain, by_example, jitted_and_rematerialized, of_sequences, biases_as_rows]
)
def test_it_is_the_kronecker_product_of_the_definition_however_written(write):
    problems.assert_close(solved(write), by_definition(), rtol=1e-10)


def test_random_directions_are_right_in_the_mean():
    key = jax.random.split(KEY, 500)

    @jax.jit
    @jax.vmap
    def factor(key):
        net = DenseLayers(plain, PARAMS)
        rows = kfac._directions(net, PARAMS, 1, key)
        return jnp.einsum("kni,knj->ij", rows, rows)

    net = DenseLayers(plain, PARAMS)
    rows = kfac._directions(net, PARAMS, CLASSES, KEY)
    exact = jnp.einsum("kni,knj->ij", rows, rows)
    drawn = np.asarray(factor(key))
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert (error > 0).any()
    assert (np.abs(drawn.mean(0) - exact) < 5 * error + 1e-12).all()


def test_of_one_layer_and_squares_it_is_the_hessian():
    def loss(p):
        return (
            jnp.mean((X @ p["w"] + p["b"] - 1) ** 2)
            + 0.1 * jnp.sum(p["w"] ** 2)
            + 0.1 * p["b"] ** 2
        )

    params = {"w": RNG.normal(size=5), "b": np.ones(())}
    flat, back = ravel_pytree(params)
    matrix = jax.hessian(lambda v: loss(back(v)))(flat) + RHO * np.eye(6)
    target = {"w": np.arange(5.0), "b": np.ones(())}
    expected = np.linalg.solve(matrix, ravel_pytree(target)[0])
    found = solved(loss, params, 1, target)
    problems.assert_close(found, back(jnp.asarray(expected)), rtol=1e-9)


@pytest.mark.parametrize(
    ("weight", "bias", "apply"),
    [
        ((5, 1), (1,), lambda p: (X @ p["w"] + p["b"].reshape(1, -1))[:, 0]),
        ((5, 1), (), lambda p: (X @ p["w"])[:, 0] + p["b"]),
        ((1, 5), (1, 1), lambda p: X @ p["w"][0] + p["b"][0, 0]),
    ],
)
def test_a_layer_of_one_output_has_its_bias_in_any_shape(weight, bias, apply):
    params = {"w": np.ones(weight), "b": np.ones(bias)}
    (layer,) = DenseLayers(lambda p: jnp.mean(apply(p) ** 2), params).layers
    assert (layer.weight, layer.bias, layer.outputs) == (1, 0, 1)


def test_factors_of_low_precision_are_of_float32():
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), PARAMS)
    found = solved(params=low, function=lambda p: plain(jax.tree.map(jnp.asarray, p)))
    flat = [ravel_pytree(tree)[0].astype(float) for tree in (found, solved())]
    assert optax.losses.cosine_similarity(*flat) > 0.99


def train_loss(p, lam, batch):
    x, y, rows = batch
    losses = (jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]).sum(1) - y
    return jnp.mean(jax.nn.sigmoid(lam[rows]) * losses**2) + 0.01 * jnp.sum(p["w"] ** 2)


def val_loss(p, lam, batch):
    del lam
    x, y, _ = batch
    return jnp.mean(((jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]).sum(1) - y) ** 2)


BATCH = (X, Y.astype(float), np.arange(ROWS))
LAM = np.linspace(-1.0, 1.0, ROWS)


@pytest.mark.parametrize(("devices", "K", "backend"), [(4, 3, "shard_map"), (8, 1, "shard_map")])
def test_devices_find_what_one_finds(devices, K, backend):
    tuner = gradhpo.ImplicitOptimizer(
        optax.sgd(0.05), unroll_steps=2, solver="kfac", K=K, damping=RHO, warm_start=True
    )
    many = data_parallel(tuner, make_mesh(data=devices), backend=backend)
    states = []
    for one in (tuner, many):
        state = one.init(PARAMS, LAM)
        for _ in range(2):
            state = one.step(state, BATCH, BATCH, train_loss, val_loss, 0.1)
        states.append(state)
    problems.assert_close(states[1].hyperparams, states[0].hyperparams, rtol=1e-9)
    problems.assert_close(states[1].metadata["solution"], states[0].metadata["solution"], 1e-7)


@pytest.mark.slow
def test_each_slot_of_a_population_is_its_own_run():
    problem = gradhpo.Problem(
        lambda key: (jax.tree.map(lambda a: a + jax.random.normal(key, a.shape), PARAMS), LAM),
        train_loss, val_loss, lambda key: (BATCH, BATCH),
    )  # fmt: skip
    tuner = gradhpo.ImplicitOptimizer(
        optax.sgd(0.05), optax.sgd(0.1), solver="kfac", K=1, damping=RHO
    )
    population = Population(problem, tuner, 2, batching="vmap")
    keys = jax.random.split(KEY, 2)
    state, _ = population.run(population.init(keys), 2, keys)
    alone = gradhpo.solve(problem, tuner, 2, keys[1]).state.hyperparams
    np.testing.assert_allclose(state.hyperparams[1], alone, rtol=1e-6)


def convolved(p):
    images = X.reshape(ROWS, 1, 5, 1)
    kernel = p["w"][None, :1, None, :]
    return jnp.mean(jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=(
        "NHWC", "HWIO", "NHWC"))) + plain({**p, "w": jnp.ones((5, 4))})  # fmt: skip


def tied(p):
    return plain(p) + jnp.mean((X @ p["w"]) ** 2)


def in_a_loop(p):
    step = lambda h, _: (jnp.tanh(X @ p["w"] + p["b"] + h), None)  # noqa: E731
    hidden = jax.lax.scan(step, jnp.zeros((ROWS, 4)), None, 2)[0]
    return head(hidden @ p["v"] + p["c"], p)


def seen_beside(p):
    hidden = jnp.tanh(X @ p["w"] + p["b"])
    return head(hidden @ p["v"] + p["c"], p) + jnp.mean(hidden**2)


def used_in_a_loop_too(p):
    turn = p["w"][:4]
    hidden = jnp.tanh(X @ p["w"] + p["b"])
    hidden = jax.lax.scan(lambda h, _: (jnp.tanh(h @ turn), None), hidden, None, 2)[0]
    return head(hidden @ p["v"] + p["c"], p)


def used_without_bias_too(p):
    outputs = X @ p["w"]
    return head((jnp.tanh(outputs + p["b"]) + outputs) @ p["v"] + p["c"], p)


def two_heads(p):
    return jnp.mean((X @ p["w"] + p["b"]) ** 2) + jnp.mean((np.ones((3, 4)) @ p["v"] + p["c"]) ** 2)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            convolved,
            r"params\['b'\] of shape \(4,\) is|params\['w'\] of shape \(5, 4\) is of no dense",
        ),
        (tied, r"params\['w'\] of shape \(5, 4\) is of several layers"),
        (in_a_loop, r"params\['b'\] of shape \(4,\) is of no dense layer: .* outside of loops"),
        (seen_beside, r"sees the layer of params\['w'\] otherwise than through the last one, of"),
        (used_in_a_loop_too, r"params\['w'\] is used otherwise than in its dense layer too"),
        (used_without_bias_too, r"layer of params\['w'\] are used without its bias too, params"),
        (two_heads, r"sees the layer of params\['w'\] and not through the last one"),
    ],
)
def test_what_is_no_stack_of_dense_layers_is_refused_by_name(loss, message):
    with pytest.raises(ValueError, match=message):
        solved(loss)


def test_too_many_outputs_are_refused_by_number():
    params = {"w": np.zeros((2, 2000))}
    with pytest.raises(ValueError, match=r"at most 1024 outputs.*params\['w'\] has 2000"):
        solved(lambda p: jnp.mean((X[:, :2] @ p["w"]) ** 2), params, 1, params)


def test_it_needs_a_ridge():
    with pytest.raises(ValueError, match='solver="kfac" needs a damping above 0, got 0'):
        gradhpo.ImplicitOptimizer(optax.sgd(0.1), solver="kfac")

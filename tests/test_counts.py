"""DrMAD with optimizers that count in circles: exact where the Jacobians are constant."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import DrMADOptimizer, UnrolledOptimizer
from tests.problems import assert_close
from tests.quick import slow_but

pytestmark = pytest.mark.usefixtures("only_x64")

H = np.diag([1.0, 0.5, 0.25])
START = (np.array([0.3, -0.2, 0.1]), np.array([0.5, 0.4, 0.2]))
SGD = optax.sgd(0.2, momentum=0.5)
CYCLIC = {
    "MultiSteps(2)": optax.MultiSteps(SGD, 2),
    "MultiSteps(3)": optax.MultiSteps(SGD, 3),
    "apply_every": optax.chain(optax.apply_every(2), SGD),
    "a schedule that goes up and down": optax.sgd(lambda count: 0.1 + 0.1 * (count % 3)),
    "a number that jumps": optax.chain(SGD, optax.contrib.reduce_on_plateau(0.5, 1, rtol=0.9)),
    "a number injected": optax.inject_hyperparams(optax.sgd)(lambda count: 0.3 * (count % 2)),
}


def train(w, lam, batch):
    del batch
    return (w - lam) @ H @ (w - lam) / 2


def val(w, lam, batch):
    del lam, batch
    return jnp.sum((w - 1) ** 2) / 2


@pytest.mark.parametrize("name", slow_but(CYCLIC, "MultiSteps(3)"))
def test_drmad_replays_what_is_on_no_line(name):
    found, expected = (
        optimizer.compute_hypergradient(optimizer.init(*START), None, None, train, val)
        for kind in (DrMADOptimizer, UnrolledOptimizer)
        for optimizer in [kind(CYCLIC[name], optax.sgd(0.1), unroll_steps=7)]
    )
    assert_close(found, expected)
    assert np.abs(expected).min() > 1e-3

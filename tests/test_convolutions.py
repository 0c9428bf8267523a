"""Convolutions on a CPU: the same numbers in every form, and no slow form inside a loop."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from tests.problems import assert_close, assert_same_bits

import gradhpo
from gradhpo import compilation, convolutions
from gradhpo.parallel import Population, data_parallel, make_mesh
from gradhpo.parallel.batching import candidates

_rng = np.random.default_rng(0)
IMAGES, ROWS, CUBES = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC"), ("NDHWC", "DHWIO", "NDHWC")


def case(lhs, rhs, dimensions=IMAGES, strides=None, padding="SAME", **params):
    """Shapes of the operands, and the convolution as a function of them."""
    strides = strides or (1,) * (len(lhs) - 2)

    def convolve(x, w):
        return lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=dimensions, **params
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
# Sums in another order: these equal XLA's to rounding, the others to the bit.
ROUNDED = re.compile("depthwise|group|larger|transposed|negative")


def operands(name, dtype=np.float32):
    lhs, rhs, convolve = CASES[name]
    return jnp.asarray(_rng.normal(size=lhs), dtype), jnp.asarray(_rng.normal(size=rhs), dtype), convolve


def derivatives(convolve):
    """The value, the gradients and the products of second derivatives, of a loss of it."""

    def loss(x, w):
        return jnp.sum(jnp.sin(convolve(x, w)))

    def all_of_them(x, w):
        gradient = jax.grad(loss, (0, 1))
        _, mixed = jax.vjp(gradient, x, w)
        along = jax.jvp(gradient, (x, w), (w.sum() * x, x.sum() * w))[1]
        return convolve(x, w), gradient(x, w), mixed(gradient(x, w)), along

    return all_of_them


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_xla(name, x64):
    x, w, convolve = operands(name, np.float64)
    function = derivatives(convolve)
    expected = jax.jit(function)(x, w)
    assert_close(compilation.jit(function)(x, w), expected, rtol=1e-11, atol=1e-11)

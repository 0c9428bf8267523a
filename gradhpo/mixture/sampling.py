"""Rows of data by domain: on the device, and from a loader of the host for each domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.errors import check_callable, check_same_tree, stack_length
from gradhpo.state import PyTree


class Rows:
    """Sets of rows by name, of different lengths, as one array that a compiled run can draw from.

    Args:
      name: what an error calls them.
      sets: by name, pytrees of arrays with a leading axis of rows; alike but for its length.

    Raises:
      ValueError: for no set, one without rows, or sets that differ in more than their length.
    """

    def __init__(self, name: str, sets: Mapping[str, PyTree]) -> None:
        check_names(name, sets)
        arrays = {key: jax.tree.map(np.asarray, rows) for key, rows in sets.items()}
        self.sizes = np.array([stack_length(f"{name}[{key!r}]", a) for key, a in arrays.items()])
        first, *others = arrays
        for key in others:
            like = [jax.tree.map(lambda x: x[:1], arrays[which]) for which in (key, first)]
            check_same_tree(f"{name}[{key!r}]", like[0], f"{name}[{first!r}]", like[1])
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.arrays: PyTree = jax.tree.map(lambda *x: np.concatenate(x), *arrays.values())
        """All rows, one set after another."""

    def draw(self, key: jax.Array, arrays: PyTree, rows: int) -> PyTree:
        """Return rows of every set, drawn with replacement: `(sets, rows, …)`; traceable."""
        keys = jax.random.split(key, len(self.sizes))
        chosen = jnp.stack(
            [
                start + jax.random.randint(k, (rows,), 0, size)
                for k, start, size in zip(keys, self.starts, self.sizes, strict=True)
            ]
        )
        return jax.tree.map(lambda a: a[chosen], arrays)

    def draw_on_host(self, rng: np.random.Generator, rows: int) -> PyTree:
        """Return the same as NumPy arrays."""
        pairs = zip(self.starts, self.sizes, strict=True)
        chosen = np.stack([start + rng.integers(size, size=rows) for start, size in pairs])
        return jax.tree.map(lambda a: a[chosen], self.arrays)

    def of(self, arrays: PyTree, index: int) -> PyTree:
        """Return all rows of one set."""
        start, size = int(self.starts[index]), int(self.sizes[index])
        return jax.tree.map(lambda a: a[start : start + size], arrays)


Loader = Callable[[np.random.Generator], Any]
"""`rng -> iterable` of pytrees of arrays with a leading axis of rows."""


def check_loaders(name: str, loaders: Mapping[str, Loader]) -> None:
    """Raise unless there is a function for every domain."""
    check_names(name, loaders)
    for key, loader in loaders.items():
        check_callable(f"{name}[{key!r}]", loader)


def together(
    name: str, loaders: Mapping[str, Loader], rng: np.random.Generator, rows: int
) -> Iterator[PyTree]:
    """Yield rows of every domain, `(domains, rows, …)`, until a loader ends.

    Each loader has a generator of its own, so that none depends on how the others read.

    Raises:
      ValueError: for a batch of another number of rows, or another form.
    """
    seeds = rng.integers(2**32, size=len(loaders))
    streams = [
        iter(loader(np.random.default_rng(int(seed))))
        for loader, seed in zip(loaders.values(), seeds, strict=True)
    ]
    for parts in zip(*streams):  # noqa: B905
        batches = [jax.tree.map(np.asarray, part) for part in parts]
        for key, batch in zip(loaders, batches, strict=True):
            stack_length(f"{name}[{key!r}]", batch, expected=rows)
            check_same_tree(f"{name}[{key!r}]", batch, f"{name}: the first domain", batches[0])
        yield jax.tree.map(lambda *x: np.stack(x), *batches)


def systematic(offset: jax.Array, weights: jax.Array, rows: int) -> jax.Array:
    """Return the domain of each row, `(rows,)`: systematic sampling by the weights, `(domains,)`.

    Domain i has `rows·p_i` rows in the mean over the offset, uniform in [0, 1), and never more than
    one row away from it.
    """
    ends = jnp.cumsum(weights) / jnp.sum(weights)
    points = (jnp.arange(rows) + offset) / rows
    found = jnp.searchsorted(ends, points, side="right")
    return jnp.minimum(found, weights.shape[0] - 1)


def check_names(name: str, sets: Any) -> None:
    """Raise unless it is a mapping with something in it."""
    if not isinstance(sets, Mapping):
        raise TypeError(f"{name} must be a mapping of names, got {type(sets).__name__}")
    if not sets or not all(isinstance(key, str) for key in sets):
        raise ValueError(f"{name} must have names, each a string, got {list(sets)}")

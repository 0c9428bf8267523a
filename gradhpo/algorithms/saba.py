"""SABA: SOBA with the variance of its batches reduced, as SAGA does (Dagréou et al. NeurIPS 2022).

Of each batch i of the data, what it gave when it last came is remembered, `m_i`. A mean over all
data of oracles `φ_i` is estimated by `φ_i - m_i + (1/n) Σ_j m_j`; then `m_i ← φ_i`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradhpo.branches import anywhere
from gradhpo.errors import check_callable, check_count
from gradhpo.hypergradient import at_least_float32
from gradhpo.optimizer import Estimate
from gradhpo.single_loop import Oracles, SingleLoopMethod
from gradhpo.state import BilevelState, PyTree, prepare, remembered
from gradhpo.task import Task, split_fixed

SLOTS, MEANS = "slots", "means"
"""What the state keeps: `m`, a leading axis before each oracle's own, and the means over it."""
OF_TRAIN, OF_VAL = ("gradient", "hessian_v", "mixed_v"), ("alpha", "direct")
"""Which oracles the batches of which data give."""


def index_of(batch: Any) -> Any:
    """Return `batch["index"]`."""
    if not isinstance(batch, Mapping) or "index" not in batch:
        got = f"keys {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            'SABAOptimizer must know which batch it is given: batch["index"], or what index= '
            f"returns for a batch; got a batch with {got}"
        )
    return batch["index"]


@dataclass(frozen=True)
class SABAOptimizer(SingleLoopMethod):
    """SABA: SOBA on batches that converges with constant rates, as on all data.

    The data are divided into batches once, of one size, and come in any order, at random or in
    passes. For each is remembered what it last gave: `2 train_batches + val_batches` copies of the
    weights and `train_batches + val_batches` of λ, which is for small problems. On a strongly
    convex training loss, with a value function that obeys a Polyak-Łojasiewicz inequality,
    convergence is linear. A step costs what one of SOBA costs, which stalls at its noise.

    A batch tells which it is by its `index`, such as `{"index": i, "x": x[i], "y": y[i]}`; losses
    need not read it.

    `metadata` holds `slots` and `means`, 0 at first, in float32 at least, beside what
    `SOBAOptimizer` keeps; all of it outlasts an episode. An index that is not of a batch makes the
    step NaN. All else is as in `SOBAOptimizer`. `data_parallel` takes it with `backend="auto"`,
    with an index in each row.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one. It
        moves the solution of the linear system as well.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      train_batches: how many batches the training data are.
      val_batches: how many the validation data are.
      index: `batch -> index`, an integer array from 0 on; of several, one in each row, the first
        counts.
      memory_limit: bytes that the memories of a trial may take; more are refused.
      linear_optimizer: what moves the solution instead.
      T: steps in an episode of `run`.

    Raises:
      ValueError: if there is no `inner_optimizer`, or a number is out of range; in `init`, if the
        memories are larger than `memory_limit`; in `step`, if a batch has no index, or a
        hyperparameter acts on the weights through the inner optimizer only.
      TypeError: if `train_batches` or `val_batches` is missing; in `step`, if an index is no
        integer.

    References:
      Dagréou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables
      stochastic and global variance reduction algorithms, NeurIPS 2022, Section 2. Defazio, Bach
      and Lacoste-Julien, SAGA, NeurIPS 2014.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    train_batches: int | None = None
    val_batches: int | None = None
    index: Callable[[Any], Any] = index_of
    memory_limit: int = 2**30
    linear_optimizer: Any = None
    T: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_callable("index", self.index)
        for name in ("train_batches", "val_batches", "memory_limit"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))

    def init(
        self, params: PyTree, hyperparams: PyTree, *, model_state: PyTree = None
    ) -> BilevelState:
        """Return the state before the first step, with empty memories; see `BilevelOptimizer.init`.

        Raises:
          ValueError: if the memories are larger than `memory_limit`.
        """
        state = super().init(params, hyperparams, model_state=model_state)
        w, lam = split_fixed(state.params)[0], state.hyperparams
        nothing = at_least_float32(optax.tree.zeros_like(Oracles(w, w, lam, w, lam)._asdict()))
        self._check_size(nothing)

        def empty(name: str) -> PyTree:
            n = self._count(name)
            return jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), nothing[name])

        slots = {name: empty(name) for name in nothing}
        return prepare(state.update(metadata={SLOTS: slots, MEANS: nothing}))

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `D_λ`, with the weights and `v` moved along their directions."""
        found = self.directions(state, task)
        return Estimate.of(found.hypergradient, found.moved, found.val, found.memory)

    def reduced(
        self, found: Oracles, state: BilevelState, task: Task
    ) -> tuple[Oracles, dict[str, Any]]:
        """Return the estimates of the means over all data, and the memories with `found` in."""
        kept, means = remembered(state, SLOTS), remembered(state, MEANS)
        new = at_least_float32(found._asdict())
        slots = dict.fromkeys(OF_TRAIN, self._slot("train_batch", task.train_batch))
        slots |= dict.fromkeys(OF_VAL, self._slot("val_batch", task.val_batch))
        at = {name: jax.tree.map(lambda _, i=slots[name]: i, new[name]) for name in new}
        known = jnp.all(jnp.stack([slots[name] < self._count(name) for name in slots]))
        old = _recalled(kept, at, known)

        def written(m: jax.Array, i: jax.Array, x: jax.Array, before: jax.Array) -> jax.Array:
            return m.at[i].set(jnp.where(known, x, before))

        change = jax.tree.map(jnp.subtract, new, old)
        estimates = optax.tree.cast_like(optax.tree.add(means, change), found._asdict())
        after = {
            SLOTS: jax.tree.map(written, kept, at, new, old),
            MEANS: jax.tree.map(lambda mean, m, d: mean + d / len(m), means, kept, change),
        }
        return Oracles(**estimates), after

    def _count(self, name: str) -> int:
        """Return how many slots an oracle has."""
        n = self.train_batches if name in OF_TRAIN else self.val_batches
        assert n is not None
        return n

    def _slot(self, name: str, batch: PyTree) -> jax.Array:
        """Return the index of a batch; one that no slot has where it is negative."""
        index = jnp.ravel(jnp.asarray(self.index(batch)))
        if not jnp.issubdtype(index.dtype, jnp.integer) or not index.size:
            raise TypeError(
                f"the index of {name} must be an integer array, got {index.dtype}[{index.size}]"
            )
        return jnp.where(index[0] < 0, jnp.iinfo(jnp.int32).max, index[0])

    def _check_size(self, one: dict[str, PyTree]) -> None:
        size = sum(
            self._count(name) * leaf.size * leaf.dtype.itemsize
            for name, tree in one.items()
            for leaf in jax.tree.leaves(tree)
        )
        if size > self.memory_limit:
            raise ValueError(
                f"SABAOptimizer would remember {size:,} bytes, what {self.train_batches} training "
                f"and {self.val_batches} validation batches last gave, and memory_limit is "
                f"{self.memory_limit:,}: take larger batches, of which there are fewer, or "
                "SOBAOptimizer, which remembers nothing of them"
            )


def _recalled(slots: PyTree, at: PyTree, known: jax.Array) -> PyTree:
    """Return what is remembered at the indices; NaN if one of them is not of a batch.

    It is read in a branch, and what is written depends on it: XLA then writes into the memory. A
    read that it may do anew wherever the result is used makes it copy all slots at every step.
    """

    def read() -> PyTree:
        return jax.tree.map(lambda m, i: m[i], slots, at)

    found = jax.lax.cond(anywhere(known), read, lambda: jax.tree.map(lambda m: m[0], slots))
    return jax.tree.map(lambda x: jnp.where(known, x, jnp.nan), found)

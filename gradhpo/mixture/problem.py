"""`Mixture`: domains of training data weighed for targets, as a `Problem` with weights as λ."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.errors import check_count, check_hashable, check_instance
from gradhpo.mixture.sampling import Rows, check_loaders, systematic, together
from gradhpo.problem import Problem
from gradhpo.solution import Solution
from gradhpo.state import PyTree, is_key

WEIGHTS = "weights"
"""The name of the weights among the hyperparameters."""
CHUNK = 512
"""Rows that are measured at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Domains of training data, whose weights on the simplex are tuned for targets.

    `problem` is a `gradhpo.Problem` whose λ is `{"weights": p}`, an array `(domains,)` of numbers
    that are at least 0 and add up to 1; its optimizer must leave them so: `entropic_descent` or
    `softmax_descent` for λ. The hypergradient of `p_i` is how much more of domain i would have
    changed the targets' loss.

    Args:
      init: `key -> params`: the first weights of the model.
      loss: `(params, rows) -> (n,)`: the loss of each of n rows, the same for domains and targets.
      domains: by name, training rows: pytrees of arrays with a leading axis of rows, on the device;
        or for every domain a loader of the host, `rng -> iterable` of such pytrees with as many
        rows each as a batch takes of a domain, of a `numpy.random.Generator`; see
        `Problem.batches`. Rows of the device are drawn with replacement.
      targets: by name, held-out rows that the weights are tuned for.
      rows: rows of a training batch, of all domains together.
      target_rows: rows of each target in a step's validation batch.
      draw: how weights enter the training loss. "weighted": a batch has `rows / domains` rows of
        every domain, and its loss is `Σ p_i L_i`. "sampled": the batch has `rows` rows whose
        domains are drawn by the weights, as a mixture is used in the end: the loss and its gradient
        are unbiased estimates of the same, and nothing is computed for rows that are not drawn. For
        that a batch brings `rows` rows of every domain.
      stack: training batches of a step, as a stack, for a method that unrolls so many inner steps
        (`unroll_steps=`, with `batches="stack"`); None for one batch without a leading axis.
      weights: `(domains,)`, where they begin; by default uniform.
      objective: `(targets,) -> scalar`: how the targets' losses become one, `jnp.mean` or
        `jnp.max`, say; traceable.
      held_out: by name, more rows, whose mean loss is measured and on which nothing is tuned.
      sizes: `(domains,)`, how much data there is of each, for proportional weights; by default
        their rows. Loaders need it.
      hyperparams: more hyperparameters by name, beside the weights: arrays for `inner_optimizer`.

    Raises:
      ValueError: for a number or a weight out of range, sets of rows that differ, or rows that are
        no multiple of the domains where they are weighted.
      TypeError: for an argument of the wrong kind.
    """

    init: Callable[[jax.Array], PyTree]
    loss: Callable[[PyTree, PyTree], jax.Array]
    domains: Mapping[str, Any]
    targets: Mapping[str, PyTree]
    rows: int = 48
    target_rows: int = 32
    draw: Literal["weighted", "sampled"] = "weighted"
    stack: int | None = None
    weights: Sequence[float] | np.ndarray | None = None
    objective: Callable[[jax.Array], jax.Array] = jnp.mean
    held_out: Mapping[str, PyTree] = dataclasses.field(default_factory=dict[str, PyTree])
    sizes: Sequence[float] | np.ndarray | None = None
    hyperparams: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for name in ("init", "loss", "objective"):
            check_hashable(f"Mixture.{name}", getattr(self, name))
        check_count("rows", self.rows)
        check_count("target_rows", self.target_rows)
        if self.stack is not None:
            check_count("stack", self.stack)
        if self.draw not in ("weighted", "sampled"):
            raise ValueError(f'draw must be "weighted" or "sampled", got {self.draw!r}')
        if self.on_host:
            check_loaders("domains", self.domains)
        _ = self._domains, self._targets, self._held_out
        if self.draw == "weighted" and self.rows % len(self.domains):
            raise ValueError(
                f"rows must be a multiple of the {len(self.domains)} domains where they are "
                f"weighted, got {self.rows}"
            )
        if WEIGHTS in self.hyperparams:
            raise ValueError(f"hyperparams must not have {WEIGHTS!r}: that is the mixture's own")
        _ = self.first_weights
        if self.sizes is not None and np.shape(self.sizes) != (len(self.domains),):
            raise ValueError(f"sizes must have shape ({len(self.domains)},), one a domain")

    @property
    def names(self) -> tuple[str, ...]:
        """The domains' names, in the order of the weights."""
        return tuple(self.domains)

    @property
    def on_host(self) -> bool:
        """Whether the domains are loaders of the host."""
        if not isinstance(self.domains, Mapping):
            return False
        return any(callable(rows) for rows in self.domains.values())

    @functools.cached_property
    def first_weights(self) -> np.ndarray:
        """Where the weights begin, `(domains,)`."""
        n = len(self.domains)
        if self.weights is None:
            return np.full(n, 1 / n, np.float32)
        return check_weights("weights", self.weights, n)

    @functools.cached_property
    def proportional(self) -> np.ndarray:
        """The weights in proportion to how much data there is, `(domains,)`.

        Raises:
          ValueError: for loaders without `sizes`.
        """
        if self.sizes is None and self._domains is None:
            raise ValueError("proportional weights of loaders need sizes")
        sizes = self.sizes if self._domains is None or self.sizes is not None else None
        found = np.asarray(self._domains.sizes if sizes is None else sizes, float)  # pyright: ignore
        return (found / found.sum()).astype(np.float32)

    @functools.cached_property
    def _domains(self) -> Rows | None:
        return None if self.on_host else Rows("domains", self.domains)

    @functools.cached_property
    def _targets(self) -> Rows:
        return Rows("targets", self.targets)

    @functools.cached_property
    def _held_out(self) -> Rows | None:
        return Rows("held_out", self.held_out) if self.held_out else None

    @property
    def domain_rows(self) -> int:
        """Rows that a batch brings of every domain."""
        return self.rows // len(self.domains) if self.draw == "weighted" else self.rows

    # --- the problem ----------------------------------------------------------------------------

    @functools.cached_property
    def problem(self) -> Problem:
        """The bilevel problem: what `solve`, `Population` and `Sweep` take.

        Its metrics are the mean losses of all rows of each target, "target/NAME", and of each set
        that is held out, "NAME"; and the weight of each domain, "weight/NAME".
        """
        return self._with(self._val_loss, self._batch, self._batches)

    @functools.cached_property
    def held(self) -> Problem:
        """The problem of training alone: the weights of the domains are held, and nothing is tuned.

        Its validation loss is 0, so that a step costs what training costs.
        """
        return self._with(_nothing, self._held_batch, self._held_batches)

    def _with(self, val_loss: Any, batch: Any, batches: Any) -> Problem:
        own: dict[str, Any] = {"metrics": self._metrics, "data": self._data}
        own |= {"batches": batches} if self.on_host else {"batch": batch}
        return Problem(self._start, self.train_loss, val_loss, **own)

    def replace(self, **changes: Any) -> Mixture:
        """Return the mixture with other arguments."""
        return dataclasses.replace(self, **changes)

    def continued(
        self, solution: Solution, changed: Sequence[str] = (), *, run: int | None = None
    ) -> Mixture:
        """Return the mixture as a run left it, to price anew what has changed since.

        The model begins with the run's weights, and the mixture with the run's; but each changed
        domain begins with a share of one over the number of domains, so that it can rise, too.

        Args:
          solution: of `solve` on a mixture of as many domains.
          changed: names of the domains that are other than they were.
          run: which run, where the solution has several.

        Raises:
          ValueError: for a name that is no domain's, or a run that there is not.
        """
        check_instance("solution", solution, Solution)
        shape = np.shape(solution.diverged_at)
        if (run is None) != (shape == ()) or (run is not None and run not in range(shape[0])):
            accepted = f"one of {shape[0]} runs" if shape else "None: there is one run"
            raise ValueError(f"run must be {accepted}, got {run}")
        for name in changed:
            if name not in self.domains:
                raise ValueError(f"changed must be among {list(self.names)}, got {name!r}")
        pick = (lambda x: x) if run is None else (lambda x: x[run])
        params = jax.tree.map(pick, solution.state.params)
        before = np.asarray(pick(solution.state.hyperparams[WEIGHTS]), float)
        new, n = np.array([name in changed for name in self.names]), len(self.names)
        kept = before * ~new
        kept = kept / kept.sum() if kept.any() else kept
        weights = np.where(new, 1 / n, kept * (1 - new.sum() / n))
        return self.replace(init=_Constant(params), weights=weights / weights.sum())

    def _start(self, key: jax.Array) -> tuple[PyTree, dict[str, Any]]:
        return self.init(key), self.hyperparams_with(jnp.asarray(self.first_weights))

    def hyperparams_with(self, weights: jax.Array) -> dict[str, jax.Array]:
        """Return λ with these weights, `(domains,)`, as a run begins with it."""
        kind = jnp.result_type(float)
        return {WEIGHTS: weights} | {n: jnp.asarray(x, kind) for n, x in self.hyperparams.items()}

    def train_loss(self, params: PyTree, hyperparams: Mapping[str, Any], batch: Any) -> jax.Array:
        """Return the loss of a training batch at the weights `hyperparams["weights"]`, a scalar."""
        weights = hyperparams[WEIGHTS]
        if self.draw == "weighted":
            return weights @ self.losses_by_set(params, batch["rows"])
        fixed = jax.lax.stop_gradient(weights)
        domain = systematic(batch["offset"], fixed, self.rows)
        rows = jax.tree.map(lambda x: x[domain, jnp.arange(self.rows)], batch["rows"])
        # Its value is 1; its derivative is that of the domain's probability, over it.
        ratio = weights[domain] / fixed[domain]
        return jnp.mean(ratio * self._losses(params, rows))

    def losses_by_set(self, params: PyTree, rows: PyTree) -> jax.Array:
        """Return the mean loss of each of several sets of rows, `(sets,)`.

        Args:
          params: of the model.
          rows: pytree of arrays `(sets, rows, …)`.
        """
        return self.row_losses(params, rows).mean(-1)

    def row_losses(self, params: PyTree, rows: PyTree) -> jax.Array:
        """Return the loss of each row of several sets of rows, `(sets, rows)`; as above."""
        sets = jax.tree.leaves(rows)[0].shape[0]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        return self._losses(params, flat).reshape(sets, -1)

    def _losses(self, params: PyTree, rows: PyTree) -> jax.Array:
        losses = self.loss(params, rows)
        n = jax.tree.leaves(rows)[0].shape[0]
        if jnp.shape(losses) != (n,):
            got = jnp.shape(losses)
            raise ValueError(f"Mixture.loss must return the loss of each of {n} rows, got {got}")
        return losses

    def _val_loss(self, params: PyTree, hyperparams: PyTree, batch: PyTree) -> jax.Array:
        del hyperparams
        return self.objective(self.losses_by_set(params, batch))

    def _data(self, key: jax.Array) -> dict[str, Any]:
        del key
        sets = {"domains": self._domains, "targets": self._targets, "held_out": self._held_out}
        return {
            name: jax.tree.map(jnp.asarray, rows.arrays)
            for name, rows in sets.items()
            if rows is not None
        }

    def _batch(self, key: jax.Array, data: Any) -> tuple[Any, Any]:
        one, two = jax.random.split(key)
        train = self._drawn(one, data)
        if self.stack is not None:
            train = jax.vmap(lambda k: self._drawn(k, data))(jax.random.split(one, self.stack))
        return train, self._targets.draw(two, data["targets"], self.target_rows)

    def _held_batch(self, key: jax.Array, data: Any) -> tuple[Any, Any]:
        return self._drawn(jax.random.split(key)[0], data), ()

    def _drawn(self, key: jax.Array, data: Any) -> dict[str, Any]:
        assert self._domains is not None
        one, two = jax.random.split(key)
        made = {"rows": self._domains.draw(one, data["domains"], self.domain_rows)}
        if self.draw == "sampled":
            made["offset"] = jax.random.uniform(two)
        return made

    def _batches(self, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
        read = self._read(rng)
        if self.stack is not None:
            read = _stacks(read, self.stack)
        for train, chosen in read:
            yield train, self._targets.draw_on_host(chosen, self.target_rows)

    def _held_batches(self, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
        for train, _ in self._read(rng):
            yield train, ()

    def _read(self, rng: np.random.Generator) -> Iterator[tuple[Any, np.random.Generator]]:
        offsets, chosen = (np.random.default_rng(int(x)) for x in rng.integers(2**32, size=2))
        for rows in together("domains", self.domains, rng, self.domain_rows):
            made: dict[str, Any] = {"rows": rows}
            if self.draw == "sampled":
                made["offset"] = np.float32(offsets.random(dtype=np.float32))
            yield made, chosen

    def _metrics(self, params: PyTree, hyperparams: PyTree, data: Any) -> dict[str, jax.Array]:
        weights = hyperparams[WEIGHTS]
        found = {f"weight/{name}": weights[i] for i, name in enumerate(self.names)}
        for index, name in enumerate(self.targets):
            found[f"target/{name}"] = self._mean(params, self._targets.of(data["targets"], index))
        for index, name in enumerate(self.held_out):
            assert self._held_out is not None
            found[name] = self._mean(params, self._held_out.of(data["held_out"], index))
        return found

    def _mean(self, params: PyTree, rows: PyTree) -> jax.Array:
        """Return the mean loss of all rows, in chunks."""
        n = jax.tree.leaves(rows)[0].shape[0]
        whole = n - n % CHUNK
        total = jnp.sum(self._losses(params, _part(rows, whole, n))) if n > whole else 0.0
        if whole:
            chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, CHUNK, *x.shape[1:]), rows)
            sums = jax.lax.map(lambda chunk: jnp.sum(self._losses(params, chunk)), chunks)
            total = total + jnp.sum(sums)
        return jnp.asarray(total / n)


def _stacks(pairs: Iterator[tuple[Any, Any]], length: int) -> Iterator[tuple[Any, Any]]:
    """Yield stacks of batches, each whole."""
    while len(made := list(itertools.islice(pairs, length))) == length:
        yield jax.tree.map(lambda *x: np.stack(x), *(train for train, _ in made)), made[0][1]


def _part(rows: PyTree, start: int, stop: int) -> PyTree:
    return jax.tree.map(lambda x: x[start:stop], rows)


def _nothing(params: PyTree, hyperparams: Mapping[str, Any], batch: Any) -> jax.Array:
    """Return 0: nothing is tuned."""
    del params, batch
    return 0.0 * jnp.sum(hyperparams[WEIGHTS])


class _Constant:
    """An `init` that gives the same weights with every key."""

    def __init__(self, params: PyTree) -> None:
        self._params = params

    def __call__(self, key: jax.Array) -> PyTree:
        assert is_key(key)
        return self._params


def check_weights(name: str, weights: Any, domains: int) -> np.ndarray:
    """Return weights of so many domains as float32, `(…, domains)`.

    Raises:
      ValueError: if they are not on the simplex.
    """
    found = np.asarray(weights, float)
    if found.ndim == 0 or found.shape[-1] != domains:
        raise ValueError(f"{name} must have {domains} numbers, one a domain, got {found.shape}")
    if not (found >= 0).all() or not np.allclose(found.sum(-1), 1, atol=1e-4):
        raise ValueError(f"{name} must be at least 0 and add up to 1, got {weights}")
    return (found / found.sum(-1, keepdims=True)).astype(np.float32)

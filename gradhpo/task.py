"""What a step is given: `Task`, the batches and losses; and what a loss may take and return."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.errors import check_hashable, check_same_tree, described, shown, tracing
from gradhpo.remembered import stands_for
from gradhpo.state import METRICS, BilevelState, LossFn, PyTree, as_array, is_key

OWN = 3
"""Arguments of a loss, and of an `update_fn`: the weights, the hyperparameters, the batch."""


TRAIN, NEXT, VAL, CALIBRATION = range(4)
"""What the key of a step is drawn for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What a loss may return beside its value: `return loss, gradhpo.Aux(...)`."""

    model_state: PyTree = None
    """From a training loss that takes `model_state`: what it is after the step, such as running
    statistics, in the structure and shapes that it had. None leaves it as it was."""
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Scalars by name. They join the metrics of the step, with `train_` or `val_` before the name:
    `{"accuracy": a}` of the validation loss is "val_accuracy"."""


class Carried(NamedTuple):
    """`s_t`: what an inner step reads and leaves behind besides the weights."""

    opt_state: PyTree
    """The inner optimizer's state; None with an `update_fn`."""
    model_state: PyTree = None
    """What the losses remember; None where they remember nothing."""
    key: Any = None
    """Where this step's randomness comes from; None where the task has no key."""
    fixed: PyTree = None
    """The leaves of `params` that are no floating-point arrays, which an `update_fn` may have; None
    in place of the others, or if there are none."""

    def draw(self, purpose: int) -> Any:
        """Return a key for one purpose; None where there is no key."""
        return None if self.key is None else jax.random.fold_in(self.key, purpose)

    def given(self, purpose: int) -> dict[str, Any]:
        """Return what a loss or an `update_fn` may take besides its own arguments."""
        return {"model_state": self.model_state, "key": self.draw(purpose)}

    def whole(self, params: PyTree) -> PyTree:
        """Return the weights together with the leaves that are none."""
        return join_fixed(params, self.fixed)


def split_fixed(params: PyTree) -> tuple[PyTree, PyTree]:
    """Return the floating-point leaves of `params`, and the others, with None in their places."""
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params)]
    if all(floating):
        return params, None
    which = jax.tree.unflatten(jax.tree.structure(params), floating)
    return (
        jax.tree.map(lambda x, is_floating: x if is_floating else None, params, which),
        jax.tree.map(lambda x, is_floating: None if is_floating else x, params, which),
    )


def join_fixed(floating: PyTree, others: PyTree) -> PyTree:
    """Return what `split_fixed` took apart."""
    if others is None:
        return floating
    return jax.tree.map(lambda a, b: b if a is None else a, floating, others, is_leaf=is_none)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """What a step is given besides the state. A pytree, whose losses are static.

    `BilevelOptimizer.step` makes one of its arguments; `advance`, `estimate` and `calibrate` take
    one.
    """

    train_batch: PyTree
    """A pytree of arrays, passed to `train_loss`; for `calibrate` a stack of `T` of them."""
    val_batch: PyTree
    """A pytree of arrays, passed to `val_loss`."""
    train_loss: LossFn = dataclasses.field(metadata={"static": True})
    """`(params, hyperparams, batch) -> scalar`, or more: see `Problem.train_loss`."""
    val_loss: LossFn = dataclasses.field(metadata={"static": True})
    """`(params, hyperparams, batch) -> scalar`, or more: see `Problem.val_loss`."""
    key: Any = None
    """Where losses that take a `key` get it from: a typed PRNG key, another one at every step. What
    they get differs between the inner steps of a step, and between the two losses."""

    @classmethod
    def of(
        cls, train_batch: PyTree, val_batch: PyTree, train_loss: Any, val_loss: Any, key: Any
    ) -> Task:
        """Return the task of a user's own arguments.

        Raises:
          TypeError: if a loss cannot be a static argument, or the key is none.
        """
        check_hashable("train_loss_fn", train_loss)
        check_hashable("val_loss_fn", val_loss)
        if key is not None:
            key = typed_key("key", key)
        return cls(train_batch, val_batch, train_loss, val_loss, key)

    def at(self, step: Any, purpose: int | None = None) -> Task:
        """Return the task with a key of its own for this step, or for what comes before it."""
        if self.key is None:
            return self
        key = jax.random.fold_in(self.key, step)
        key = key if purpose is None else jax.random.fold_in(key, purpose)
        return dataclasses.replace(self, key=key)

    def after(self, steps: int) -> Task:
        """Return the task with the key that is left after so many inner steps."""
        if self.key is None:
            return self
        key = jax.lax.fori_loop(0, steps, lambda _, key: jax.random.fold_in(key, NEXT), self.key)
        return dataclasses.replace(self, key=key)

    def start(self, state: BilevelState) -> tuple[PyTree, Carried]:
        """Return the weights before the step, and what it carries besides."""
        params, fixed = split_fixed(state.params)
        return params, Carried(state.inner_opt_state, state.model_state, self.key, fixed)

    def validate(
        self, params: PyTree, carried: Carried, hyperparams: PyTree
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the validation loss after an inner step, and its further metrics."""
        arguments = (carried.whole(params), hyperparams, self.val_batch)
        loss, aux = evaluate("val_loss_fn", self.val_loss, arguments, **carried.given(VAL))
        return loss, aux.metrics

    def plain(self, state: BilevelState) -> Task:
        """Return the task with losses that take and return nothing more, at this state.

        They are for a `compute_hypergradient` of one's own, which knows of nothing more; to it the
        validation loss reads what is remembered before the step.
        """
        carried = self.start(state)[1]

        def plain(name: str, loss_fn: LossFn, purpose: int) -> LossFn:
            def loss(params: PyTree, hyperparams: PyTree, batch: PyTree) -> jax.Array:
                arguments = (params, hyperparams, batch)
                return evaluate(name, loss_fn, arguments, **carried.given(purpose))[0]

            return stands_for(loss, loss_fn)

        return dataclasses.replace(
            self,
            train_loss=plain("train_loss_fn", self.train_loss, TRAIN),
            val_loss=plain("val_loss_fn", self.val_loss, VAL),
        )

    def asks_for_key(self) -> bool:
        """Whether a loss takes a `key`."""
        return any(asks(loss, "key") for loss in (self.train_loss, self.val_loss))


def typed_key(name: str, key: Any) -> jax.Array:
    """Return one typed key from a typed or a legacy one.

    Raises:
      TypeError: if it is neither, or more than one.
    """
    accepted = f"{name} must be one key made by jax.random.key"
    key = typed_keys(accepted, key)
    if key.shape != ():
        raise TypeError(f"{accepted}, got keys of shape {key.shape}")
    return key


def typed_keys(accepted: str, keys: Any) -> jax.Array:
    """Return typed keys of any shape from typed or legacy ones.

    Raises:
      TypeError: if they are neither; it begins with what is `accepted`.
    """
    if not isinstance(keys, jax.Array):
        if isinstance(keys, list | tuple):
            raise TypeError(f"{accepted}, got {described(keys)}: jnp.stack makes an array of them")
        raise TypeError(f"{accepted}, got {shown(keys)}")
    if is_key(keys):
        return keys
    if keys.dtype != jnp.uint32 or keys.shape[-1:] != (2,):
        raise TypeError(f"{accepted}, got an array of {keys.dtype} of shape {keys.shape}")
    return jax.random.wrap_key_data(keys)


def asks(function: Callable[..., Any], name: str, own: int = OWN) -> bool:
    """Whether a function takes an argument of this name besides its own first ones.

    One with a default other than None, as `functools.partial` gives it, is bound already.
    """
    parameter = _parameter(function, name, own)
    if parameter is None:
        return False
    return parameter.default is None or parameter.default is inspect.Parameter.empty


def _parameter(function: Callable[..., Any], name: str, own: int) -> inspect.Parameter | None:
    try:
        signature = inspect.signature(function, follow_wrapped=False)
        passed_on = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if any(p.kind in passed_on for p in signature.parameters.values()):
            signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function of C, which does not say
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    rest = list(signature.parameters.values())[own:]
    return next((p for p in rest if p.name == name and p.kind in kinds), None)


def wanted(
    name: str, function: Callable[..., Any], own: int = OWN, /, **there: Any
) -> dict[str, Any]:
    """Return what a function takes of `model_state` and `key`, besides its own first arguments.

    Raises:
      ValueError: if it takes one that is not there, and has no default for it.
    """
    given = {what: value for what, value in there.items() if asks(function, what, own)}
    for what, value in list(given.items()):
        parameter = _parameter(function, what, own)
        if value is None and parameter is not None and parameter.default is None:
            del given[what]
        elif value is None:
            raise ValueError(f"{name} takes {what}, and there is none: {_WHERE_FROM[what]}")
    return given


_WHERE_FROM = {
    "model_state": "Problem.init must return (params, hyperparams, model_state), or "
    "optimizer.init take model_state=",
    "key": "pass key= to step, run or compute_hypergradient",
}


def evaluate(
    name: str,
    loss_fn: LossFn,
    arguments: tuple[PyTree, PyTree, PyTree],
    *,
    model_state: PyTree = None,
    key: Any = None,
) -> tuple[jax.Array, Aux]:
    """Return a loss's value, one floating-point scalar, and what it returns besides, checked.

    Args:
      name: `"train_loss_fn"` or `"val_loss_fn"`.
      loss_fn: the user's function.
      arguments: weights, hyperparameters, batch.
      model_state: for a loss that takes it.
      key: for a loss that takes it.

    Raises:
      ValueError: for a value of another shape, or a `model_state` that is not there or not alike.
      TypeError: for a value or a metric that is no number.
    """
    problem_name = f"Problem.{name.removesuffix('_fn')}"
    given = wanted(f"{name} ({problem_name})", loss_fn, model_state=model_state, key=key)
    params, hyperparams, batch = arguments
    kind = f"{name.removesuffix('_loss_fn')}_batch"
    told_of = {"params": params, "hyperparams": hyperparams, kind: batch}
    with tracing(f"{name} ({problem_name})", **told_of):
        made = loss_fn(params, hyperparams, batch, **given)
    value, aux = without_aux(made)
    aux = Aux() if aux is None else aux
    accepted = f"{name} must return one floating-point scalar"
    if not isinstance(value, jax.Array | np.ndarray | np.generic | float | int):
        more = ", or (scalar, gradhpo.Aux(...))" if isinstance(value, tuple) else ""
        raise TypeError(f"{accepted}{more}, got {type(value).__name__}")
    if jnp.shape(value) != ():
        raise ValueError(f"{accepted}, got an array of shape {jnp.shape(value)}: average it")
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(f"{accepted}, got {jnp.result_type(value)}")
    return jnp.asarray(value), _checked(name, aux, model_state)


def without_aux(made: Any) -> tuple[Any, Aux | None]:
    """Return what a function returned, and the `Aux` beside it if there is one."""
    pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Aux)
    return (made[0], made[1]) if pair else (made, None)


def _checked(name: str, aux: Aux, model_state: PyTree) -> Aux:
    """Return an `Aux` with the metrics' full names, and the model state in the dtypes it had."""
    prefix = name.removesuffix("loss_fn")
    if not isinstance(aux.metrics, Mapping):
        raise TypeError(f"{name}: Aux.metrics must be a dict, got {type(aux.metrics).__name__}")
    metrics: dict[str, jax.Array] = {}
    for given, value in aux.metrics.items():
        full = f"{prefix}{given}"
        if not isinstance(given, str):
            raise TypeError(f"{name}: Aux.metrics must have texts for names, got {given!r}")
        if full in METRICS:
            raise ValueError(f"{name}: Aux.metrics must have names other than {given!r}")
        if not isinstance(value, jax.Array | np.ndarray | np.generic | float | int):
            got = type(value).__name__
            raise TypeError(f"{name}: Aux.metrics[{given!r}] must be a number, got {got}")
        if jnp.shape(value) != ():
            got = f"shape {jnp.shape(value)}"
            raise ValueError(f"{name}: Aux.metrics[{given!r}] must be a scalar, got {got}")
        metrics[full] = jax.lax.stop_gradient(as_array(value, jnp.result_type(float)))
    if aux.model_state is None:
        return Aux(None, metrics)
    if name == "val_loss_fn":
        raise ValueError("val_loss_fn returns a model_state: it may read it, and not change it")
    if model_state is None:
        where = _WHERE_FROM["model_state"]
        raise ValueError(f"{name} returns a model_state, and there was none: {where}")
    check_same_tree(
        f"{name}'s model_state", aux.model_state, "model_state", model_state, dtypes=False
    )
    alike = jax.tree.map(lambda new, old: as_array(new, old.dtype), aux.model_state, model_state)
    return Aux(alike, metrics)


def told(state: BilevelState, task: Task) -> dict[str, jax.Array]:
    """Return the metrics that the losses return before a step, of one training batch."""
    params, carried = task.start(state)
    arguments = (carried.whole(params), state.hyperparams, task.train_batch)
    _, aux = evaluate("train_loss_fn", task.train_loss, arguments, **carried.given(TRAIN))
    return aux.metrics | task.validate(params, carried, state.hyperparams)[1]


def step_metrics(metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of a step's metrics: `METRICS`, and those that the losses returned."""
    own = [name for name in metadata if name.startswith(("train_", "val_"))]
    return [*METRICS, *sorted(set(own) - set(METRICS))]


def is_none(value: Any) -> bool:
    """Whether this is None, which a tree has in place of a leaf that is elsewhere."""
    return value is None

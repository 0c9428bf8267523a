"""Modules of Flax NNX and Equinox as weights and model state, and their losses as the library's."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.errors import check_callable
from gradhpo.state import LossFn, PyTree, is_key
from gradhpo.task import Aux


class FlaxModel:
    """A Flax NNX module: its `nnx.Param`s are the weights, its other variables the model state.

    Running statistics, EMA copies and what else its layers write are carried from step to step;
    the random streams of its layers (`nnx.Dropout`) are seeded anew at every step by the key that
    the run gives. Needs `flax`.

    Args:
      make: `rngs -> module`, where `rngs` is an `nnx.Rngs`. Called once for each initialization.

    Example:
      ```
      model = gradhpo.FlaxModel(lambda rngs: Net(rngs=rngs))

      def loss(module, hyperparams, batch):
          return cross_entropy(module(batch["x"]), batch["y"])

      losses = model.train_loss(loss), model.val_loss(loss)
      problem = gradhpo.Problem(model.start({"rate": jnp.log(0.1)}), *losses, batches=loader)
      ```
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        check_callable("make", make)
        self._make = make

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        """The module's graph, and the shapes of its random streams and of its model state."""
        nnx = _nnx()
        module = nnx.eval_shape(lambda: self._make(nnx.Rngs(0)))
        if not isinstance(module, nnx.Module):
            raise TypeError(f"make must return an nnx.Module, got {type(module).__name__}")
        graph, _, streams, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return graph, streams, rest

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Return the weights and the model state of a new module; the latter None if it has none.

        Args:
          key: what the module's `rngs` are made of.
        """
        nnx = _nnx()
        return self._split(self._make(nnx.Rngs(key)))

    def start(self, hyperparams: PyTree) -> Callable[[jax.Array], tuple[PyTree, PyTree, PyTree]]:
        """Return an `init` for `Problem`: a new module, and these hyperparameters."""
        return _starting(self.init, hyperparams)

    def module(self, params: PyTree, model_state: PyTree = None, key: Any = None) -> Any:
        """Return a module with these weights and this state.

        Args:
          params: from `init` or `state.params`.
          model_state: from `init` or `state.model_state`.
          key: what seeds its random streams; 0 by default.
        """
        nnx = _nnx()
        graph, streams, rest = self._parts
        if jax.tree.leaves(rest):
            if model_state is None:
                missing = "this module has variables other than nnx.Param"
                raise ValueError(f"model_state is missing: {missing}")
            rest = model_state
        seeded = _seeded(streams, jax.random.key(0) if key is None else key)
        return nnx.merge(graph, params, seeded, rest, copy=True)

    def train_loss(self, loss: Callable[[Any, Any, Any], Any]) -> LossFn:
        """Return a training loss for `Problem`, from `(module, hyperparams, batch) -> scalar`.

        The module is in training mode, and what its layers write is carried on. The loss may
        return `(scalar, {name: scalar})`: metrics that join those of the step.
        """
        return self._loss(loss, training=True)

    def val_loss(self, loss: Callable[[Any, Any, Any], Any]) -> LossFn:
        """Return a validation loss for `Problem`: as `train_loss`, the module in evaluation mode.

        What its layers write is dropped.
        """
        return self._loss(loss, training=False)

    def _loss(self, loss: Callable[[Any, Any, Any], Any], training: bool) -> LossFn:
        check_callable("loss", loss)
        _, streams, rest = self._parts
        draws, remembers = bool(jax.tree.leaves(streams)), bool(jax.tree.leaves(rest))

        def on_module(params: PyTree, hyperparams: PyTree, batch: PyTree, **given: Any) -> Any:
            module = self.module(params, given.get("model_state"), given.get("key"))
            module.train() if training else module.eval()
            value, metrics = _with_metrics(loss(module, hyperparams, batch))
            if not training:
                return value, Aux(None, metrics)
            after, new = self._split(module)
            _refuse_written(params, after)
            _refuse_new(given.get("model_state"), new)
            return value, Aux(new, metrics)

        return _signed(on_module, loss, model_state=remembers, key=draws)

    @staticmethod
    def _split(module: Any) -> tuple[PyTree, PyTree]:
        """Return a module's weights, and its model state or None."""
        nnx = _nnx()
        _, params, _, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return params, rest if jax.tree.leaves(rest) else None


class EquinoxModel:
    """An Equinox module: its floating-point arrays are the weights, `eqx.nn.State` the model state.

    Needs `equinox`.

    Args:
      make: `key -> module`, or `key -> (module, state)`, as `eqx.nn.make_with_state(Net)` gives.
    """

    def __init__(self, make: Callable[[jax.Array], Any]) -> None:
        check_callable("make", make)
        self._make = make

    @functools.cached_property
    def _parts(self) -> tuple[Any, bool]:
        """What of the module is no array, and whether there is a model state."""
        eqx = _equinox()
        made = eqx.filter_eval_shape(self._make, jax.random.key(0))
        module, state = _module_and_state(made)
        remembers = bool(jax.tree.leaves(_rest_of(module, state)))
        return eqx.filter(module, lambda x: not hasattr(x, "dtype")), remembers

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Return the weights and the model state of a new module; the latter None if it has none.

        Args:
          key: passed to `make`.
        """
        module, state = _module_and_state(self._make(key))
        rest = _rest_of(module, state)
        return _equinox().filter(module, _floating), rest if self._parts[1] else None

    def start(self, hyperparams: PyTree) -> Callable[[jax.Array], tuple[PyTree, PyTree, PyTree]]:
        """Return an `init` for `Problem`: a new module, and these hyperparameters."""
        return _starting(self.init, hyperparams)

    def module(self, params: PyTree, model_state: PyTree = None) -> tuple[Any, Any]:
        """Return the module with these weights, and its `eqx.nn.State`; None where it has none.

        Args:
          params: from `init` or `state.params`.
          model_state: from `init` or `state.model_state`.
        """
        eqx, (static, remembers) = _equinox(), self._parts
        if remembers and model_state is None:
            raise ValueError("model_state is missing: this module has a state or integer arrays")
        # A state of its own: eqx.nn.State may be set once only.
        model_state = jax.tree.map(lambda x: x, model_state)
        others, state = (static, None) if model_state is None else model_state
        return eqx.combine(params, others, static), state

    def train_loss(self, loss: Callable[..., Any]) -> LossFn:
        """Return a training loss for `Problem`.

        Args:
          loss: `(module, hyperparams, batch, state, key) -> scalar`, or `(scalar, state)` with the
            new `eqx.nn.State`, or `(scalar, {name: scalar})`, or `(scalar, state, {name: scalar})`:
            metrics that join those of the step. `state` is None where `make` gives none.
        """
        return self._loss(loss, training=True)

    def val_loss(self, loss: Callable[..., Any]) -> LossFn:
        """Return a validation loss for `Problem`: as `train_loss`, the module in inference mode.

        The state that it returns is dropped.
        """
        return self._loss(loss, training=False)

    def _loss(self, loss: Callable[..., Any], training: bool) -> LossFn:
        check_callable("loss", loss)
        eqx = _equinox()

        def on_module(params: PyTree, hyperparams: PyTree, batch: PyTree, **given: Any) -> Any:
            model_state = given.get("model_state")
            module, state = self.module(params, model_state)
            module = module if training else eqx.nn.inference_mode(module)
            made = loss(module, hyperparams, batch, state, given["key"])
            value, new, metrics = _three(made)
            if not training or new is None or model_state is None:
                return value, Aux(metrics=metrics)
            return value, Aux((model_state[0], new), metrics)

        return _signed(on_module, loss, model_state=self._parts[1], key=True)


def _starting(
    make: Callable[[jax.Array], tuple[PyTree, PyTree]], hyperparams: PyTree
) -> Callable[[jax.Array], tuple[PyTree, PyTree, PyTree]]:
    def init(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
        params, model_state = make(key)
        return params, hyperparams, model_state

    return init


def _signed(on_module: Callable[..., Any], loss: Callable[..., Any], **takes: bool) -> LossFn:
    """Return a loss whose signature says which of `model_state` and `key` it takes."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [inspect.Parameter(name, kind) for name in ("params", "hyperparams", "batch")]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name, t in takes.items() if t
    ]
    on_module.__name__ = getattr(loss, "__name__", type(loss).__name__)
    on_module.__signature__ = inspect.Signature([*own, *more])  # pyright: ignore[reportFunctionMemberAccess]
    return on_module


def _with_metrics(made: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Mapping):
        return made[0], dict(made[1])
    return made, {}


def _three(made: Any) -> tuple[Any, Any, dict[str, Any]]:
    value, metrics = _with_metrics(made)
    if metrics or not isinstance(value, tuple):
        return value, None, metrics
    if len(made) not in (2, 3):
        accepted = "a scalar, (scalar, state) or (scalar, state, metrics)"
        raise TypeError(f"loss must return {accepted}, got a tuple of {len(made)}")
    return made[0], made[1], dict(made[2]) if len(made) == 3 else {}


def _refuse_written(before: PyTree, after: PyTree) -> None:
    """Raise if a module wrote to its weights, which the optimizer alone moves."""
    leaves, written = tree_flatten_with_path(before)[0], jax.tree.leaves(after)
    for (path, old), new in zip(leaves, written, strict=True):
        if new is not old:
            raise ValueError(
                f"the module writes to its nnx.Param {keystr(path)} while it runs, as "
                "nnx.SpectralNorm does: weights are moved by the inner optimizer alone. Make it "
                "another kind of nnx.Variable"
            )


def _refuse_new(before: PyTree, after: PyTree) -> None:
    """Raise if a module made variables while it ran, as `sow` does."""
    known = {keystr(path) for path, _ in tree_flatten_with_path(before)[0]}
    made = [keystr(path) for path, _ in tree_flatten_with_path(after)[0]]
    if new := [path for path in made if path not in known]:
        raise ValueError(
            f"the module made the variable {new[0]} while it ran (sow, say): what it remembers "
            "must be there from the start. Return it as a metric"
        )


def _seeded(streams: Any, key: jax.Array) -> Any:
    """Return the random streams of a module, the i-th seeded by `fold_in(key, i)`; counts of 0."""
    leaves, structure = jax.tree.flatten(streams)
    indices = itertools.count()

    def value(leaf: Any) -> jax.Array:
        if not is_key(leaf):
            return jnp.zeros(leaf.shape, leaf.dtype)
        own = jax.random.fold_in(key, next(indices))
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    return structure.unflatten([value(leaf) for leaf in leaves])


def _module_and_state(made: Any) -> tuple[Any, Any]:
    pair = isinstance(made, tuple) and len(made) == 2
    return (made[0], made[1]) if pair else (made, None)


def _rest_of(module: Any, state: Any) -> PyTree:
    """Return the arrays of a module that are no weights, and its state."""
    return _equinox().filter(module, lambda x: hasattr(x, "dtype") and not _floating(x)), state


def _floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _nnx() -> Any:
    return _imported("flax.nnx", "FlaxModel")


def _equinox() -> Any:
    return _imported("equinox", "EquinoxModel")


def _imported(name: str, who: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".", maxsplit=1)[0]
        raise ImportError(f"{who} needs {package}: pip install {package}") from error

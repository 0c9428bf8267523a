"""Derivatives of a solver of one's own, by the implicit function theorem.

Where `F(x, θ) = 0` holds at what a solver returns, `∂x/∂θ = -(∂F/∂x)⁻¹ ∂F/∂θ`, however it got
there: its iterations are never differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.errors import check_callable, check_floating, check_same_tree
from gradhpo.state import PyTree

__all__ = ["custom_fixed_point", "custom_root"]

Solver = Callable[..., Any]
"""`(init, *args) -> x`, or `(x, aux)`."""


def custom_root(
    optimality_fun: Callable[..., PyTree],
    *,
    has_aux: bool = False,
    linear_solver: Any = None,
    tags: Any = (),
) -> Callable[[Solver], Solver]:
    """Decorate a solver whose result is a root: `optimality_fun(x, *args) = 0`.

    The decorated solver has derivatives of any order in `args`, by forward and by reverse mode
    (`jax.jvp`, `jax.grad`, `jax.jacobian`), under `jax.jit` and `jax.vmap`. They are exact where
    the solver has converged: `optimality_fun` is most often the gradient in x of what is minimized.
    Needs `lineax`, which solves the linear system (`pip install 'gradhpo[root]'`).

    Args:
      optimality_fun: `(x, *args) -> tree`, in the structure and shapes of x, differentiable.
      has_aux: whether the solver returns `(x, aux)`: aux is passed on, and has no derivative.
      linear_solver: a `lineax` solver for `(∂F/∂x) v = b`. By default the Jacobian is formed, by as
        many products as x has numbers, and solved directly: exact, for up to some thousand.
        `lineax.GMRES`, `lineax.BiCGStab` and `lineax.CG` only take products; the last needs tags.
      tags: what `lineax` may know of `∂F/∂x`, such as `lineax.symmetric_tag` or
        `lineax.positive_semidefinite_tag`. Not checked.

    Returns:
      A decorator of solvers `(init, *args) -> x`. `init` may be anything, and has no derivative.
      Only what comes in by `args` is differentiated, and not what a solver closes over. Integers,
      booleans and what is no number are handed on as they are; keyword arguments are put in their
      places.

    Raises:
      ImportError: if lineax is missing.
      TypeError: if `optimality_fun` or what is decorated is no function; when called, for keyword
        arguments that have no place, or an x that is not of floating-point arrays.
      ValueError: when called, if `optimality_fun` returns another structure than x. The linear
        solve raises, at run time, if `∂F/∂x` is singular.

    References:
      Blondel et al., Efficient and Modular Implicit Differentiation, NeurIPS 2022.

    Example:
      ```
      @gradhpo.root.custom_root(jax.grad(ridge_loss))
      def ridge(init, penalty, x, y):
          return jnp.linalg.solve(x.T @ x + penalty * jnp.eye(x.shape[1]), x.T @ y)

      jax.grad(lambda penalty: val_loss(ridge(None, penalty, x, y)))(1.0)
      ```
    """
    check_callable("optimality_fun", optimality_fun)
    lineax = _lineax()
    linear_solver = lineax.AutoLinearSolver(None) if linear_solver is None else linear_solver
    return _Decorator(optimality_fun, has_aux, linear_solver, tags)


def custom_fixed_point(
    fixed_point_fun: Callable[..., PyTree],
    *,
    has_aux: bool = False,
    linear_solver: Any = None,
    tags: Any = (),
) -> Callable[[Solver], Solver]:
    """Decorate a solver whose result is a fixed point: `fixed_point_fun(x, *args) = x`.

    As `custom_root` of `fixed_point_fun(x, *args) - x`: a step of projected or proximal gradient
    descent, whose fixed points are minima under constraints, or a layer that is iterated.

    Args:
      fixed_point_fun: `(x, *args) -> tree`, in the structure and shapes of x, differentiable.
      has_aux: as for `custom_root`.
      linear_solver: as for `custom_root`, of `(∂T/∂x - I) v = b`.
      tags: as for `custom_root`.

    Returns:
      A decorator of solvers `(init, *args) -> x`.

    Raises:
      ImportError: if lineax is missing.
      TypeError: as `custom_root`.
      ValueError: as `custom_root`.
    """
    check_callable("fixed_point_fun", fixed_point_fun)

    def moved(x: PyTree, *args: Any) -> PyTree:
        made = fixed_point_fun(x, *args)
        check_same_tree("fixed_point_fun's result", made, "x", x, dtypes=False)
        return optax.tree.sub(made, x)

    return custom_root(moved, has_aux=has_aux, linear_solver=linear_solver, tags=tags)


@dataclasses.dataclass(frozen=True)
class _Decorator:
    """Gives a solver the derivatives of a root of `optimality_fun`."""

    optimality_fun: Callable[..., PyTree]
    has_aux: bool
    linear_solver: Any
    tags: Any

    def __call__(self, solver: Solver) -> Solver:
        """Return the solver with derivatives."""
        check_callable("the decorated solver", solver)

        @functools.wraps(solver)
        def solved(init: Any, *args: Any, **kwargs: Any) -> Any:
            whole, given = _apart((init, _in_their_places(solver, args, kwargs)))

            def condition(x: PyTree, given: list[Any]) -> PyTree:
                made = self.optimality_fun(x, *whole(given)[1])
                check_same_tree("optimality_fun's result", made, "x", x, dtypes=False)
                return made

            solution = jax.custom_jvp(lambda given: self._solve(solver, *whole(given)))

            def with_tangent(primals: Any, tangents: Any) -> Any:
                (given,), (along,) = primals, tangents
                x, aux = solution(given)  # has derivatives itself: those of higher order
                x_along = self._tangent(condition, x, given, along)
                return (x, aux), (x_along, jax.tree.map(_zero_along, aux))

            solution.defjvp(with_tangent)
            x, aux = solution(given)
            return (x, aux) if self.has_aux else x

        return solved

    def _solve(self, solver: Solver, init: Any, args: tuple[Any, ...]) -> tuple[PyTree, Any]:
        made = solver(init, *args)
        if self.has_aux and not (isinstance(made, tuple) and len(made) == 2):
            got = type(made).__name__
            raise TypeError(f"has_aux=True: the decorated solver must return (x, aux), got {got}")
        x, aux = made if self.has_aux else (made, None)
        check_floating("the solution x", x)
        return x, aux

    def _tangent(
        self, condition: Callable[[PyTree, Any], PyTree], x: PyTree, given: Any, along: Any
    ) -> PyTree:
        """Return `-(∂F/∂x)⁻¹ (∂F/∂θ) θ̇`: linear in θ̇, so that JAX can transpose it."""
        lineax = _lineax()
        target = jax.jvp(lambda given: condition(x, given), (given,), (along,))[1]
        product = jax.linearize(lambda x: condition(x, given), x)[1]
        jacobian = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: x), self.tags)
        minus = optax.tree.scale(-1, target)
        return lineax.linear_solve(jacobian, minus, self.linear_solver).value


def _lineax() -> Any:
    try:
        return importlib.import_module("lineax")
    except ImportError as error:
        message = "gradhpo.root needs lineax: pip install 'gradhpo[root]'"
        raise ImportError(message) from error


def _in_their_places(
    solver: Solver, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return positional arguments for `args` and `kwargs`, those of `init` left out."""
    if not kwargs:
        return args
    bound = inspect.signature(solver).bind(None, *args, **kwargs)
    if bound.kwargs:
        raise TypeError(
            f"the decorated solver's arguments must have a place, since optimality_fun takes them "
            f"by it; got {', '.join(bound.kwargs)} by keyword only"
        )
    return bound.args[1:]


def _apart(tree: PyTree) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """Return the leaves that a derivative may lead through, and what puts them in again."""
    leaves, structure = jax.tree.flatten(tree)
    traced = [hasattr(leaf, "dtype") or isinstance(leaf, float | complex) for leaf in leaves]

    def whole(given: list[Any]) -> Any:
        remaining = iter(given)
        pairs = zip(leaves, traced, strict=True)
        return structure.unflatten([next(remaining) if there else x for x, there in pairs])

    return whole, [leaf for leaf, there in zip(leaves, traced, strict=True) if there]


def _zero_along(leaf: Any) -> Any:
    """Return the tangent 0 of a leaf of aux."""
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0)

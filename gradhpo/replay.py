"""One operation of a traced program, taken again."""

from __future__ import annotations

from typing import Any


def bind(eqn: Any, inputs: list[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """Return an equation's outputs for other inputs, or with other parameters."""
    made: Any = eqn.primitive.get_bind_params(eqn.params if params is None else params)
    # Up to jax 0.9 a pair (functions, parameters), the parameters alone since.
    subfuns, settings = made if isinstance(made, tuple) else ((), made)
    outputs = eqn.primitive.bind(*subfuns, *inputs, **settings)
    return outputs if eqn.primitive.multiple_results else [outputs]

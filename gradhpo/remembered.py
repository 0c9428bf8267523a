"""What is found out about a pair of losses once, and kept as long as the two functions live."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

Memo: TypeAlias = dict[Any, Any]

_KEPT: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Memo]] = (
    weakref.WeakKeyDictionary()
)


def about(train_loss: Callable[..., Any], val_loss: Callable[..., Any]) -> Memo:
    """Return what is kept about the two losses, or about those that they wrap."""
    train_loss, val_loss = inspect.unwrap(train_loss), inspect.unwrap(val_loss)
    try:
        return _KEPT.setdefault(train_loss, weakref.WeakKeyDictionary()).setdefault(val_loss, {})
    except TypeError:  # no weak references to them: nothing is kept
        return {}

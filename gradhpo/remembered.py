"""What is found out about a pair of losses once, and kept as long as the two functions live."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

Memo: TypeAlias = dict[Any, Any]

_ORIGINAL = "_gradhpo_original"

_KEPT: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, dict[Any, Memo]]] = (
    weakref.WeakKeyDictionary()
)


def about(train_loss: Callable[..., Any], val_loss: Callable[..., Any]) -> Memo:
    """Return what is kept about the two losses, or about those that `stands_for` says."""
    (train, train_part), (val, val_part) = map(_anchor, (train_loss, val_loss))
    try:
        of_train = _KEPT.setdefault(train, weakref.WeakKeyDictionary())
        return of_train.setdefault(val, {}).setdefault((train_part, val_part), {})
    except TypeError:  # no weak references to them: nothing is kept
        return {}


def stands_for(function: Any, loss: Callable[..., Any]) -> Any:
    """Return `function`, noted as the library's own form of a user's loss."""
    setattr(function, _ORIGINAL, loss)
    return function


def original(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the user's loss that a function stands for; any other as it is."""
    while hasattr(loss, _ORIGINAL):
        loss = getattr(loss, _ORIGINAL)
    return loss


def _anchor(loss: Callable[..., Any]) -> tuple[Any, Any]:
    """Return what lives as long as the loss does, and which part of it the loss is."""
    loss = original(loss)
    # A bound method is made anew at every look.
    return (loss.__self__, loss.__func__) if inspect.ismethod(loss) else (loss, None)

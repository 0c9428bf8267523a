"""Packages of trackers, imported when they are used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def require(who: str, module: str, package: str, extra: str = "trackers") -> None:
    """Raise if a package is not installed, without importing it.

    Raises:
      ImportError: saying what to install.
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"{who} needs {package}: pip install {package}, or pip install 'gradhpo[{extra}]'"
        )


def load(module: str) -> Any:
    """Import a module that `require` has seen; most of them do not tell their types."""
    return importlib.import_module(module)

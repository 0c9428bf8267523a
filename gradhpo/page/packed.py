"""Arrays inside JSON: their bytes in base64, which a browser reads as typed arrays."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

KINDS = ("<f4", "<i4", "<u4", "<u2", "|u1")
"""What browsers have arrays of."""


def packed(array: np.ndarray, kind: str = "<f4") -> dict[str, Any]:
    """Return an array as JSON.

    Args:
      array: of any shape.
      kind: how its numbers are written, one of `KINDS`.
    """
    with np.errstate(over="ignore"):  # what is too large for a page's numbers is infinite there
        made = np.ascontiguousarray(array, kind)
    text = base64.b64encode(made.tobytes()).decode()
    return {"kind": kind[1:], "shape": list(made.shape), "bytes": text}


def unpacked(given: Mapping[str, Any]) -> np.ndarray:
    """Return the array that `packed` wrote."""
    (kind,) = [one for one in KINDS if one[1:] == given["kind"]]
    return np.frombuffer(base64.b64decode(given["bytes"]), kind).reshape(given["shape"])

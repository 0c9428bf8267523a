"""Values as JSON that a page can trust: no text that hides or turns others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

IN_SCRIPT = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
"""What could end a script, begin a comment or a line there; JSON has it as an escape too."""


def plain(value: Any) -> Any:
    """Return a value of dictionaries, lists, texts and numbers as JSON has them.

    Numbers that are not finite become null. Of texts, what is not to be printed (controls, marks
    that turn the direction of what follows) is shown as an escape. Anything else is its `str`.
    """
    match value:
        case Mapping():
            return {_shown(str(name)): plain(one) for name, one in value.items()}
        case list() | tuple():
            return [plain(one) for one in value]
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case _:
            return _shown(str(value))


def in_script(value: Any) -> str:
    """Return a plain value as JSON that may stand inside of an element `script`."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character, escape in IN_SCRIPT.items():
        text = text.replace(character, escape)
    return text


def _shown(text: str) -> str:
    if text.isprintable():  # megabytes of base64 are
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )

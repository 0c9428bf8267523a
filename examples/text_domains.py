"""Three real texts that every machine with CPython on Debian has, a manual, and a model of bytes.

Nothing is copied into this repository; all is read from where it lies:

- "python": the modules of CPython's library, `*.py` in its folder (Python Software Foundation
  License, version 2), but for the manual's;
- "reference": the language reference as `pydoc_data.topics` has it (the same license);
- "licences": the licences that Debian's base files have, in /usr/share/common-licenses (each may
  be copied verbatim);
- the manual: what `doctest.py` says of itself in its docstrings (Python Software Foundation
  License, version 2).
"""

from __future__ import annotations

import ast
import functools
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import mixture

LENGTH = 32
"""Bytes that a model predicts in a row."""
BYTES = 128
LICENCES = Path("/usr/share/common-licenses")
MANUAL = "doctest.py"


def library() -> Path:
    """Return the folder of CPython's library."""
    return Path(sysconfig.get_path("stdlib"))


def windows(text: str) -> np.ndarray:
    """Return a text as rows of `LENGTH + 1` bytes, `(n, LENGTH + 1)`."""
    made = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    return made[: len(made) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)


def docstrings(module: Path) -> str:
    """Return what a module says of itself and of what it holds."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes: Any = [n for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, kinds)]
    return "\n\n".join(ast.get_docstring(node) or "" for node in nodes)


@functools.cache
def texts() -> dict[str, np.ndarray]:
    """Return the rows of the three domains, and of the manual's two halves, every other row.

    Raises:
      FileNotFoundError: where a text is missing.
    """
    from pydoc_data.topics import topics

    if not LICENCES.is_dir():
        raise FileNotFoundError(f"{LICENCES} is missing: Debian's package base-files has it")
    modules = sorted(path for path in library().glob("*.py") if path.name != MANUAL)
    licences = sorted(p for p in LICENCES.iterdir() if p.is_file() and not p.is_symlink())
    manual = windows(docstrings(library() / MANUAL))
    parts = {"python": modules, "licences": licences}
    read = {
        n: "\n".join(p.read_text("utf-8", "replace") for p in some) for n, some in parts.items()
    }
    return {
        "python": windows(read["python"]),
        "reference": windows("\n\n".join(topics[name] for name in sorted(topics))),
        "licences": windows(read["licences"]),
        "validation": manual[::2],
        "test": manual[1::2],
    }


def noise(rows: int, seed: int = 0) -> np.ndarray:
    """Return a domain that nothing can be learned from: random bytes."""
    return np.random.default_rng(seed).integers(BYTES, size=(rows, LENGTH + 1), dtype=np.uint8)


def model(width: int = 32) -> tuple[Any, Any]:
    """Return `init` and `loss` of a transformer of one layer, on bytes and hashed pairs of bytes.

    50,176 weights at a width of 32, and 182,272 at 64.
    """
    heads, pairs = width // 16, 32 * width
    shapes = {
        "byte": (BYTES, width),
        "pair": (pairs, width),
        "place": (LENGTH, width),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 2 * width),
        "down": (2 * width, width),
        "head": (width, BYTES),
    }

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(shapes))
        scales: dict[str, float] = dict.fromkeys(("byte", "pair", "place", "head"), 0.1)
        return {
            name: jax.random.normal(k, shape) * (scales.get(name) or shape[0] ** -0.5)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def normed(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)

    def attention(w: Any, x: jax.Array) -> jax.Array:
        split = normed(x) @ w["qkv"]
        split = split.reshape(*x.shape[:2], 3, heads, width // heads)
        q, k, v = (split[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(width / heads)
        scores = jnp.where(jnp.tri(LENGTH, dtype=bool), scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return mixed.reshape(x.shape) @ w["out"]

    def logits(w: Any, x: jax.Array) -> jax.Array:
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
        hidden = w["byte"][x] + w["pair"][(31 * before + 7 * x) % pairs] + w["place"]
        hidden = hidden + attention(w, hidden)
        hidden = hidden + jax.nn.gelu(normed(hidden) @ w["up"]) @ w["down"]
        return normed(hidden) @ w["head"]

    def loss(w: Any, rows: jax.Array) -> jax.Array:
        x = rows.astype(jnp.int32)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels
        return losses(logits(w, x[:, :-1]), x[:, 1:]).mean(-1)

    return init, loss


def text_mixture(width: int = 32, **changes: Any) -> mixture.Mixture:
    """Return the mixture of the three texts for the manual."""
    init, loss = model(width)
    rows = texts()
    settings: dict[str, Any] = {
        "domains": {name: rows[name] for name in ("python", "reference", "licences")},
        "targets": {"manual": rows["validation"]},
        "held_out": {"test": rows["test"]},
        "rows": 24,
        "target_rows": 24,
    }
    return mixture.Mixture(init, loss, **(settings | changes))

"""Rules that say which arrays of a trial are divided over which axes of a mesh (FSDP)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gradhpo.errors import check_count
from gradhpo.parallel.mesh import axis_size

Rules = Callable[[str, Any], P]
"""From a leaf's path, as `jax.tree_util.keystr` writes it, and its shape to what divides it."""

ACCEPTED = (
    'the name of a mesh axis ("data"), {"axis": name, "above": elements}, or a list with an axis '
    "name, a list of names, or None (in TOML an empty text) for each dimension"
)


def fully_sharded(mesh: Mesh, axis: str = "data", above: int = 0) -> Rules:
    """Return rules that divide each array of the state along its largest dimension that divides.

    Args:
      mesh: from `make_mesh`.
      axis: the mesh axis over which they are divided.
      above: arrays of at most so many elements stay whole on every device.
    """
    n = axis_size(mesh, axis)

    def rules(path: str, leaf: Any) -> P:
        del path
        fits = [i for i, size in enumerate(leaf.shape) if size and size % n == 0]
        if not fits or math.prod(leaf.shape) <= above:
            return P()
        largest = max(fits, key=lambda i: leaf.shape[i])
        return P(*[None] * largest, axis)

    return rules


def by_path(mesh: Mesh, rules: Mapping[str, Any]) -> Rules:
    r"""Return rules by regular expressions, of which the first one found in a leaf's path holds.

    `{r"embedding": (None, "model"), r"": {"axis": "data", "above": 4096}}` divides the second
    dimension of all that has "embedding" in its path, the optimizers' moments too, and the largest
    dimension that divides of all other arrays with more elements. A leaf that no expression is
    found in is whole on every device, and so is one of a single element.

    Args:
      mesh: from `make_mesh`.
      rules: by expression a `PartitionSpec`, a list like one, or as `fully_sharded` has it: the
        name of an axis, or a table with `axis` and `above`.

    Raises:
      ValueError: for what is no such rule, or an axis that the mesh does not have. The rules
        themselves raise it for a dimension that does not divide.
    """
    known = check_rules(rules)
    made: list[tuple[re.Pattern[str], Rules]] = []
    for pattern, how in known.items():
        if isinstance(how, list):
            made.append((re.compile(pattern), _explicit(mesh, pattern, how)))
        else:
            table: dict[str, Any] = {"axis": how} if isinstance(how, str) else how
            made.append((re.compile(pattern), fully_sharded(mesh, **table)))

    def rule(path: str, leaf: Any) -> P:
        if math.prod(leaf.shape) <= 1:
            return P()
        found = (of for pattern, of in made if pattern.search(path))
        return next(found, lambda path, leaf: P())(path, leaf)

    return rule


def check_rules(rules: Any) -> dict[str, Any]:
    """Return rules by regular expression as plain texts, numbers, lists and tables.

    Raises:
      ValueError: naming what is none.
    """
    if not isinstance(rules, Mapping) or not rules:
        raise ValueError(f"rules must be a table of regular expressions, got {rules!r}")
    return {_pattern(name): _how(name, how) for name, how in rules.items()}  # pyright: ignore


def axes_of(rules: Mapping[str, Any]) -> set[str]:
    """Return the mesh axes that checked rules name."""
    named: set[str] = set()
    for how in rules.values():
        for entry in how if isinstance(how, list) else [how]:  # pyright: ignore
            one = entry["axis"] if isinstance(entry, dict) else entry  # pyright: ignore
            named |= {one} if isinstance(one, str) else set(one or ())  # pyright: ignore
    return named


def _pattern(pattern: Any) -> str:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"rules: {pattern!r} is no regular expression ({error})") from None
    return pattern


def _how(pattern: str, how: Any) -> Any:
    refused = ValueError(f"rules[{pattern!r}] must be {ACCEPTED}; got {how!r}")
    if isinstance(how, str) and how:
        return how
    if isinstance(how, Mapping):
        table: dict[str, Any] = dict(how)  # pyright: ignore[reportUnknownArgumentType]
        if not isinstance(table.get("axis"), str) or not set(table) <= {"axis", "above"}:
            raise refused
        above = check_count(f"rules[{pattern!r}]['above']", table.get("above", 0), 0)
        return {"axis": table["axis"], "above": above}
    if not isinstance(how, P | list | tuple):
        raise refused
    entries = [_entry(one, refused) for one in how]  # pyright: ignore[reportUnknownVariableType]
    named = [axis for one in entries for axis in ([one] if isinstance(one, str) else one or [])]
    if len(set(named)) < len(named):
        raise ValueError(f"rules[{pattern!r}] divides over an axis twice, got {how!r}")
    return entries


def _entry(one: Any, refused: ValueError) -> str | list[str] | None:
    """Return what divides a dimension: an axis, several, or none."""
    if one is None or isinstance(one, str):
        return one or None
    if isinstance(one, list | tuple) and all(isinstance(axis, str) for axis in one):  # pyright: ignore
        return list(one)  # pyright: ignore[reportUnknownArgumentType]
    raise refused


def _explicit(mesh: Mesh, pattern: str, entries: list[Any]) -> Rules:
    axes = [[one] if isinstance(one, str) else one or [] for one in entries]
    sizes = [math.prod(axis_size(mesh, axis) for axis in each) for each in axes]

    def rules(path: str, leaf: Any) -> P:
        if len(entries) > len(leaf.shape):
            raise ValueError(
                f"rules[{pattern!r}] is for {len(entries)} dimensions; {path} has shape "
                f"{tuple(leaf.shape)}"
            )
        for size, n in zip(leaf.shape, sizes, strict=False):
            if size % n:
                raise ValueError(
                    f"rules[{pattern!r}] divides a dimension of {path} over {n} devices; its shape "
                    f"is {tuple(leaf.shape)}"
                )
        return P(*(tuple(one) if isinstance(one, list) else one for one in entries))

    return rules

"""A value of nested dataclasses and trees as arrays by path beside a JSON text, and back.

Dictionaries, lists and tuples, numbers, texts and bytes describe themselves; of any other tree (an
optimizer's state, a module's parameters) only the leaves are written, by their path, and its
structure is taken from a template. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.state import PyTree, is_key

Spec = Any
"""JSON that says what a value is, and where its arrays are."""


class Packer:
    """Takes values apart.

    `arrays` has what was found, by path; one that stands in several places is there once.

    Args:
      classes: dataclasses that are written field by field.
      templated: fields for which there will be a template.
    """

    def __init__(self, classes: tuple[type, ...], templated: tuple[str, ...]) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._classes, self._templated = classes, templated
        self._known: dict[int, tuple[str, Any]] = {}
        """By identity, where an array is; and the array, so that the identity stays its own."""

    def pack(self, value: Any, path: str = "", field: str = "") -> Spec:
        """Return what the value is.

        Args:
          value: what to write.
          path: where it stands, for the names of arrays.
          field: of which field of a dataclass it is a part: it names the template.
        """
        if isinstance(value, self._classes):
            there: Any = value
            parts = {f.name: getattr(there, f.name) for f in dataclasses.fields(there)}
            made = {n: self.pack(part, f"{path}.{n}", n) for n, part in parts.items()}
            return {type(value).__name__: made}
        return self._one(value, path) if _leaf(value) else self._tree(value, path, field)

    def _one(self, value: Any, path: str) -> Spec:
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        if isinstance(value, bytes):
            self.arrays[path] = np.frombuffer(value, np.uint8)
            return {"bytes": path}
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return self._array(value, path)
        raise TypeError(f"cannot save {path.lstrip('.')}, a {type(value).__name__}")

    def _tree(self, value: Any, path: str, field: str) -> Spec:
        if _plain(value):
            if isinstance(value, dict):
                items = {n: self.pack(x, f"{path}[{n!r}]", field) for n, x in value.items()}
                return {"dict": items}
            items = [self.pack(x, f"{path}[{i}]", field) for i, x in enumerate(value)]
            return {type(value).__name__: items}
        if field not in self._templated:
            accepted = "dictionaries by name, lists and tuples of arrays"
            raise TypeError(f"cannot save {path.lstrip('.')}: it holds more than {accepted}")
        leaves = tree_flatten_with_path(value)[0]
        made = {keystr(p): self._one(leaf, path + keystr(p)) for p, leaf in leaves}
        return {"tree": field, "leaves": made}

    def _array(self, value: Any, path: str) -> Spec:
        if id(value) not in self._known:
            typed = is_key(value)
            self.arrays[path] = np.asarray(jax.random.key_data(value) if typed else value)
            self._known[id(value)] = path, value
        spec = {"array": self._known[id(value)][0], "device": isinstance(value, jax.Array)}
        return spec | ({"key": str(jax.random.key_impl(value))} if is_key(value) else {})


class Unpacker:
    """Puts values together again.

    Args:
      arrays: by path.
      templates: by field, trees of arrays or of their shapes and dtypes.
      shaped: fields whose arrays must also have the shapes and dtypes of their template.
      classes: as for `Packer`.
      source: how an error names what is read.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        templates: Mapping[str, PyTree],
        shaped: tuple[str, ...],
        classes: tuple[type, ...],
        source: str,
    ) -> None:
        self._arrays, self._templates, self._shaped = arrays, templates, shaped
        self._classes = {kind.__name__: kind for kind in classes}
        self._source = source

    def unpack(self, spec: Spec) -> Any:
        """Return the value.

        Raises:
          ValueError: if a tree is not like its template; the leaf is named.
        """
        ((name, parts), *_) = spec.items()
        match name:
            case "value":
                made = parts
            case "bytes":
                made = self._arrays[parts].tobytes()
            case "array":
                made = self._array(spec)
            case "tree":
                made = self._tree(parts, spec["leaves"])
            case "dict":
                made = {name: self.unpack(part) for name, part in parts.items()}
            case "list":
                made = [self.unpack(part) for part in parts]
            case "tuple":
                made = tuple(self.unpack(part) for part in parts)
            case _:
                made = self._instance(name, parts)
        return made

    def _instance(self, name: str, parts: Mapping[str, Spec]) -> Any:
        kind: Any = self._classes.get(name)
        known = [] if kind is None else [field.name for field in dataclasses.fields(kind)]
        unknown = [name] if kind is None else [part for part in parts if part not in known]
        if kind is None or unknown:
            raise ValueError(f"{self._source} was saved by a newer gradhpo: it has {unknown[0]!r}")
        return kind(**{part: self.unpack(spec) for part, spec in parts.items()})

    def _array(self, spec: Spec) -> Any:
        array = self._arrays[spec["array"]]
        if "key" in spec:
            return jax.random.wrap_key_data(jnp.asarray(array), impl=spec["key"])
        if not spec["device"]:
            return array
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise ValueError(f"{self._source} was saved with jax_enable_x64=True, and it is False")
        return jnp.asarray(array)

    def _tree(self, field: str, leaves: Mapping[str, Spec]) -> PyTree:
        other = f"{self._source} is of another problem or optimizer:"
        wanted, structure = tree_flatten_with_path(self._templates[field])
        paths = [keystr(path) for path, _ in wanted]
        if missing := [path for path in paths if path not in leaves]:
            raise ValueError(f"{other} it lacks {field}{missing[0]}")
        if extra := [path for path in leaves if path not in paths]:
            raise ValueError(f"{other} it has {field}{extra[0]}, which is not there now")
        made = [self.unpack(leaves[path]) for path in paths]
        for path, leaf, (_, like) in zip(paths, made, wanted, strict=True):
            if field in self._shaped and _kind(leaf) != _kind(like):
                found = f"{_kind(leaf)}, and should be {_kind(like)}"
                raise ValueError(f"{other} {field}{path} is {found}")
        return structure.unflatten(made)


def _plain(value: Any) -> bool:
    """Whether it is made of nothing but dictionaries by name, lists and tuples, all the way."""
    if type(value) is dict:
        return all(type(n) is str and (_leaf(x) or _plain(x)) for n, x in value.items())
    return type(value) in (list, tuple) and all(_leaf(x) or _plain(x) for x in value)


def _leaf(value: Any) -> bool:
    return value is None or jax.tree_util.all_leaves([value])


def _kind(leaf: Any) -> str:
    return f"{'key' if is_key(leaf) else leaf.dtype}{list(leaf.shape)}"

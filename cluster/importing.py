"""Objects by name, `"package.module:name"` or `"folder/file.py:name"`, the same everywhere."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ACCEPTED = '"package.module:name" or "folder/file.py:name"'


def check_reference(argument: str, reference: str) -> None:
    """Raise unless `reference` has the form of a reference; nothing is imported.

    Raises:
      ValueError: naming the argument.
    """
    module, _, name = reference.rpartition(":")
    plain = module.endswith(".py") or all(part.isidentifier() for part in module.split("."))
    if not module or not plain or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{argument} must be {ACCEPTED}, got {reference!r}")


def named(thing: Any) -> dict[str, str]:
    """Return a reference, or an object, as a manifest names it."""
    if isinstance(thing, str):
        return {"reference": thing}
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return {"object": f"{kind.__module__}.{kind.__qualname__}"}


def reference_of(written: Any) -> Any:
    """Return the reference that `named` wrote; a reference itself, and None, as they are."""
    return written.get("reference") if isinstance(written, Mapping) else written  # pyright: ignore


def findable(reference: str) -> bool:
    """Whether another program can find what has this name."""
    return not reference.startswith("__main__:") and "<" not in reference


def folders() -> tuple[str, ...]:
    """Where references are looked up: the present folder, and that of the program, if it is one."""
    program: Any = sys.modules.get("__main__")
    path: Any = getattr(program, "__file__", "")
    alone = path and getattr(program, "__spec__", None) is None
    own = [str(Path(path).absolute().parent)] if alone else []
    return tuple(dict.fromkeys([str(Path.cwd()), *own]))


def load(reference: str) -> Any:
    """Import and return what a reference names.

    Raises:
      ImportError: if the module cannot be found, or has no such name; what it raises itself goes
        through.
    """
    module_name, _, name = reference.rpartition(":")
    made: Any = _module(module_name)
    for part in name.split("."):
        if not hasattr(made, part):
            raise ImportError(f"{module_name!r} has no {part!r}, named by {reference!r}")
        made = getattr(made, part)
    return made


def extend_path(folders: Iterable[str]) -> None:
    """Let modules be imported from these folders too."""
    sys.path.extend(folder for folder in folders if folder not in sys.path)


def call_with(function: Any, arguments: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """Call a function with those of the arguments that it takes; return also their names."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        taken = set(arguments)
    else:
        keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        taken = {p.name for p in parameters if p.kind in keywords} & set(arguments)
    return function(**{name: arguments[name] for name in taken}), taken


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    # A process of a cluster has another present folder; the program's is on its path.
    folders = [Path.cwd(), *(Path(folder) for folder in sys.path)]
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        raise ImportError(f"there is no file {name!r} in {str(Path.cwd())!r} or on sys.path")
    path = path.resolve()
    # The same name in every process, and none that another file has.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    unique = f"gradhpo_sweep_{path.stem}_{digest}"
    if unique in sys.modules:
        return sys.modules[unique]
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    extend_path([str(path.parent)])
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    return module

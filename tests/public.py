"""What is public, read from the source: modules with `__all__`, the names in it, what is said."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gradhpo"


class Definition(NamedTuple):
    """Where a name is defined, and what is said of it."""

    module: str
    name: str
    node: ast.AST
    docstring: str | None


def path_of(module):
    """Return the file of a module; None where there is no such module."""
    path = ROOT.joinpath(*module.split("."))
    found = [path / "__init__.py", path.with_suffix(".py")]
    return next((file for file in found if file.is_file()), None)


def module_of(path):
    """Return the name of the module in a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def sources():
    """Return the files of the package, below the two links too, but not those that it hands out."""
    folders = (PACKAGE, PACKAGE / "parallel", PACKAGE / "cluster")
    files = {path for folder in folders for path in folder.rglob("*.py")}
    return sorted(path for path in files if path.parent.name not in ("starter", "deploy"))


@functools.cache
def tree_of(module):
    return ast.parse(path_of(module).read_text())


def listed(module):
    """Return what a module lists in `__all__`; None where it lists nothing."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


@functools.cache
def modules():
    """Return the public modules, by what each lists."""
    found = {module: listed(module) for module in map(module_of, sources())}
    return {module: names for module, names in found.items() if names is not None}


def definition(module, name):
    """Return where a module has a name from; None where it does not have it."""
    if (submodule := f"{module}.{name}") and path_of(submodule) is not None:
        tree = tree_of(submodule)
        return Definition(submodule, "", tree, ast.get_docstring(tree))
    body = tree_of(module).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return Definition(module, name, node, ast.get_docstring(node))
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.unparse(target) == name:
                return Definition(module, name, node, _text(after))
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(node.module, alias.name)
    return None


def _text(node):
    """Return a text that stands alone, as it does below what it describes."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return node.value.value
    return None

"""What is public is on the pages of the API, is there, and says what it is."""

import ast
import re

import pytest

from tests.public import PACKAGE, ROOT, definition, modules

API = ROOT / "docs/api"
ON_PAGES = [
    name
    for page in sorted(API.glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]
OUR_SCRIPTS = [*ROOT.glob("examples/**/*.py"), *PACKAGE.glob("cluster/starter/*.py")]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]


def found(name):
    """Return where a dotted name is defined."""
    module, _, last = name.rpartition(".")
    return definition(module, last)


def test_the_front_page_lists_the_public_modules():
    rows = re.findall(r"^\| `(gradhpo[\w.]*)`", (API / "index.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(modules())


@pytest.mark.parametrize("module", modules())
def test_every_public_name_is_there_on_a_page_and_described(module):
    told = {found(name)[:2] for name in ON_PAGES}
    for name in modules()[module]:
        where = definition(module, name)
        assert where is not None, f"{module} has no {name}"
        on_page = where[:2] in told or (where.module in modules() and not where.name)
        assert on_page, f"{module}.{name} is on no page of docs/api"
        first = (where.docstring or "").split("\n")[0]
        assert first.endswith("."), f"{module}.{name}: {first!r}"


@pytest.mark.parametrize("module", modules())
def test_every_method_of_a_public_class_is_described(module):
    for name in modules()[module]:
        node = definition(module, name).node
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                assert ast.get_docstring(part), f"{module}.{name}.{part.name}"


def test_the_pages_have_public_names_alone_each_once():
    assert len(ON_PAGES) == len({found(name)[:2] for name in ON_PAGES}) > 100
    for name in ON_PAGES:
        module, _, last = name.rpartition(".")
        assert last in modules().get(module, ()), f"{name} is not public"


def imported(text):
    """Return what a text imports of gradhpo, as pairs of a module and a name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gradhpo":
            yield from ((node.module, alias.name) for alias in node.names)


def blocks(page):
    """Return the blocks of Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_examples_and_pages_import_public_names_alone():
    texts = [(path, path.read_text()) for path in OUR_SCRIPTS]
    texts += [(page, block) for page in PAGES for block in blocks(page)]
    pairs = [(path, *pair) for path, text in texts for pair in imported(text)]
    assert len(pairs) > 20
    for path, module, name in pairs:
        public = name in modules().get(module, ()) or f"{module}.{name}" in modules()
        assert public, f"{path.name} imports {module}.{name}, which is not public"

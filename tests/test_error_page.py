"""docs/errors.md: every public class of errors is there, and every message is one of the source."""

import ast
import re

from tests.public import ROOT, definition, module_of, modules, sources, tree_of

PAGE = (ROOT / "docs/errors.md").read_text()
ROWS = [
    row.split(" | ")[0].removeprefix("| ")
    for table in PAGE.split("| message | what to do |\n|---|---|\n")[1:]
    for row in table.split("\n\n")[0].splitlines()
]


def template(node):
    """Return a text of the source with … for each value put into it."""
    if isinstance(node, ast.Constant):
        return node.value
    return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def is_text(node):
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def texts():
    """Return every text of the source, but for what only describes."""
    for module in map(module_of, sources()):
        nodes = list(ast.walk(tree_of(module)))
        describing = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        yield from (template(n) for n in nodes if is_text(n) and id(n) not in describing)


def has(line, parts):
    """Whether a line has these parts, one after another."""
    at = 0
    for part in parts:
        if (found := line.find(part, at)) < 0:
            return False
        at = found + len(part)
    return True


def test_every_public_class_of_errors_and_warnings_is_on_the_page():
    nodes = {n: definition(m, n).node for m, names in modules().items() for n in names}
    bases = {n: [ast.unparse(b) for b in c.bases] for n, c in nodes.items() if hasattr(c, "bases")}
    kinds = [n for n, b in bases.items() if any(x.endswith(("Error", "Warning")) for x in b)]
    assert len(kinds) > 8
    for kind in kinds:
        (base,) = bases[kind]
        assert f"| `{kind}`, a `{base}` |" in PAGE, kind


def test_every_row_quotes_a_message_of_the_source():
    """… stands for at most a line of whatever is put in there."""
    assert len(ROWS) > 80
    assert len(set(ROWS)) == len(ROWS)
    lines = {line for text in texts() for line in text.splitlines()}
    for row in ROWS:
        assert re.fullmatch(r"`[^`]+`", row), row
        parts = [part.strip() for part in row.strip("`").split("…")]
        assert any(has(line, parts) for line in lines), row

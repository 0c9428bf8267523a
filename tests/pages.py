"""The pages of the documentation, and the blocks of code in them.

The blocks of a page that are Python run in order, in one namespace. One whose first line is the
name of a file, `# mlp.py`, is written there instead, for those after it to import; so is TOML,
which has to parse. What runs in no test says why, in the line before it:

    <!-- not run: needs a cluster -->
"""

import functools
import re
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = {"README": ROOT / "README.md"} | {
    str(path.relative_to(ROOT / "docs").with_suffix("")): path
    for path in sorted((ROOT / "docs").rglob("*.md"))
}
TRIED = ("python", "toml")
MARK = re.compile(r"\s*<!-- not run: (\S.*\S) -->$")
FENCE = re.compile(r"( *)```(\w*)")


class Block(NamedTuple):
    """A block of code between two fences."""

    language: str
    text: str
    line: int
    """Of its first line in the page."""
    reason: str | None
    """Why it is not run; None for one that is."""

    @property
    def file(self):
        """The file that its first line names."""
        named = re.match(r"# (\w+\.\w+)\n", self.text)
        return named and named[1]


@functools.cache
def text(page):
    return PAGES[page].read_text()


def blocks(page):
    """Return all blocks of a page, in order."""
    lines, found, reason = enumerate(text(page).splitlines(), 1), [], None
    for number, line in lines:
        if fence := FENCE.match(line):
            body = _until_the_fence_ends(lines, fence[1])
            found.append(Block(fence[2], body, number + 1, reason))
        if line.strip():
            reason = (mark := MARK.match(line)) and mark[1]
    return found


def block(page, containing, language="python"):
    """Return the text of the one block of a page that contains something."""
    (one,) = (b.text for b in blocks(page) if b.language == language and containing in b.text)
    return one


def links(page):
    """Return what a page links to in the repository, each a file and a part of it (or "")."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", without_code(page))
    return [(file, part) for file, part in found if not re.match(r"[a-z]+:", file)]


def files(page):
    """Return the files that a page links to, as it writes them."""
    return sorted({file for file, _ in links(page) if file})


def without_code(page):
    return re.sub(r"^ *```.*?^ *```$", "", text(page), flags=re.DOTALL | re.MULTILINE)


def run(page, folder=None):
    """Return what the Python of a page defines; `folder` is for its files, and is where it runs."""
    made = {"__name__": "page"}
    for one in blocks(page):
        if one.reason is None and one.language == "toml":
            tomllib.loads(one.text)
        if one.reason is not None or one.language not in TRIED:
            continue
        if one.file:
            (folder / one.file).write_text(one.text)
        elif one.language == "python":
            code = "\n" * (one.line - 1) + one.text  # so that an error names the page's line
            exec(compile(code, str(PAGES[page]), "exec"), made)
    return made


def forget_modules(folder):
    """Forget what was imported from the files of a page."""
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[name]


def _until_the_fence_ends(lines, indent):
    body = []
    for _, line in lines:
        if line.strip() == "```":
            break
        body.append(line.removeprefix(indent))
    return "\n".join(body) + "\n"

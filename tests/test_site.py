"""The site of docs/ builds without a warning, and loads nothing from elsewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOADS = {"src", "srcset", "data", "poster", "action", "formaction", "xlink:href"}


class Loaded(HTMLParser):
    """Collects the addresses that a browser asks for when it shows a page."""

    def __init__(self):
        super().__init__()
        self.addresses, self.classes = [], set()

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in LOADS or (name == "href" and tag != "a"):  # a link is for a click
                self.addresses.append(value or "")
            elif name == "style":
                self.addresses += urls(value or "")
            elif name == "class":
                self.classes |= set((value or "").split())


def urls(css):
    imported = re.findall(r"@import\s+[\"']([^\"']+)", css)
    return imported + re.findall(r"url\(\s*[\"']?([^\"')]+)", css)


def foreign(address):
    """Whether an address leads to another host: `//host/…` does, as `https://host/…`."""
    return bool(re.match(r"\s*(?:[a-z][a-z0-9+.-]*:)?//", address, re.IGNORECASE))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="mkdocs-material is not installed (the extra docs)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_what_is_foreign():
    page = Loaded()
    page.feed('<link href="//a.b/c.css"><img src="x.svg" style="background: url(http://a.b/c)">')
    assert [foreign(address) for address in page.addresses] == [True, False, True]
    assert urls('@import "https://a.b"; a { b: url( "c.woff" ) }') == ["https://a.b", "c.woff"]


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    found = []
    for path in site.rglob("*.html"):
        page = Loaded()
        page.feed(path.read_text())
        found += [(path.name, address) for address in page.addresses if foreign(address)]
        assert "mermaid" not in page.classes, f"{path.name}: Material would fetch it"
    for path in site.rglob("*.css"):
        found += [(path.name, address) for address in urls(path.read_text()) if foreign(address)]
    assert found == []


@pytest.mark.slow
def test_llms_txt_lists_every_page_once(site):
    text = (site / "llms.txt").read_text()
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): \S", text, re.MULTILINE)
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")} - {"404.html"}
    assert sorted(listed) == sorted(pages)
    whole = (site / "llms-full.txt").read_text()
    assert all(f"\n# {title}\n" in whole for title in ("Start here", "Recipes for `solve`"))

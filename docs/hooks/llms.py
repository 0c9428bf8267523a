"""`llms.txt` beside the site: its pages, a line each; `llms-full.txt`: all their text.

The format is a title, a summary and lists of links, in Markdown, for programs that read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

written: dict[str, Any] = {}
"""The pages of this build by their files, with the Markdown that the other hooks made."""


def on_pre_build(config: Any) -> None:
    """Forget the build before, under `mkdocs serve`."""
    del config
    written.clear()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Keep what a page says."""
    written[page.file.src_uri] = (page, markdown)
    return markdown


def on_post_build(config: Any) -> None:
    """Write both files."""
    head, listed, texts = f"# {config.site_name}\n\n> {config.site_description}\n", [], []
    for section, path in _files(config.nav):
        page, markdown = written[path]
        if f"\n## {section}\n" not in listed:
            listed.append(f"\n## {section}\n")
        listed.append(f"- [{page.title}]({page.url}): {_first_sentence(markdown)}")
        texts.append(markdown)
    site = Path(config.site_dir)
    (site / "llms.txt").write_text("\n".join([head, *listed, ""]), encoding="utf-8")
    (site / "llms-full.txt").write_text("\n\n".join([head, *texts]), encoding="utf-8")


def _files(nav: list[Any], section: str = "First") -> Iterator[tuple[str, str]]:
    """Yield the section and the file of every page of the navigation, in its order."""
    for entry in nav:
        for title, value in entry.items() if isinstance(entry, dict) else [(section, entry)]:
            if isinstance(value, list):
                yield from _files(value, title)
            else:
                yield section, value


def _first_sentence(markdown: str) -> str:
    """Return the first sentence of the first paragraph, without its links and marks."""
    paragraphs = re.split(r"\n\s*\n", re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL))
    words = next((p for p in paragraphs if re.match(r"\s*[^\W\d_]", p)), "")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(words.split()))
    return re.split(r"(?<=[.])\s", plain)[0]

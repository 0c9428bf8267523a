"""Pages of the site that live elsewhere in the repository: measurements, and the changelog."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
OUTSIDE = {"changelog.md": ROOT / "CHANGELOG.md"} | {
    f"benchmarks/{path.name}": path for path in sorted((ROOT / "benchmarks").glob("*.md"))
}


def on_files(files: Files, config: Any) -> Files:
    """Add them to the site's files."""
    for place, path in OUTSIDE.items():
        files.append(File.generated(config, place, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between docs/ and these pages, right in a checkout, into links of the site."""
    here = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri in OUTSIDE:
        up = "../docs/" if here else "docs/"
        return markdown.replace(f"]({up}", f"]({posixpath.relpath('.', here or '.')}/")
    up, place = posixpath.relpath("..", here), posixpath.relpath("benchmarks", here)
    return markdown.replace(f"]({up}/benchmarks/", f"]({place}/")

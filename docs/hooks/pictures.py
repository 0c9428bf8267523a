"""SVG pictures, put into the page itself: so they take the site's colours, light or dark."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent
IMAGE = re.compile(r'<img alt="(?P<alt>[^"]*)" src="(?P<src>[^"]*pictures/[\w-]+\.svg)" ?/?>')
OWN_COLOURS = re.compile(r"<style>.*?</style>\s*", re.DOTALL)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Put each picture that is drawn by hand where the page shows it."""

    def picture(found: re.Match[str]) -> str:
        path = DOCS / "pictures" / posixpath.basename(found["src"])
        drawn = path.read_text(encoding="utf-8") if path.exists() else ""
        if 'class="picture"' not in drawn:
            return found[0]
        return OWN_COLOURS.sub("", drawn).replace(
            'class="picture"', f'class="picture" role="img" aria-label="{found["alt"]}"'
        )

    return IMAGE.sub(picture, html)

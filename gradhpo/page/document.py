"""The page as one text: nothing in it is fetched from anywhere."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradhpo.page.plain import in_script

HERE = Path(__file__).parent
SCRIPTS = (
    "arrays", "elements", "numbers", "theme", "charts", "cloud", "rows", "cards", "trial",
    "metrics", "trajectories", "descent", "coordinates", "importance", "front", "time", "settings",
    "diagnosis", "steps", "sections", "live",
)  # fmt: skip
"""In this order, one script: each file is one idea, and uses those before it."""


def document(data: Mapping[str, Any], *, live: bool = False) -> str:
    """Return the page.

    Args:
      data: what it shows, plain, see `plain`.
      live: whether it asks its server for what is new.

    Raises:
      ImportError: if plotly, whose script draws, is not installed.
    """
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    policy += "img-src data: blob:; base-uri 'none'; form-action 'none'; "
    policy += "connect-src 'self'" if live else "connect-src 'none'"
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(str(data["title"])),
        "STYLE": (HERE / "page.css").read_text(encoding="utf-8"),
        "PLOTLY": plotly(),
        "LIVE": "true" if live else "false",
        "DATA": in_script(data),
        "SCRIPT": script(),
    }
    # Each is put in once, from the left: what a part says is not looked at again.
    made, left = [], (HERE / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        before, _, left = left.partition(f"[[{name}]]")
        made += [before, text]
    return "".join([*made, left])


def script() -> str:
    """Return the page's own script."""
    texts = [(HERE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join(texts) + "\nbegin();\n})();\n"


def plotly() -> str:
    """Return the script of plotly.js, which the Python package carries.

    Raises:
      ImportError: if it is not installed.
    """
    found = importlib.util.find_spec("plotly")
    if found is None or not found.submodule_search_locations:
        raise ImportError("a report needs plotly: pip install 'gradhpo[report]'")
    path = Path(next(iter(found.submodule_search_locations))) / "package_data" / "plotly.min.js"
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")

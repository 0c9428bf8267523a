"""The page that shows a sweep or a run: one file of HTML with its data, style and script."""

from gradhpo.page.document import document
from gradhpo.page.packed import packed, unpacked
from gradhpo.page.plain import plain

__all__ = ["document", "packed", "plain", "unpacked"]

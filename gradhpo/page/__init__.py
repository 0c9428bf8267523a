"""The page that shows a sweep or a run: one file of HTML with its data, style and script."""

from gradhpo.page.document import document as document
from gradhpo.page.packed import packed as packed
from gradhpo.page.packed import unpacked as unpacked
from gradhpo.page.plain import plain as plain

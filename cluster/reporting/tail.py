"""The lines that are added to a text of a storage: each is read once."""

from __future__ import annotations

from gradhpo.cluster.storage import Text


class Tail:
    """Reads a text from where it was read to.

    Args:
      text: that others add lines to, or replace.
    """

    def __init__(self, text: Text) -> None:
        self._text, self._end, self._last = text, 0, b""

    def lines(self) -> tuple[bool, list[bytes]]:
        """Return whether this begins anew, as the text was replaced, and the whole lines since.

        The last line that is known is read again: if it is no longer there, it is another text.
        """
        found = self._since(self._end - len(self._last))
        again = not found.startswith(self._last)
        if again:
            self._end, self._last = 0, b""
            found = self._since(0)
        new = found[len(self._last) :]
        new = new[: new.rfind(b"\n") + 1]
        lines = [line for line in new.split(b"\n") if line]
        if new:
            self._end += len(new)
            self._last = new.rstrip(b"\n").rpartition(b"\n")[2] + b"\n" if lines else b""
        return again, lines

    def _since(self, start: int) -> bytes:
        try:
            return self._text.since(start)
        except FileNotFoundError:
            return b""

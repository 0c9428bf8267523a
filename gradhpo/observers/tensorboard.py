"""TensorBoard's event files."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradhpo.observers.events import Begun, Progress
from gradhpo.observers.packages import load, require
from gradhpo.observers.tracker import Tracker


class TensorBoard(Tracker):
    """Writes scalars into a folder that `tensorboard --logdir` shows; goes on with the run.

    Args:
      folder: of this run alone.

    Raises:
      ImportError: without tensorboardX.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        require("TensorBoard", "tensorboardX", "tensorboardX")
        self.folder = Path(folder)
        self._writer: Any = None
        self._axis = ""

    def __str__(self) -> str:
        return f"TensorBoard({str(self.folder)!r})"

    def open(self, begun: Begun) -> int:
        """Find the last number there; TensorBoard leaves out what is after it."""
        self._axis = begun.axis
        last = _last(self.folder, begun.axis)
        self.check_own(begun, last)
        done, files = min(last, self.most), len(_files(self.folder))
        more: dict[str, Any] = {"purge_step": done + 1} if last else {}
        more["filename_suffix"] = f".{files}"  # files of one second are named alike otherwise
        self._writer = load("tensorboardX").SummaryWriter(str(self.folder), **more)
        return done

    def write(self, event: Progress, after: int) -> None:
        """Write the scalars; the number itself comes last, and says that they are there."""
        for number, values in event.points(after):
            for name, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, number)
            self._writer.add_scalar(self._axis, number, number)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


def _last(folder: Path, tag: str) -> int:
    """Return the last number of a tag in a folder's event files, as TensorBoard reads them."""
    last = 0
    for event in (event for path in _files(folder) for event in _events(path)):
        if event.session_log.status == event.session_log.START:
            last = min(last, event.step - 1)
        elif any(value.tag == tag for value in event.summary.value):
            last = max(last, event.step)
    return last


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*tfevents*"))


def _events(path: Path) -> Iterator[Any]:
    """Read an event file, a length, a checksum of it, an event and a checksum each."""
    kind = load("tensorboardX.proto.event_pb2").Event
    with open(path, "rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            body = file.read(length + 4)
            if len(body) < length + 4:  # its writer was killed
                return
            yield kind.FromString(body[:length])

"""A page for what a folder holds: written to a file, or served while it grows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.reporting.sweep_data import SweepData, is_sweep
from gradhpo.cluster.settings import folder_of
from gradhpo.commit import commit
from gradhpo.files import Where
from gradhpo.page import document
from gradhpo.run_page import RunData, is_run

if TYPE_CHECKING:
    from gradhpo.page.server import PageServer


class Data(Protocol):
    """What a page shows."""

    def whole(self) -> dict[str, Any]:
        """Return all of it."""
        ...

    def since(self, after: int, epoch: int, /) -> dict[str, Any]:
        """Return what is new to a page that has so much of an epoch."""
        ...


def write_report(storage: Where, file: str | os.PathLike[str]) -> Path:
    """Write the report of a sweep, finished or running, or of a single run, as one file of HTML.

    It holds all that it shows, Plotly's script too, and asks for nothing from anywhere.

    Args:
      storage: the sweep's folder or address, or what `solve` was given as `checkpoint`.
      file: of HTML; one of that name is replaced.

    Returns:
      The file.

    Raises:
      ImportError: if plotly is not installed.
      SweepError: if there is neither a sweep nor a run, or it is damaged.
      DamagedFile: if no checkpoint of a run is whole.
      OSError: if the file cannot be written.
    """
    page = document(data_of(storage).whole()).encode()
    path = Path(file)

    def content(opened: BinaryIO) -> None:
        opened.write(page)

    return commit(path, content)


def report_server(storage: Where, port: int = 0) -> PageServer:
    """Return a server of the report, and of what is new as it comes; a context, in which it serves.

    Args:
      storage: as for `write_report`.
      port: of this machine's loopback; 0 for a free one.

    Raises:
      As `write_report`; OSError also if the port cannot be had.
    """
    from gradhpo.page.server import PageServer  # nothing else needs one

    data = data_of(storage)
    return PageServer(document(data.since(0, 0), live=True), data.since, port)


def data_of(storage: Where) -> Data:
    """Return what a page shows of a folder.

    Raises:
      SweepError: if there is neither a sweep nor a run.
    """
    where = folder_of(storage)
    if is_sweep(where):
        return SweepData(where)
    if is_run(where):
        return RunData(where)
    raise SweepError(
        f"there is nothing to report in {str(where)!r}: no manifest.json of a sweep, and no "
        "checkpoint of a run of solve(checkpoint=…)"
    )

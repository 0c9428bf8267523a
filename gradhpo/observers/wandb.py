"""Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from gradhpo.observers.events import Begun, Progress
from gradhpo.observers.packages import load, require
from gradhpo.observers.tracker import ENDED, Tracker


class WandB(Tracker):
    """Logs to a run of Weights & Biases, and goes on with that run when this one does.

    How far it is stands in a file `gradhpo-ID.json` in the folder of W&B's own files; without it,
    on another machine, all is logged again, and W&B leaves out the steps that it has.

    Args:
      project: of W&B.
      folder: for W&B's files, and that one.
      **settings: more of `wandb.init`: `name`, `entity`, `mode="offline"`, `id`, …

    Raises:
      ImportError: without wandb.
    """

    rewrites = False  # W&B leaves out what is logged at a step before its last one

    def __init__(self, project: str, folder: str | os.PathLike[str] = ".", **settings: Any) -> None:
        super().__init__()
        require("WandB", "wandb", "wandb")
        self.project, self.folder, self._settings = project, Path(folder), settings
        self._run: Any = None
        self._axis = ""

    def __str__(self) -> str:
        return f"WandB({self.project!r})"

    def open(self, begun: Begun) -> int:
        """Begin W&B's run, or go on with it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._axis = begun.axis
        chosen = {"id": begun.run, "config": dict(begun.settings)} | self._settings
        if chosen["id"] is None:
            del chosen["id"]
        about = {"project": self.project, "dir": str(self.folder), "resume": "allow"}
        self._run = load("wandb").init(**about | chosen)
        if begun.run is None:
            return 0
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads(self._where().read_text()))
        return 0

    def write(self, event: Progress, after: int) -> None:
        """Log each number's values at its own step, and then write down that they are."""
        for number, values in event.points(after):
            self._run.log({**values, self._axis: number}, step=number)
        path = self._where()
        path.with_suffix(".tmp").write_text(str(event.last))
        os.replace(path.with_suffix(".tmp"), path)

    def ended(self, why: str) -> None:
        """Have it in the run's summary."""
        self._run.summary[ENDED] = why

    def close(self) -> None:
        """End the process's part of W&B's run."""
        self._run.finish()

    def _where(self) -> Path:
        return self.folder / f"gradhpo-{self._run.id}.json"

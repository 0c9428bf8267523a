"""MLflow."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from gradhpo.observers.events import Begun, Progress
from gradhpo.observers.packages import load, require
from gradhpo.observers.tracker import ENDED, Tracker

MOST_METRICS = 1000
"""What MLflow takes in one batch."""
LONGEST = 6000
"""Characters of a parameter or a tag."""
RUN = "gradhpo.run"
"""The tag that says which run it is."""


class MLflow(Tracker):
    """Logs to a run of MLflow, and goes on with that run when this one does.

    Args:
      experiment: its name; made where it is missing.
      uri: of the tracking store, such as `sqlite:///mlflow.db`; by default MLflow's own choice.
      name: of the run.

    Raises:
      ImportError: without mlflow.
    """

    def __init__(self, experiment: str, uri: str | None = None, name: str | None = None) -> None:
        super().__init__()
        require("MLflow", "mlflow", "mlflow-skinny")
        self.experiment, self.uri, self.name = experiment, uri, name
        self._client: Any = None
        self._run, self._axis = "", ""

    def __str__(self) -> str:
        return f"MLflow({self.experiment!r})"

    def open(self, begun: Begun) -> int:
        """Find the run by its tag and how far it is, or make it."""
        self._axis = begun.axis
        self._client = load("mlflow").MlflowClient(tracking_uri=self.uri)
        found = self._client.get_experiment_by_name(self.experiment)
        where = found.experiment_id if found else self._client.create_experiment(self.experiment)
        if begun.run is not None:
            wanted = f"tags.`{RUN}` = '{begun.run}'"
            for run in self._client.search_runs([where], wanted, max_results=1):
                self._run = run.info.run_id
                self._client.update_run(self._run, status="RUNNING")
                steps = self._client.get_metric_history(self._run, begun.axis)
                return min(max((metric.step for metric in steps), default=0), self.most)
        tags = {} if begun.run is None else {RUN: begun.run}
        self._run = self._client.create_run(where, tags=tags, run_name=self.name).info.run_id
        self._describe(begun.settings)
        return 0

    def write(self, event: Progress, after: int) -> None:
        """Log the values; the number itself comes last, and says that they are there."""
        metric, now = load("mlflow.entities").Metric, int(time.time() * 1000)
        batch: list[Any] = []
        for number, values in event.points(after):
            drawn = {name: x for name, x in values.items() if math.isfinite(x)}
            drawn[self._axis] = number
            batch += [metric(_named(name), x, now, number) for name, x in drawn.items()]
        for start in range(0, len(batch), MOST_METRICS):
            self._client.log_batch(self._run, metrics=batch[start : start + MOST_METRICS])

    def ended(self, why: str) -> None:
        """Have it as a tag."""
        self._client.set_tag(self._run, f"gradhpo.{ENDED}", why[:LONGEST])

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run)

    def _describe(self, settings: Mapping[str, Any]) -> None:
        kind = load("mlflow.entities").Param
        params = [kind(name, str(value)[:LONGEST]) for name, value in settings.items()]
        self._client.log_batch(self._run, params=params)


def _named(name: str) -> str:
    """Return a name with nothing in it that MLflow refuses: it takes letters, digits and -_./ ."""
    return "".join(c if c.isalnum() or c in "-_./ :" else "_" for c in name)

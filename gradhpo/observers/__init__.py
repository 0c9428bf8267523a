"""Who watches a run or a sweep: trackers of experiments, and observers of one's own."""

from gradhpo.observers.csv_file import CSV
from gradhpo.observers.events import (
    Begun,
    Event,
    GoneBack,
    ObserverFailed,
    Over,
    Progress,
    StepsDone,
    Stopped,
)
from gradhpo.observers.json_lines import JSONLines
from gradhpo.observers.mlflow import MLflow
from gradhpo.observers.telling import Observer
from gradhpo.observers.tensorboard import TensorBoard
from gradhpo.observers.tracker import OtherRunError, Tracker
from gradhpo.observers.wandb import WandB

__all__ = [
    "CSV",
    "Begun",
    "Event",
    "GoneBack",
    "JSONLines",
    "MLflow",
    "Observer",
    "ObserverFailed",
    "OtherRunError",
    "Over",
    "Progress",
    "StepsDone",
    "Stopped",
    "TensorBoard",
    "Tracker",
    "WandB",
]

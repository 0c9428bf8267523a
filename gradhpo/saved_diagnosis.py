"""A `Diagnosis` as JSON in the folder of a sweep or a run, where its report finds it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from gradhpo import checkpoints
from gradhpo.diagnosis import ALIGNED, COLUMNS, Diagnosis, Row
from gradhpo.files import Files, files_of, where_of
from gradhpo.regime import Regime

DIAGNOSIS = "diagnosis.json"
PROBE = ".probe-diagnosis"


def write(folder: Any, diagnosis: Diagnosis) -> None:
    """Write it; see `Diagnosis.save`."""
    files = files_of(where_of("folder", folder))
    files.probe(PROBE)
    rows = [_numbers(row) for row in (*diagnosis.rows, diagnosis.exact)]
    about: dict[str, Any] = {
        "horizon": diagnosis.horizon,
        "seconds": diagnosis.seconds,
        "rows": rows,
    }
    about |= {"notes": list(diagnosis.notes)}
    if diagnosis.regime is not None:
        about["regime"] = _numbers(diagnosis.regime)
    checkpoints.write_json(files, DIAGNOSIS, about)


def read(folder: Any) -> Diagnosis:
    """Return it; see `Diagnosis.load`."""
    files = files_of(where_of("folder", folder))
    text = files.read(DIAGNOSIS)
    try:
        return _read(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{files.address}/{DIAGNOSIS} is damaged: {error}") from None


def shown(files: Files) -> dict[str, Any] | None:
    """Return what a page shows of the diagnosis in a folder; None where there is none."""
    try:
        found = _read(json.loads(files.read(DIAGNOSIS)))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        return {"error": f"{DIAGNOSIS} is damaged: {error}"}
    rows = (*found.rows, found.exact)
    return {
        "columns": list(COLUMNS),
        "rows": [row.cells() for row in rows],
        "recommended": found.recommended.name,
        "recommendation": found.recommendation,
        "horizon": found.horizon,
        "aligned": ALIGNED,
        "notes": [*found.notes, *found.advice()],
        "points": [
            {"name": r.name, "cosine": float(np.mean(r.cosine)), "cost": r.cost} for r in rows
        ],
    }


def _numbers(row: Row | Regime) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in dataclasses.asdict(row).items()
    }


def _array(value: Any) -> Any:
    return np.asarray(value, float) if isinstance(value, list) else value


def _read(about: dict[str, Any]) -> Diagnosis:
    rows = [Row(**{n: _array(x) for n, x in row.items()}) for row in about["rows"]]
    told = (about["horizon"], about["seconds"], tuple(about["notes"]))
    kept: dict[str, Any] | None = about.get("regime")
    regime = Regime(**{name: _array(x) for name, x in kept.items()}) if kept else None
    return Diagnosis(rows[:-1], rows[-1], *told, regime)

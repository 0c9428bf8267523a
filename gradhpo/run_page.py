"""All that a page shows of a run of `solve` with `checkpoint=`, by its newest checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo import checkpoints, saved_diagnosis
from gradhpo._version import __version__
from gradhpo.checkpoints import DamagedFile
from gradhpo.files import Where, files_of
from gradhpo.page import packed, plain
from gradhpo.page.leaves import leaves_of
from gradhpo.page.thinning import thinned, thinned_at
from gradhpo.run_folder import saved_in
from gradhpo.solution import Solution

POINTS = 2000
"""Of a line, at most: more are thinned, the least and the greatest of several stay."""
LINES = 32
"""Of a metric of many runs, or an array of λ: the first ones."""


class RunData:
    """What a page shows of a run, as JSON; a checkpoint is read once.

    Args:
      folder: what `solve` was given as `checkpoint`.

    Raises:
      DamagedFile: if there is no whole checkpoint.
    """

    def __init__(self, folder: Where) -> None:
        self._files, self._read = files_of(folder), ""
        self._epoch, self._shown = 0, dict[str, Any]()
        self._look()

    def whole(self) -> dict[str, Any]:
        """Return all of it."""
        self._look()
        address = self._files.address
        now = {
            "title": address.rstrip("/").rsplit("/", 1)[-1],
            "where": address,
            "made": time.time(),
            "version": __version__,
            "epoch": self._epoch,
            "running": self._files.holder(),
            "diagnosis": saved_diagnosis.shown(self._files),
        }
        return plain({"kind": "run", **now, **self._shown})

    def since(self, steps: int, epoch: int) -> dict[str, Any]:
        """Return all of it: a checkpoint is whole, and seldom."""
        del steps, epoch
        return self.whole()

    def _look(self) -> None:
        told: list[str] = []
        for name in saved_in(self._files):
            if name == self._read:
                return
            try:
                arrays, about = checkpoints.load_named(self._files, name)
            except DamagedFile as error:
                told.append(str(error))
                continue
            self._read, self._epoch = name, self._epoch + 1
            self._shown = _shown(arrays, about) | {"checkpoint": name, "damaged": told}
            return
        reason = f"has no whole checkpoint ({'; '.join(told)})" if told else "has no checkpoint"
        raise DamagedFile(self._files.address, reason)


def is_run(folder: Where) -> bool:
    """Whether there are checkpoints of a single run."""
    return bool(saved_in(files_of(folder)))


def _shown(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> dict[str, Any]:
    spec = about["solution"][Solution.__name__]
    read: dict[str, Any] = {name: _value(part, arrays) for name, part in spec.items()}
    runs, steps = tuple(about["runs"]), int(read["steps"])
    record = _record(read["record"], read.get("record_start") or {})
    evals = {n: x for n, x in _flat("", read["evals"]).items() if len(x) == len(read["eval_steps"])}
    return {
        "done": steps,
        "runs": runs[0] if runs else None,
        "stopped": read.get("stopped"),
        "diverged": np.ravel(read["diverged_at"]),
        "lines": {n: _line(x, np.arange(1, len(x) + 1)) for n, x in read["metrics"].items()},
        "evals": {n: _line(x, np.asarray(read["eval_steps"])) for n, x in evals.items()},
        "record": {n: _line(x, np.arange(len(x))) for n, x in record.items()},
        "best": _best(read.get("best")),
        "leaves": leaves_of(arrays, ".state.hyperparams"),
        "settings": [[n, str(x)] for n, x in _settings(about["kind"], read).items()],
    }


def _record(rows: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """Return λ before each step, and after the last."""
    return {n: np.concatenate([np.asarray(x)[None], rows[n]]) for n, x in start.items()}


def _line(values: np.ndarray, at: np.ndarray) -> dict[str, Any]:
    """Return lines over steps, those of a trailing axis side by side."""
    rows = np.asarray(values, float).reshape(len(values), -1)
    more = max(0, rows.shape[1] - LINES)
    rows = rows[:, :LINES]
    each = -(-2 * len(rows) // POINTS)
    if each > 2:
        at, rows = at[thinned_at(len(rows), each)], thinned(rows, each)
    return {"at": packed(at, "<u4"), "rows": packed(rows), "more": more}


def _best(best: Any) -> dict[str, Any] | None:
    if best is None:
        return None
    return {name: best[name] for name in ("score", "step", "metric", "mode")}


def _settings(kind: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    known = read.get("fingerprint") or {}
    said = {name: known[name] for name in ("optimizer", "versions") if name in known}
    return {name: x for name, x in {**said, **kind}.items() if x is not None}


def _flat(name: str, value: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a tree by their names."""
    if isinstance(value, np.ndarray):
        return {name: value}
    made: dict[str, np.ndarray] = {}
    if isinstance(value, Mapping):
        for key, one in value.items():
            made |= _flat(f"{name}.{key}" if name else str(key), one)
    return made


def _value(spec: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return what `saved.Packer` wrote, with dictionaries in place of classes and other trees."""
    ((name, parts), *_) = spec.items()
    match name:
        case "value":
            return parts
        case "bytes" | "array":
            return arrays[parts]
        case "tree":
            return {n: _value(one, arrays) for n, one in spec["leaves"].items()}
        case "list" | "tuple":
            return {str(i): _value(one, arrays) for i, one in enumerate(parts)}
        case _:
            return {n: _value(one, arrays) for n, one in parts.items()}

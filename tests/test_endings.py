"""What ends a run of `solve` or `run` early is told to its observers, and in the solution."""

import dataclasses
import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from gradhpo import Problem, Stop, run_folder, solve, stop_request
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.stopping import Stopping
from gradhpo.cluster.storage import Storage
from gradhpo.files import Unreachable, files_of
from gradhpo.folder import Folder
from gradhpo.observers import Over, Stopped
from gradhpo.solution import Best, packed
from gradhpo.watch import Watch
from tests.small import BATCH, build, start, train_loss, val_loss
from tests.test_events import Kept
from tests.test_stopping import command

KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, 2)
OPTIMIZER = build("one-step", outer=True)[0]


def far(w, lam):
    return {"far": jnp.abs(lam["decay"] + 2.6)}


PROBLEM = Problem(start, train_loss, val_loss, lambda key: (BATCH, BATCH), metrics=far)


def run(steps=12, key=KEY, problem=PROBLEM, **settings):
    """Solve; return the solution, and what was told of its end."""
    kept = Kept()
    settings = {"eval_every": 2, "metric": "far"} | settings
    found = solve(problem, OPTIMIZER, steps, key, progress=False, observers=[kept], **settings)
    assert isinstance(kept.told[-1], Over)
    return found, [event for event in kept.told if isinstance(event, Stopped)]


# --- the conditions, without a run --------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "why"),
    [
        (Stop(target=2.0), "the target is reached: far is 1.5, target=2"),
        (Stop(target=1.0), None),
        (Stop(patience=3), "3 evaluations without a best so far, patience=3"),
        (Stop(patience=4), None),
        (Stop(seconds=9), "seconds=9 are over"),
        (Stop(seconds=11), None),
        (None, None),
    ],
)
def test_which_condition_holds(stop, why):
    best = Best(None, np.float32(1.5), np.asarray(4))
    watch = Watch("far", "min", stop, every=2)
    assert watch.why(10, best, np.asarray(True), elapsed=10) == why


def test_a_batch_ends_when_each_of_its_runs_would():
    best = Best(None, np.array([0.1, 3.0, 2.0]), np.array([10, 2, 4]))
    watch = Watch("far", "max", Stop(target=2.5, patience=3), every=2)
    assert watch.why(10, best, np.array([True, True, True]), elapsed=0) is None
    assert watch.why(10, best, np.array([False, True, True]), elapsed=0) == (
        "the target is reached: far is 3, target=2.5; "
        "3 evaluations without a best so far, patience=3"
    )
    assert watch.why(10, best, np.array([False, False, False]), elapsed=0) is None


def test_a_sweep_whose_storage_does_not_say_goes_on_and_tells(tmp_path, monkeypatch):
    kept = Kept()
    stopping = Stopping(Storage(tmp_path), None, Objectives({"val_loss": 1}), 0.0, kept.observe)

    def silent(self, name):
        raise Unreachable(5, "no answer", name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "whole", silent)
        stopping.ask(1, None)
    assert stopping.reason is None
    (note,) = kept.told
    assert "asks for the end cannot be seen: [Errno 5] no answer" in note.line()
    (tmp_path / stop_request.STOP).write_text("somebody\n")
    stopping.ask(2, None)
    assert (stopping.reason, stopping.expected) == ("somebody", False)


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason", "expected"),
    [
        ({"stop": Stop(target=0.3)}, "the target is reached: far is 0.", True),
        ({"stop": Stop(seconds=1e-6)}, "seconds=1e-06 are over", True),
        ({"callback": lambda *about: True}, "the callback returned True", False),
        ({"callback": lambda *about: os.kill(os.getpid(), signal.SIGINT)}, "SIGINT", False),
    ],
    ids=["target", "seconds", "callback", "signal"],
)
@pytest.mark.filterwarnings("ignore:SIGINT")
def test_what_ended_it_is_told_and_kept(tmp_path, settings, reason, expected):
    found, (told,) = run(**settings)
    assert found.stopped == told.reason
    assert found.stopped.startswith(reason)
    assert (told.axis, told.done, told.left) == ("step", found.steps, 12 - found.steps)
    assert 0 < found.steps < 12
    assert told.expected == expected
    assert "call solve again with resume=solution" in told.line()
    found.save(tmp_path / "part")
    again = gradhpo.Solution.load(tmp_path / "part", PROBLEM, OPTIMIZER)
    assert again.stopped == found.stopped
    whole, nothing = run(resume=again)
    assert nothing == []
    assert whole.stopped is None
    assert "stopped" not in packed(whole)[1]["solution"]["Solution"]  # as older versions read it


def test_a_condition_that_holds_at_the_last_step_ends_nothing():
    found, told = run(4, stop=Stop(patience=1, target=0.0), eval_every=4)
    assert (found.stopped, told) == (None, [])
    found, told = run(4, callback=lambda steps, state: steps == 4)
    assert (found.stopped, told) == (None, [])


def test_a_request_ends_a_run_in_a_folder_and_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOOK", 0.0)
    files_of(tmp_path).replace(stop_request.STOP, b"left by somebody before")
    said = []

    def ask(steps, state):
        if steps == 4:
            said.append(command("stop", tmp_path))

    with pytest.warns(RuntimeWarning, match="gradhpo stop on .*: stopped after step 4 of 12"):
        found, (told,) = run(callback=ask, checkpoint=tmp_path)
    assert said[0][1] == 0, said
    assert found.steps == 4
    assert found.stopped.startswith("gradhpo stop on ")
    assert f"again with checkpoint='{tmp_path}'" in told.how
    whole, nothing = run(checkpoint=tmp_path)
    assert (whole.steps, whole.stopped, nothing) == (12, None, [])
    assert command("stop", tmp_path)[1] == 1


def test_a_store_that_does_not_say_whether_it_is_asked_is_told_of(tmp_path, monkeypatch):
    def silent(self, name):
        raise Unreachable(5, "no answer", name)

    monkeypatch.setattr(Folder, "whole", silent)
    with pytest.warns(RuntimeWarning, match="asks for the end cannot be seen: .*no answer"):
        found, _ = run(4, checkpoint=tmp_path)
    assert found.steps == 4


def test_what_its_callback_ended_stays_ended_until_there_is_none(tmp_path):
    settings = {"checkpoint": tmp_path, "callback": lambda steps, state: steps == 4}
    for _ in range(3):
        found, (told,) = run(**settings)
        assert (found.steps, found.stopped) == (4, "the callback returned True")
    assert told.left == 8
    assert run(checkpoint=tmp_path)[0].steps == 12


@pytest.mark.slow
@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one", "batch"])
def test_a_divergence_and_the_end_of_the_data_are_told_too(key):
    def loss(w, lam, batch):
        return train_loss(w, lam, batch) + jnp.where(lam["decay"] < -2.85, 0, jnp.nan)

    diverging = dataclasses.replace(PROBLEM, train_loss=loss)
    with pytest.warns(gradhpo.DivergenceWarning):
        found, (told,) = run(40, key, diverging)
    last = int(np.max(found.diverged_at))
    assert f"stopped being finite at step {last}" in found.stopped
    assert told.done == last - 1
    again, (told,) = run(40, key, diverging, resume=found) if key is KEYS else (found, [told])
    assert again.stopped == told.reason
    short = dataclasses.replace(PROBLEM, batch=None, batches=[(BATCH, BATCH)] * 5)
    with pytest.warns(RuntimeWarning, match="batches ended: 5 of 9 steps were taken"):
        found, (told,) = run(9, key, short)
    assert found.stopped == told.reason == "Problem.batches ended"


def test_a_run_of_episodes_tells_of_its_divergence():
    kept, poisoned = Kept(), (np.full_like(BATCH[0], np.nan), BATCH[1])
    supply = itertools.chain(itertools.repeat(BATCH, 4), itertools.repeat(poisoned))
    optimizer = build("one-step", outer=True)[0]
    with pytest.warns(gradhpo.DivergenceWarning, match="of episode 2: the run ends, and the state"):
        optimizer.run(
            optimizer.init(*start()), 5, 4, lambda: next(supply), lambda: BATCH, train_loss,
            val_loss, observers=[kept], progress=False,
        )  # fmt: skip
    (told,) = [event for event in kept.told if isinstance(event, Stopped)]
    assert (told.axis, told.done, told.left) == ("episode", 2, 3)
    assert told.reason == "train_loss stopped being finite at step 1 of episode 2"
    assert kept.told[-1] == Over()


def test_an_error_is_told_as_what_it_is():
    def fails(steps, state):
        raise RuntimeError("no more")

    kept = Kept()
    with pytest.raises(RuntimeError, match="no more"):
        solve(PROBLEM, OPTIMIZER, 4, KEY, callback=fails, observers=[kept], progress=False)
    assert kept.told[-1] == Over("RuntimeError: no more")

"""What happens in a sweep is told to observers, in order, as typed events."""

import json

import numpy as np
import pytest

from gradhpo.cluster import event_log, events
from gradhpo.cluster.display import Display
from gradhpo.cluster.objectives import Objectives
from tests import file_operations, pages
from tests.sweeps import sweep


class Kept:
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def observe(self, event):
        self.told.append(event)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A sweep of two generations, gone on with for two more; its storage and both runs' events."""
    storage, first, second = tmp_path_factory.mktemp("ran"), Kept(), Kept()
    with file_operations.numpy_steps():
        sweep(storage, generations=2).run(observers=[first])
        result = sweep(storage, generations=4).run(observers=[second])
    return storage, first.told, second.told, result


def kinds(told):
    return [type(event).__name__ for event in told]


def test_observers_are_told_of_everything_in_order(ran):
    _, first, second, _ = ran
    done = ["GenerationDone"] * 2
    usual = ["Starting", "WorkerReady", "Prepared", "Running", *done, "Finished", "Over"]
    assert kinds(first) == ["Begun", *usual]
    assert kinds(second) == ["Begun", "Resumed", *usual]
    assert second[1] == events.Resumed(2, 4)
    assert first[3].batching == "map"


def test_a_generation_has_its_table_and_the_best_so_far(ran):
    _, first, second, result = ran
    done = [e for e in (*first, *second) if isinstance(e, events.GenerationDone)]
    assert [event.generation for event in done] == [1, 2, 3, 4]
    losses = result.table["val_loss"].reshape(4, -1)
    for event, row, best in zip(
        done, losses, np.minimum.accumulate(np.nanmin(losses, 1)), strict=True
    ):
        np.testing.assert_array_equal(event.table["val_loss"], row)
        assert event.best == best
        assert event.seconds > 0


def test_the_log_has_all_but_generations(ran):
    storage, first, second, _ = ran
    logged = event_log.read(storage)
    untold = events.Begun | events.GenerationDone | events.Over
    told = [e for e in (*first, *second) if not isinstance(e, untold)]
    assert [facts["event"] for facts in logged] == [event.name for event in told]
    assert logged[4]["generation"] == 2
    with open(storage / "events.jsonl", "a") as file:
        file.write('[1]\n{"time": "x", "event": 3}\n{"time": 1, "ev')  # as a kill leaves it
    assert event_log.read(storage) == logged


def test_what_an_observer_raises_is_told_once_and_stops_nothing(tmp_path, numpy_steps):
    class Full:
        def observe(self, event):
            if isinstance(event, events.GenerationDone):
                raise RuntimeError("no more")

    kept = Kept()
    assert sweep(tmp_path, generations=3).run(observers=[Full(), kept]).generations == 3
    (failed,) = [e for e in kept.told if isinstance(e, events.ObserverFailed)]
    assert "Full" in failed.observer
    assert failed.error == "RuntimeError: no more"
    assert "observer failed" in {facts["event"] for facts in event_log.read(tmp_path)}


def test_what_a_callback_raises_ends_the_run_and_what_is_saved_stays(tmp_path, numpy_steps):
    def full(generation, table):
        raise RuntimeError("no more")

    kept = Kept()
    with pytest.raises(RuntimeError, match="no more"):
        sweep(tmp_path, generations=2).run(full, observers=[kept])
    assert kept.told[-1] == events.Over("RuntimeError: no more")
    assert sweep(tmp_path, generations=2).result().generations == 1


def test_an_event_that_comes_while_another_is_told_waits():
    kept, telling = Kept(), events.Telling([])

    class Signalled:
        def observe(self, event):
            if isinstance(event, events.Starting):
                telling.tell(events.Stopping("SIGINT"))

    telling.to(Signalled(), kept)
    telling.tell(events.Starting())
    assert kept.told == [events.Starting(), events.Stopping("SIGINT")]


def test_the_display_shows_the_best_so_far_and_no_escapes(capfd):
    display = Display(None, "a\x1b[2J", 2, 10, Objectives({"loss": 1}))
    display.observe(events.Starting())
    display.observe(events.Running(0))
    display.observe(events.GenerationDone(1, {"loss": np.array([3.0, 4.0])}, 3.0, 0.1))
    display.observe(events.GenerationDone(2, {"loss": np.array([5.0, np.nan])}, 3.0, 0.1))
    display.observe(events.Note("evil\x1b]0;title\x07"))
    shown = capfd.readouterr().err
    assert "\x1b" not in shown
    assert r"a\x1b[2J: starting" in shown
    assert "generation 2/2: loss best 3, median 5, 1 diverged" in shown


def test_the_observer_of_the_page(tmp_path, numpy_steps):
    made = {}
    exec(pages.block("cluster", "def observe").split("sweep.run")[0], made)
    path = tmp_path / "losses.jsonl"
    sweep(tmp_path / "run", generations=2).run(observers=[made["Tracker"](path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["generation"] for row in rows] == [1, 2]
    assert rows[0]["best"] >= rows[1]["best"]


def test_a_setting_that_was_an_attribute_is_refused_by_name(tmp_path):
    made = sweep(tmp_path, generations=1)
    with pytest.raises(AttributeError, match=r"Sweep.steps is Sweep.identity.steps_per_gen"):
        _ = made.steps
    with pytest.raises(AttributeError, match=r"Sweep.workers is Sweep.place.workers"):
        _ = made.workers
    assert not hasattr(made, "nothing")

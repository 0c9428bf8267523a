"""A sweep ends early when it is asked to, says why, and goes on as if nothing had been."""

import numpy as np
import pytest

import gradhpo
from gradhpo.cluster import Sweep, events
from gradhpo.cluster.cli import app
from gradhpo.cluster.storage import Storage
from tests import file_operations
from tests.sweeps import SETTINGS, assert_same_tables, sweep
from tests.test_events import Kept

pytestmark = pytest.mark.usefixtures("numpy_steps")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The sweep without a stop."""
    with file_operations.numpy_steps():
        return sweep(tmp_path_factory.mktemp("straight")).run()


def best_by_generation(result):
    """The best so far after each generation."""
    losses = result.table["val_loss"].reshape(result.generations, -1)
    return np.minimum.accumulate(losses.min(axis=1))


def run(storage, **settings):
    kept = Kept()
    result = sweep(storage, **settings).run(observers=[kept])
    return result, [event for event in kept.told if isinstance(event, events.Stopped)]


@pytest.mark.parametrize("every", [1, 3])
def test_a_target_ends_it_and_going_on_gives_the_same_bits(tmp_path, straight, every):
    best = best_by_generation(straight)
    done = int(np.argmax(best <= best[3])) + 1
    assert 1 < done < len(best)
    stop = gradhpo.Stop(target=float(best[3]))
    result, (told,) = run(tmp_path, stop=stop, checkpoint_every=every)
    assert result.generations == told.generation == done
    assert told.expected
    assert "the target is reached: val_loss is" in told.reason
    assert result.stopped == told.reason
    again, (told,) = run(tmp_path, stop=stop)  # it holds still: nothing is computed
    assert again.generations == done
    assert again.report is None
    assert "the target is reached" in told.line()
    whole, nothing = run(tmp_path)
    assert nothing == []
    assert whole.stopped is None
    assert_same_tables(whole, straight)


def test_patience_counts_generations_without_a_best(tmp_path, straight):
    best = best_by_generation(straight)
    fine = max(best) - best
    assert fine[-1] > 0, "the metric gets better"
    about = {"metric": "hyperparams.log_rate", "stop": gradhpo.Stop(patience=2)}
    result, (told,) = run(tmp_path, generations=30, **about)
    rates = result.table["hyperparams.log_rate"].reshape(result.generations, -1).min(axis=1)
    assert result.generations - (1 + int(np.argmin(rates))) == 2
    assert told.reason == "2 generations without a best so far, patience=2"


def test_seconds_end_it_after_the_generation_in_flight(tmp_path, straight):
    result, (told,) = run(tmp_path, stop=gradhpo.Stop(seconds=1e-6))
    assert (result.generations, told.left) == (1, 7)
    assert told.reason == "seconds=1e-06 are over"
    for done in (2, 3):  # each run has its own
        result, _ = run(tmp_path, stop=gradhpo.Stop(seconds=1e-6))
        assert result.generations == done
    assert_same_tables(run(tmp_path)[0], straight)


def test_a_request_ends_it_once(tmp_path, straight):
    class Asks:
        def observe(self, event):
            if isinstance(event, events.GenerationDone) and event.generation == 2:
                Storage(tmp_path).ask_to_stop("gradhpo stop on a host")

    kept = Kept()
    result = sweep(tmp_path).run(observers=[Asks(), kept])
    (told,) = [event for event in kept.told if isinstance(event, events.Stopped)]
    assert result.generations == 3  # the second is told while the third is computed
    assert (told.reason, told.expected) == ("gradhpo stop on a host", False)
    assert result.stopped == told.reason
    (tmp_path / "stop.txt").touch()  # left by somebody after the run: it is not of this one
    assert_same_tables(run(tmp_path)[0], straight)


def test_a_solve_has_seconds_too():
    from tests.test_observers import solve

    found = solve(40, eval_every=10, stop=gradhpo.Stop(seconds=1e-6))
    assert found.steps == 10
    assert solve(20, eval_every=10, resume=found).steps == 20


def test_stop_in_toml_and_what_is_wrong_with_it(tmp_path):
    path = tmp_path / "a.toml"
    text = (
        "\n".join(f'{name} = "{SETTINGS[name]}"' for name in ("problem", "optimizer"))
        + '\npopulation = 2\ngenerations = 1\nsteps_per_generation = 1\nstorage = "a"\nspace = {}\n'
    )
    path.write_text(text + "stop = {patience = 3, seconds = 2.5}\n")
    assert Sweep.from_toml(path).place.stop == gradhpo.Stop(patience=3, seconds=2.5)
    path.write_text(text + "stop = {patient = 3}\n")
    with pytest.raises(ValueError, match="stop must be a table with some of patience, target, sec"):
        Sweep.from_toml(path)
    with pytest.raises(TypeError, match=r"stop must be a gradhpo.Stop, got 3"):
        sweep(tmp_path / "b", stop=3)
    with pytest.raises(ValueError, match="Stop takes patience, target or seconds"):
        gradhpo.Stop()


def command(*arguments):
    """Run the command in this process; return what it prints and its exit status."""
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, [*map(str, arguments)])
    return done.output + (str(done.exception) if done.exception else ""), done.exit_code


def test_the_commands_stop_and_status(tmp_path):
    sweep(tmp_path, generations=2, stop=gradhpo.Stop(seconds=1e-6)).run()
    said, status = command("stop", tmp_path)
    assert "nobody runs" in said
    assert status == 1
    said, _ = command("status", tmp_path, "--watch")
    assert "stopped: seconds=1e-06 are over" in said
    assert "not running, 1 of 2 generations" in said
    asked = []

    def ask(generation, table):
        asked.append(command("stop", tmp_path))

    sweep(tmp_path, generations=6).run(ask)
    said, status = asked[0]
    assert "ends after the generation in flight" in said
    assert status == 0
    assert sweep(tmp_path, generations=6).result().generations == 3
    assert sweep(tmp_path, generations=6).result().stopped.startswith("gradhpo stop on ")
    assert Storage(tmp_path).stop_request() is None


def test_a_request_reaches_the_driver_of_a_sweep_in_a_store():
    pytest.importorskip("fsspec", reason="fsspec is not installed (the extra cluster)")
    where = "memory://test-stopping/run"

    def ask(generation, table):
        if generation == 1:
            Storage(where).ask_to_stop("somebody")

    result = sweep(where).run(ask)
    assert (result.generations, result.stopped) == (2, "somebody")
    assert Storage(where).stop_request() is None

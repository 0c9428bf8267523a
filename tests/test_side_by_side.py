"""Programs that are compiled side by side: each once, and told of while it takes its time."""

import numpy as np
import pytest

from gradhpo.cluster import compile_progress, events
from gradhpo.cluster.compile_progress import CompileProgress
from gradhpo.parallel import compiled


def test_threads_that_want_one_program_compile_it_once():
    lowered = compiled.lower(lambda x: x * 3 - 7, np.ones(5, np.float32))
    made = compiled.together([lowered.compile] * 4)
    assert len({id(program) for program, _ in made}) == 1
    assert sum(counts.compiles for _, counts in made) == 1
    assert sum(counts.hits for _, counts in made) == 3


@pytest.fixture
def clock(monkeypatch):
    """Seconds that go on when a test says so."""
    now = [100.0]
    monkeypatch.setattr(compile_progress.time, "monotonic", lambda: now[0])
    return now


def test_what_compiles_is_said_when_it_begins_while_it_lasts_and_when_it_is_done(clock):
    told = []
    methods = [{"method": name} for name in ("a", "b", "c")]
    progress = CompileProgress(methods, [0, 2], told.append)
    progress.begin(0)
    progress.begin(2)
    progress.begin(2)  # its worker was lost
    clock[0] += 29
    progress.still()
    assert [event.line() for event in told] == [
        "compiling 1 of 2: method=a",
        "compiling 2 of 2: method=c",
    ]
    clock[0] += 2
    first = progress.end(0)
    progress.still()
    progress.still()
    assert [event.line() for event in told[2:]] == ["compiling 2 of 2: method=c, 31 s so far"]
    about = {"batching": "map", "warnings": ()} | dict.fromkeys(
        ("compiles", "loads", "restores", "small_compiles", "calibration_compiles"), 0
    )
    assert events.Prepared(0, **about, told=first).line() == "compiled 1 of 2: method=a, 31.0 s"
    assert progress.end(1) is None


def test_of_one_program_nothing_is_said_beside_the_start():
    told = []
    progress = CompileProgress([{}], [0], told.append)
    progress.begin(0)
    assert progress.end(0) is None
    assert not told

"""What a store is asked for, and how long: few objects of a long text, no request for ever."""

import itertools
import re
import socket

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gradhpo import bucket, objects, stop_request
from gradhpo.bucket import Bucket
from gradhpo.files import Unreachable
from gradhpo.objects import Objects
from tests.test_bucket import lives

TEXT = "journal.jsonl"


@pytest.fixture
def address(request):
    """An address of this test's own, with nothing below it."""
    yield f"memory://{re.sub('[^a-z_.]', '-', request.node.name)}/run"
    MemoryFileSystem.store.clear()


def asked_for(monkeypatch):
    """Return the list of objects that stores are asked for, as it grows."""
    asked, get = [], MemoryFileSystem.cat_file

    def counted(self, path, *args, **kwargs):
        asked.append(path)
        return get(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    return asked


@pytest.mark.parametrize("lines", [2, 3, 4, 11])
def test_a_long_text_is_read_from_a_few_objects(address, monkeypatch, lines):
    monkeypatch.setattr(bucket, "LINES", 3)
    store = Bucket(address)
    held = store.lock("storage", "sweep", (TEXT,))
    for number in range(lines):
        store.append(TEXT, b"%d\n" % number)
    expected = b"".join(b"%d\n" % number for number in range(lines))
    held.release()
    asked = asked_for(monkeypatch)
    assert Bucket(address).read(TEXT) == expected
    assert len([path for path in asked if TEXT in path]) <= 4  # twice as many at each look
    assert store.last(TEXT) == lines + 1  # each line an object, after that of taking over
    again = store.lock("storage", "sweep", (TEXT,))
    store.append(TEXT, b"more\n")
    assert store.read(TEXT) == expected + b"more\n"
    again.release()


def test_a_damaged_whole_text_costs_what_came_with_it_alone(address, monkeypatch):
    monkeypatch.setattr(bucket, "LINES", 3)
    store = Bucket(address)
    held = store.lock("storage", "sweep", (TEXT,))
    for number in range(7):
        store.append(TEXT, b"%d\n" % number)
    assert store.get(TEXT, 6).endswith(b"0\n1\n2\n3\n4\n")
    store.put(TEXT, 6, b"damaged")
    assert store.read(TEXT) == b"0\n1\n2\n3\ndamaged\n5\n6\n"
    held.release()


@pytest.mark.slow
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_death_at_any_request_changes_no_bit_where_texts_are_often_put_whole(
    tmp_path, monkeypatch, done
):
    monkeypatch.setattr(bucket, "LINES", 2)
    expected, deaths = lives(tmp_path, 1), 0
    for number in itertools.count(0, 6):
        where = f"memory://often-{done}/{number}"
        found = lives(where, 1, number, done)
        if found is None:
            deaths += 1
            lives(where, 1, 5 * number % 23, not done)
            found = lives(where, 1)
        assert found == expected, f"another result after a death at {number}"
        if number >= 6 * deaths:  # the first that nothing came between
            break
    assert deaths > 6
    MemoryFileSystem.store.clear()


def test_whether_somebody_asks_for_the_end_is_one_request(address, monkeypatch):
    store, asked = Bucket(address), asked_for(monkeypatch)
    for method in ("info", "ls", "pipe_file", "rm"):
        monkeypatch.delattr(MemoryFileSystem, method)
    assert stop_request.asked(store) is None
    assert len(asked) == 1


@pytest.mark.slow
def test_a_silent_server_is_given_up(monkeypatch):
    pytest.importorskip("s3fs", reason="s3fs is not installed (the extra s3)")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "of-no-account",
            "AWS_SECRET_ACCESS_KEY": "of-no-account",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "GRADHPO_STORE_SECONDS": "0.1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = Objects("s3://bucket/run")
        for request in (
            lambda: store.get("a"),
            lambda: store.get_all(["a", "b"]),
            lambda: store.put("a", b"content"),
            lambda: store.create("a", b"content"),
            lambda: store.exists("a"),
            lambda: store.listed("", "file"),
            lambda: store.remove(["a"]),
            lambda: store.open("a"),
        ):
            with pytest.raises(Unreachable, match=r"no answer in time.*GRADHPO_STORE_SECONDS"):
                request()
        assert store._within(print, 0).keywords == {"timeout": 0.1}  # BRIEF is more


def test_a_silent_store_is_waited_for_briefly_until_it_answers(address, monkeypatch):
    monkeypatch.setattr(Objects, "_of", lambda self, protocol: False)
    store = Objects(address)

    def seconds():
        return store._within(print, 2_000_000).keywords["timeout"]

    assert seconds() == objects.LIMIT + 2
    with pytest.raises(Unreachable), store._told():
        raise TimeoutError
    assert seconds() == objects.BRIEF + 2
    with pytest.raises(FileNotFoundError), store._told():  # an answer
        raise FileNotFoundError
    assert seconds() == objects.LIMIT + 2


@pytest.mark.parametrize("given", ["0", "-1", "soon", "inf", "nan"])
def test_a_limit_that_is_none_is_refused_by_name(address, monkeypatch, given):
    monkeypatch.setenv("GRADHPO_STORE_SECONDS", given)
    with pytest.raises(ValueError, match=f"GRADHPO_STORE_SECONDS must be a .*, got '{given}'"):
        Objects(address)

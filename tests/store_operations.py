"""Kill or freeze a small sweep in an object store at requests that change something, and go on.

Run by `test_s3` as a program, with the environment in which the server of S3 is found. As in
`file_operations`: each life of a sweep is a fork, and the compiled step is a few lines of NumPy.
"""

import functools
import itertools
import os
import signal
import sys
import traceback
from pathlib import Path

import jax
import s3fs

from gradhpo import bucket_lock
from gradhpo.cluster import StorageInUse, shard
from tests import file_operations

CHANGE = ("put_", "delete_", "create_", "complete_", "upload_")
"""How the requests begin that change something."""
REPLACED = 3
"""The exit status of a driver whose storage was taken over."""


def signalled_at(number, which):
    """Let a signal come at the request of this number: before it, or when the store has done it."""
    calls, call_s3 = itertools.count(0), s3fs.S3FileSystem._call_s3

    async def dangerous(self, method, *args, **kwargs):
        now = next(calls) if method.startswith(CHANGE) else -1
        if now == number // 2 and number % 2 == 0:
            os.kill(os.getpid(), which)
        answer = await call_s3(self, method, *args, **kwargs)
        if now == number // 2 and number % 2 == 1:
            os.kill(os.getpid(), which)
        return answer

    s3fs.S3FileSystem._call_s3 = dangerous


def life(address, found, every, number=None, which=signal.SIGKILL):
    """Run the sweep in a process of its own; return its number and how it ended or was stopped."""
    child = os.fork()
    if child == 0:
        try:
            if number is not None:
                signalled_at(number, which)
            found.write_text(file_operations.run(address, every))
            os._exit(0)
        except StorageInUse as error:
            print(error, flush=True)
            os._exit(REPLACED)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child, os.waitpid(child, os.WUNTRACED)[1]


def kills(found, every, first, step):
    """Kill at each `step`-th instant, and again while it goes on; return how often."""
    count, expected = 0, undisturbed(found, every)
    for number in itertools.count(first, step):
        address = f"s3://bucket/killed-{every}-{number}"
        ends = [life(address, found, every, number)[1]]
        if ends == [0]:
            return count
        ends += [life(address, found, every, 7 * number % 40)[1]]
        found.unlink(missing_ok=True)
        ends += [life(address, found, every)[1]]
        assert set(ends[:2]) <= {0, signal.SIGKILL}, ends
        assert ends[2] == 0, ends
        assert found.read_text() == expected, f"another result after a kill at {number}"
        count += ends.count(signal.SIGKILL)
    raise AssertionError


def freezes(found, every, first, step):
    """Freeze at each `step`-th instant while another takes over and ends; return how often."""
    bucket_lock.BEAT, bucket_lock.PATIENCE = 0.1, 0.6
    count, expected = 0, undisturbed(found, every)
    for number in itertools.count(first, step):
        address = f"s3://bucket/frozen-{every}-{number}"
        child, status = life(address, found, every, number, signal.SIGSTOP)
        if not os.WIFSTOPPED(status):
            assert status == 0
            return count
        assert life(address, found, every)[1] == 0
        assert found.read_text() == expected, f"another result after a freeze at {number}"
        before = objects(address)
        os.kill(child, signal.SIGCONT)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        compare(before, objects(address))
        # It ended with an error, or what it was about to say was the last that it had to.
        assert status == REPLACED or (status == 0 and found.read_text() == expected), status
        count += status == REPLACED
    raise AssertionError


@functools.cache
def undisturbed(found, every):
    """Return what the sweep finds."""
    assert life(f"s3://bucket/undisturbed-{every}", found, every)[1] == 0
    return found.read_text()


def objects(address):
    """Return every object's checksum; asked for by a process of its own."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        fs = s3fs.S3FileSystem(use_listings_cache=False)
        listed = fs.find(address.removeprefix("s3://"), detail=True)
        text = "\n".join(f"{path} {about['ETag']}" for path, about in listed.items())
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        return dict(line.split() for line in lines)


def compare(before, after):
    """Nothing is another, and what is new is an array that nobody names."""
    alive = f"/{bucket_lock.ALIVE}/000001"
    gone = {path for path in before if path not in after}
    other = {path for path in before if path not in gone and before[path] != after[path]}
    assert gone == set(), gone
    assert all(path.endswith(alive) for path in other), other
    new = [path for path in after if path not in before]
    assert all("/checkpoints/" in path or "/tables/" in path for path in new), new


def main(folder, *groups):
    """See above; print how often, by group of `what every first step`. Freezes come last."""
    jax.process_index, jax.process_count = lambda: 0, lambda: 1  # they would start a backend
    shard.Variant = file_operations.Variant
    for what, *numbers in zip(*[iter(groups)] * 4, strict=True):
        of = {"kills": kills, "freezes": freezes}[what]
        print(of(Path(folder) / "found", *map(int, numbers)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

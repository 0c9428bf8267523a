"""Kill a small sweep in an object store at every request that changes something, and go on.

Run by `test_s3` as a program, with the environment in which the server of S3 is found. As in
`file_operations`: each life of a sweep is a fork, and the compiled step is a few lines of NumPy.
"""

import itertools
import os
import signal
import sys
import traceback
from pathlib import Path

import jax
import s3fs

from gradhpo.cluster import shard
from tests import file_operations

CHANGE = ("put_", "delete_", "create_", "complete_", "upload_")
"""How the requests begin that change something."""


def killed_at(number):
    """Let SIGKILL come at the request of this number: before it, or when the store has done it."""
    calls, call_s3 = itertools.count(0), s3fs.S3FileSystem._call_s3

    async def dangerous(self, method, *args, **kwargs):
        now = next(calls) if method.startswith(CHANGE) else -1
        if now == number // 2 and number % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = await call_s3(self, method, *args, **kwargs)
        if now == number // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    s3fs.S3FileSystem._call_s3 = dangerous


def life(address, found, every, number=None):
    """Run the sweep in a process of its own; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            if number is not None:
                killed_at(number)
            found.write_text(file_operations.run(address, every))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"killed at {number}: {status}"
    return status == 0


def main(folder, every, first, step):
    """Kill at each `step`-th instant, and again while it goes on."""
    jax.process_index, jax.process_count = lambda: 0, lambda: 1  # they would start a backend
    shard.Variant = file_operations.Variant
    found, kills = Path(folder) / "found", 0
    assert life("s3://bucket/undisturbed", found, every)
    expected = found.read_text()
    for number in itertools.count(first, step):
        address = f"s3://bucket/killed-{every}-{number}"
        if life(address, found, every, number):
            break
        kills += 1 + (not life(address, found, every, 7 * number % 40))
        found.unlink(missing_ok=True)
        assert life(address, found, every)
        assert found.read_text() == expected, f"another result after a kill at {number}"
    print(kills)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

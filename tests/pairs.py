"""A script run by two processes at once, which find each other at a free port."""

import socket
import subprocess
import sys


def run_both(script, *arguments, flags=()):
    """Run `script ADDRESS RANK ARGUMENTS…` as ranks 0 and 1 to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, *flags, str(script), address, str(rank), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)

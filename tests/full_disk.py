"""A disk with no room: the largest file that this process may write is small."""

import contextlib
import resource
import signal


@contextlib.contextmanager
def full_disk(size):
    """Let no file grow beyond so many bytes: a write that would fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

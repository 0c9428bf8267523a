"""Workers in processes of their own whose steps are a few lines of NumPy: they compile nothing."""

import importlib
import os
import signal
import sys
import time

from gradhpo.cluster import local_processes
from tests import file_operations, sweep_problems

SERVE = "serve(**about)"
Plain = file_operations.Variant


class Crashes(Plain):
    """A step that ends its process, as a fault in native code would."""

    def turn(self, state, order):
        os.kill(os.getpid(), signal.SIGKILL)


class Paced(Plain):
    """Generations take long enough for something to happen in them."""

    def turn(self, state, order):
        time.sleep(0.05)
        return super().turn(state, order)


class Slow(Plain):
    """Each generation of a shard takes longer than a worker may be silent."""

    def turn(self, state, order):
        time.sleep(0.7)
        return super().turn(state, order)


class SlowDisk(Plain):
    """The first process of all, which writes its number down, has a slow disk."""

    def __init__(self, spec, arguments, data):
        super().__init__(spec, arguments, data)
        sweep_problems.slow_disk_problem()


def boot(name):
    """Return what a worker's process runs, `local_processes.BOOT`, with steps of this class."""
    assert SERVE in local_processes.BOOT
    patch = f"from tests import numpy_workers\nnumpy_workers.use('{name}')\n"
    return local_processes.BOOT.replace(SERVE, patch + SERVE)


def use(name):
    """Let steps of this process be of this class."""
    file_operations.shard.Variant = globals()[name]


def on_ray(root, **env):
    """Return a `runtime_env` of Ray in which NUMPY_STEPS names the class of steps, if any."""

    def hook():
        if name := os.environ.get("NUMPY_STEPS"):
            sys.path.insert(0, root)
            importlib.import_module("tests.numpy_workers").use(name)

    return {"worker_process_setup_hook": hook, "env_vars": env}

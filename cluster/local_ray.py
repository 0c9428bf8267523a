"""A Ray of this machine only, for one sweep or for several."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Generator
from typing import Any

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
"""For `ray.init`: what workers print stays in files."""


@contextlib.contextmanager
def local_ray(cpus: float) -> Generator[None]:
    """Hold a Ray of this machine for several sweeps, which then need not each start one.

    It listens on this machine's own addresses only, and reports nothing. Where Ray runs in this
    process already, that one is used and left running.

    Args:
      cpus: processors that Ray may hand out, whether the machine has as many or not.
    """
    started = start_local_ray(cpus)
    try:
        yield
    finally:
        if started:
            import ray

            ray.shutdown()


def start_local_ray(cpus: float) -> bool:
    """Start Ray on this machine unless this process has one; return whether it was started."""
    # Before the first import of Ray: addresses of this machine only, nothing reported.
    told = os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers have environments of their own, and take no process that Ray starts ahead.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    import ray
    from ray._private import ray_constants  # pyright: ignore[reportPrivateImportUsage]

    if ray.is_initialized():
        return False
    if told == "0" and ray_constants.ENABLE_RAY_CLUSTER:
        warnings.warn(
            "Ray was imported before gradhpo could tell it to stay on this machine, and listens "
            "on its network's address: set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 first",
            RuntimeWarning,
            stacklevel=3,
        )
    count = max(len(os.sched_getaffinity(0)), math.ceil(cpus))
    ray.init(address="local", num_cpus=count, include_dashboard=False, **QUIET)
    return True


def has_ray() -> bool:
    """Whether Ray is installed."""
    return importlib.util.find_spec("ray") is not None

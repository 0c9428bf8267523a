"""Devices and precision for the tests."""

import os
import sys
from pathlib import Path

# Before JAX is imported: eight CPU devices, so that sharding can be tested on any machine.
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()

# A script's folder is on its path: the examples find their modules as they do when they are run.
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path += [str(EXAMPLES), str(EXAMPLES / "papers")]

import jax  # noqa: E402
import pytest  # noqa: E402

from gradhpo.parallel import compiled  # noqa: E402


@pytest.fixture
def x64():
    """Compute in float64 in this test, and this test only."""
    with jax.enable_x64(True):
        yield
    # JAX remembers NumPy constants in the precision of the trace that met them first (0.10.2), and
    # would hand a float64 buffer to a float32 program that gets the same array.
    jax.clear_caches()


@pytest.fixture(scope="module")
def only_x64():
    """Compute in float64 in all of a module: what its tests trace is traced once."""
    with jax.enable_x64(True):
        yield
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Forget compiled programs after each file: they hold memory maps, and Linux allows 65530.

    A process that compiles for minutes runs out of them, and the compiler then crashes.
    """
    yield
    jax.clear_caches()
    compiled.clear()

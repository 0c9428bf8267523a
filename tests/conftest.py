"""Devices, precision and the compiler's effort for the tests."""

import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported: eight CPU devices, so that sharding can be tested on any machine.
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()

# `make test` compiles at the least effort all tests but those marked `compiler`: half of a test's
# time is XLA's, and what is exact is so whatever the effort.
if os.environ.get("QUICK_COMPILE"):
    QUICK = ["backend_optimization_level=0", "llvm_disable_expensive_passes=true"]
    QUICK += ["cpu_parallel_codegen_split_count=1"]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones have no such flag
        QUICK += ["cpu_use_fusion_emitters=false"]
    os.environ["XLA_FLAGS"] += "".join(f" --xla_{flag}" for flag in QUICK)

# A script's folder is on its path: the examples find their modules as they do when they are run.
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path += [str(EXAMPLES), str(EXAMPLES / "papers")]

# What one run of the tests measured must not decide what another one tests.
os.environ["GRADHPO_CACHE"] = "off"

# Ray would have its workers wait for whatever else computes: other tests, then.
os.environ.setdefault("RAY_worker_niceness", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

from gradhpo.parallel import compiled  # noqa: E402

LONGEST = ["ray", "optax", "data_parallel", "population", "examples", "long_runs", "kills", "host"]


def pytest_collection_modifyitems(items):
    """Start with the longest files, the first of which waits for other processes."""
    place = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish():
    """Look for garbage less often, and not among what was imported: a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def x64():
    """Compute in float64 in this test, and this test only."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def numpy_steps():
    """Let generations of sweeps be a few lines of NumPy in this test: a tenth of the time."""
    from tests import file_operations

    with file_operations.numpy_steps():
        yield


def pytest_runtest_teardown(item, nextitem):
    """Forget what tests in float64 traced, after the last of some in a row.

    JAX remembers NumPy constants in the precision of the trace that met them first (0.10.2), and
    would hand a float64 buffer to a float32 program that gets the same array.
    """
    if "x64" in item.fixturenames and "x64" not in getattr(nextitem, "fixturenames", ()):
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
    gc.collect()

"""Devices and precision for the tests."""

import os

# Before JAX is imported: eight CPU devices, so that sharding can be tested on any machine.
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def x64():
    """Compute in float64 in this test, and this test only."""
    with jax.enable_x64(True):
        yield

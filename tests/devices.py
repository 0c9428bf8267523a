"""XLA's flags for another process of a test: those of this one, with other devices."""

import os
import re

COUNT = "--xla_force_host_platform_device_count"


def flags(devices):
    """Return `XLA_FLAGS` for so many devices of the CPU; the compiler's effort stays."""
    others = re.sub(rf"{COUNT}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return f"{COUNT}={devices} {others}".strip()

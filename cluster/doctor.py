"""What is there for gradhpo to use: devices, packages, memory, and what a sweep would take."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator

import jax

from gradhpo._version import __version__
from gradhpo.parallel import layout_cache

CORE = ("jax", "jaxlib", "optax", "chex", "numpy")
EXTRAS = {
    "cluster": ("fsspec", "ray", "tqdm", "typer"),
    "s3": ("s3fs",),
    "search": ("scikit-learn", "threadpoolctl"),
    "tune": ("pandas",),
    "report": ("matplotlib", "plotly", "rich", "tqdm"),
    "trackers": ("tensorboardX", "wandb", "mlflow-skinny", "optuna"),
    "root": ("lineax",),
    "export": ("safetensors", "orbax-checkpoint"),
    "models": ("flax", "equinox"),
}
"""Packages by what they are for; an extra of that name installs them, but for models."""
MODULES = {
    "mlflow-skinny": "mlflow",
    "orbax-checkpoint": "orbax.checkpoint",
    "scikit-learn": "sklearn",
}


def findings() -> Iterator[str]:
    """Yield what there is, a line each; this starts JAX's backend, and nothing else."""
    yield f"gradhpo {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{name} {_version(name)}" for name in CORE)
    yield from _devices()
    for extra, packages in EXTRAS.items():
        yield f"{extra}: " + ", ".join(_package(name) for name in packages)
    if missing := _missing():
        yield f"to install what is missing: pip install 'gradhpo[{','.join(missing)}]'"
    yield _executor()
    yield f"measured layouts are kept in {layout_cache.folder() or 'no folder (GRADHPO_CACHE=off)'}"


def _devices() -> Iterator[str]:
    try:
        devices = jax.devices()
    except RuntimeError as error:  # another process has them, or a driver is missing
        yield f"devices: none can be used: {error}"
        return
    kinds: dict[str, int] = {}
    for device in devices:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    named = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    bits = "64" if jax.config.jax_enable_x64 else "32"  # pyright: ignore
    yield f"devices: {named} ({jax.default_backend()}), {bits} bits"
    stats = devices[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        yield f"memory of a device: {limit / 2**30:.1f} GiB"
    yield f"processors of this process: {len(os.sched_getaffinity(0))}"


def _executor() -> str:
    if importlib.util.find_spec("ray") is None:
        return 'a sweep runs in this process; executor="processes" uses all processors, ray hosts'
    if address := os.environ.get("RAY_ADDRESS"):
        return f"a sweep joins the Ray at RAY_ADDRESS={address}"
    return "a sweep starts a Ray of this machine; RAY_ADDRESS or address= joins another"


def _missing() -> list[str]:
    """Return the extras of which a package is not there."""
    return [
        extra
        for extra, packages in EXTRAS.items()
        if extra != "models" and not all(map(_there, packages))
    ]


def _package(name: str) -> str:
    return f"{name} {_version(name)}" if _there(name) else f"{name} not installed"


def _there(name: str) -> bool:
    module = MODULES.get(name, name)
    found = importlib.util.find_spec(module.split(".", maxsplit=1)[0]) is not None
    return found and (name not in MODULES or _version(name) != "?")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "?"

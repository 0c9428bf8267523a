"""Compiled programs that are shared: kept by their step key, sent as bytes, and counted.

A step key says what identifies a compiled program: the computation, the shapes, the layout, the
versions, the devices and the flags. Equal keys, equal programs, equal bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding

from gradhpo.compilation import jit
from gradhpo.parallel import compilations
from gradhpo.state import PyTree

MAGIC = b"gradhpo executable 2\n"
MOST_AT_ONCE = 4
"""Programs that are compiled side by side, each of which takes memory meanwhile."""


class CompileWarning(UserWarning):
    """Bytes could not be used, and the program was compiled here instead."""


@dataclasses.dataclass(frozen=True)
class StepKey:
    """What identifies a compiled program."""

    computation: str
    """SHA-256 of the lowered program (StableHLO), shapes and shardings included."""
    shapes: tuple[str, ...]
    """The arguments, by path, as `float32[8,3]`."""
    layout: str
    """How slots are laid out; see `Population`."""
    jax: str
    jaxlib: str
    device_kind: str
    devices: int
    processor: str
    """What the CPU can do, for programs of the CPU; they may not run on another."""
    flags: tuple[str, ...]
    """`XLA_FLAGS`, and the settings of JAX that change numbers."""

    def digest(self) -> str:
        """Return 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()

    def difference(self, other: StepKey) -> str | None:
        """Return which field differs, with both values; None where none does."""
        for field in dataclasses.fields(self):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if mine != its:
                return f"{field.name} is {_short(its)}, here {_short(mine)}"
        return None


@dataclasses.dataclass(frozen=True)
class Counts:
    """What this process did to get its programs."""

    compiles: int = 0
    """Programs compiled by XLA."""
    loads: int = 0
    """Programs loaded from bytes."""
    hits: int = 0
    """Programs found in this process, by their step key."""
    refusals: int = 0
    """Bytes refused; each was followed by a compile, a restore or a hit."""
    restores: int = 0
    """Programs that JAX's persistent compilation cache gave."""

    def since(self, before: Counts) -> Counts:
        """Return what was done after another count."""
        old, new = dataclasses.asdict(before), dataclasses.asdict(self)
        return Counts(**{name: n - old[name] for name, n in new.items()})

    def plus(self, **more: int) -> Counts:
        """Return the counts with some increased."""
        old = dataclasses.asdict(self)
        return Counts(**{name: n + more.get(name, 0) for name, n in old.items()})


class Compiled:
    """A program for one step key. Call it with arguments of the shapes that it was made for."""

    def __init__(
        self,
        key: StepKey,
        executable: jax.stages.Compiled,
        payload: bytes | None = None,
        *,
        calls_python: bool = False,
        whole: bool = True,
    ) -> None:
        self.key = key
        self.executable = executable
        self.whole = whole
        """Whether XLA compiled it here. What JAX's persistent cache restores runs, but serializes
        to bytes without its functions (CPU, 0.10.2), which load, and fail when they are called."""
        self.calls_python = calls_python
        self._payload = payload
        if payload is None and key.processor and self.shareable:
            # A program of the CPU that sorts cannot be serialized after its first run (0.10.2).
            self._payload = serialize_executable.serialize(executable)[0]

    @property
    def shareable(self) -> bool:
        """Whether `serialize` gives bytes that another process can use."""
        return self.whole and not self.calls_python

    def __call__(self, *args: PyTree) -> PyTree:
        """Run the program."""
        return self.executable(*args)

    def run(self, function: Callable[..., Any], *args: PyTree) -> PyTree:
        """Run the program of this function, as JAX's switches for debugging ask for.

        An executable refuses `jax.disable_jit`, and fails on a NaN with an error of JAX's own
        interior; the function is not kept, for it holds its owner's arrays.
        """
        config: Any = jax.config
        if config.jax_disable_jit:
            return function(*args)
        try:
            return self.executable(*args)
        except Exception:
            if not _debugging() or _gone(args):
                raise
            return jax.jit(function)(*args)  # looks for the operation, and names it

    def serialize(self) -> bytes:
        """Return the program as bytes: its step key, a checksum, and XLA's own serialization.

        Of a program that came from JAX's persistent compilation cache the bytes hold the step key
        alone: who loads them is told so, and gets the program from that cache too, or compiles it.

        Raises:
          ValueError: if the program calls back into Python, which bytes cannot hold.
        """
        if self.calls_python:
            raise ValueError("a program that calls back into Python cannot be serialized")
        payload = self._payload
        if not self.whole:
            payload = b""
        elif payload is None:
            payload = serialize_executable.serialize(self.executable)[0]
        header = {
            "whole": self.whole,
            "key": dataclasses.asdict(self.key),
            "sha256": hashlib.sha256(payload).hexdigest(),
            "size": len(payload),
        }
        return MAGIC + json.dumps(header).encode() + b"\n" + payload

    def bytes_needed(self) -> int:
        """Return the bytes on one device while it runs, from XLA's memory analysis."""
        memory: Any = self.executable.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        held += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        return held - memory.alias_size_in_bytes


class Lowered(NamedTuple):
    """A program that is traced and not compiled yet, with its step key."""

    program: Any
    key: StepKey
    devices: list[Any]

    def compile(self) -> Compiled:
        """Compile it, unless this process has it already."""
        return _find_or_compile(self.program, self.key, self.devices)

    def load(self, blob: bytes) -> Compiled:
        """Take it from `blob`; see the function `load`."""
        if (known := _find(self.key, self.devices, self.program)) is not None:
            return known
        reason, payload = _open(blob, self.key)
        if _calls_python(self.program):
            reason = "a program that calls back into Python cannot be loaded"
        if reason is None:
            try:
                executable = _deserialize(payload, self.program, self.devices)
                compiled = Compiled(self.key, executable, payload)
            except Exception as error:
                reason = f"XLA could not load it: {type(error).__name__}: {error}"
                if isinstance(error, KeyError):
                    reason += " (it was compiled for devices of other numbers)"
            else:
                _count(loads=1)
                return _keep(compiled, self.devices, self.program)
        _count(refusals=1)
        text = f"{reason}; the program is compiled here"
        warnings.warn(text, CompileWarning, stacklevel=3)
        return self.compile()


def compile(
    function: Callable[..., Any],
    *args: PyTree,
    layout: str = "",
    donate: int | tuple[int, ...] = (),
) -> Compiled:
    """Compile a function for arguments like these, unless this process has the program already.

    Args:
      function: traceable; jitted here.
      *args: arrays, or `jax.ShapeDtypeStruct`s with their shardings.
      layout: a name that becomes part of the step key.
      donate: which arguments' buffers become the result's; a call ends their life. With
        `jax_debug_nans` none do, since what failed is then run again.
    """
    return lower(function, *args, layout=layout, donate=donate).compile()


def load(
    blob: bytes,
    function: Callable[..., Any],
    *args: PyTree,
    layout: str = "",
    donate: int | tuple[int, ...] = (),
) -> Compiled:
    """Return the program in `blob`, from `Compiled.serialize`, for the given function.

    The function is traced and lowered here, not compiled, and its step key must be the blob's.
    A blob that is damaged, or made for something else, is refused with a `CompileWarning` that
    says why, and the program is compiled here.

    Warning: never load bytes from an untrusted place. The checksum finds damage, not malice: an
    executable is code, and it is unpickled, so whoever made the bytes runs what they like.

    Args:
      blob: bytes.
      function: as for `compile`.
      *args: as for `compile`.
      layout: as for `compile`.
      donate: as for `compile`; part of the computation that the step key names.
    """
    return lower(function, *args, layout=layout, donate=donate).load(blob)


def lower(
    function: Callable[..., Any],
    *args: PyTree,
    layout: str = "",
    donate: int | tuple[int, ...] = (),
) -> Lowered:
    """Trace and lower a function; the arguments are those of `compile`."""
    given = () if _debugging() else donate
    with jax.disable_jit(False):  # or loops would be traced step by step
        lowered = jit(function, donate_argnums=given).lower(*args)
    leaves = jax.tree_util.tree_flatten_with_path(args)[0]
    devices = devices_of(args)
    kind = devices[0]
    flags = [f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}"]
    for name in ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion"):
        flags.append(f"{name}={getattr(jax.config, name)}")
    key = StepKey(
        computation=hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        shapes=tuple(f"{jax.tree_util.keystr(path)} {_shape(leaf)}" for path, leaf in leaves),
        layout=layout,
        jax=jax.__version__,
        jaxlib=version("jaxlib"),
        device_kind=f"{kind.platform} {kind.device_kind}",
        devices=len(devices),
        processor=_processor() if kind.platform == "cpu" else "",
        flags=tuple(flags),
    )
    return Lowered(lowered, key, devices)


def together(jobs: Iterable[Callable[[], Compiled]]) -> list[tuple[Compiled, Counts]]:
    """Compile or load side by side, which XLA does outside of Python's lock.

    Args:
      jobs: such as `Lowered.compile`; tracing, which needs the lock, is done.

    Returns:
      In the order of the jobs each program, and what it took to get it.
    """

    def one(job: Callable[[], Compiled]) -> tuple[Compiled, Counts]:
        before = _of_this_thread()
        return job(), _of_this_thread().since(before)

    with ThreadPoolExecutor(min(MOST_AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, jobs))


def counts() -> Counts:
    """Return how many programs this process compiled, loaded, restored and found."""
    with _LOCK:
        return _COUNTS[0]


def clear() -> None:
    """Forget all programs; the counts go on."""
    with _LOCK:
        _PROGRAMS.clear()
        _AT_WORK.clear()


def forget(programs: Iterable[Compiled]) -> None:
    """Let go of programs that this process keeps for others of the same step; the counts go on."""
    gone = {id(program) for program in programs}
    with _LOCK:
        for key in [key for key, kept in _PROGRAMS.items() if id(kept) in gone]:
            del _PROGRAMS[key]
            _AT_WORK.pop(key, None)


_LOCK = threading.Lock()
_PROGRAMS: dict[tuple[Any, ...], Compiled] = {}
"""By step key and `_where`: a program stays on its devices."""
_AT_WORK: dict[tuple[Any, ...], threading.Lock] = {}
"""By the same, what keeps two threads from compiling one program at once."""
_COUNTS = [Counts()]
_OF_THREAD = threading.local()


def _find_or_compile(lowered: Any, key: StepKey, devices: list[Any]) -> Compiled:
    calls_python = _calls_python(lowered)  # which the step key does not see
    if calls_python:
        return _compile(lowered, key, calls_python=True)
    with _LOCK:
        mine = _AT_WORK.setdefault((key, *_where(devices, lowered)), threading.Lock())
    with mine:
        if (known := _find(key, devices, lowered)) is not None:
            return known
        return _keep(_compile(lowered, key, calls_python=False), devices, lowered)


def _compile(lowered: Any, key: StepKey, *, calls_python: bool) -> Compiled:
    compilations.watch()
    before = compilations.of_this_thread()
    executable = lowered.compile()
    made = compilations.of_this_thread().since(before)
    _count(compiles=made.compiled, restores=made.restored)
    # JAX may also have had it in this process, from wherever: then nothing was made now.
    whole = made.compiled > 0
    return Compiled(key, executable, calls_python=calls_python, whole=whole)


def _debugging() -> bool:
    config: Any = jax.config
    return config.jax_debug_nans or config.jax_debug_infs


def _gone(args: tuple[PyTree, ...]) -> bool:
    """Whether the program took the buffers of an argument."""
    leaves = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
    return any(leaf.is_deleted() for leaf in leaves)


def _calls_python(lowered: Any) -> bool:
    return "callback" in lowered.as_text()


def _find(key: StepKey, devices: list[Any], lowered: Any) -> Compiled | None:
    with _LOCK:
        known = _PROGRAMS.get((key, *_where(devices, lowered)))
    if known is not None:
        _count(hits=1)
    return known


def _keep(compiled: Compiled, devices: list[Any], lowered: Any) -> Compiled:
    with _LOCK:
        return _PROGRAMS.setdefault((compiled.key, *_where(devices, lowered)), compiled)


def _where(devices: list[Any], lowered: Any) -> tuple[Any, ...]:
    """Return the numbers of the devices, and the structures of what goes in and out.

    A list and a tuple have the same paths, and an executable takes only the one that it was made
    for.
    """
    return tuple(device.id for device in devices), lowered.in_tree, lowered.out_tree


def _count(**more: int) -> None:
    with _LOCK:
        _COUNTS[0] = _COUNTS[0].plus(**more)
    _OF_THREAD.counts = _of_this_thread().plus(**more)


def _of_this_thread() -> Counts:
    return getattr(_OF_THREAD, "counts", Counts())


def _open(blob: bytes, key: StepKey) -> tuple[str | None, bytes]:
    """Return why the blob is refused, or None and its payload."""
    if not blob.startswith(MAGIC):
        return "the bytes are not a serialized program of this version of gradhpo", b""
    line, _, payload = blob[len(MAGIC) :].partition(b"\n")
    try:
        header = json.loads(line)
        fields: dict[str, Any] = header["key"]
        lists = {name: tuple(fields[name]) for name in ("shapes", "flags")}
        restored: Any = fields | lists
        its = StepKey(**restored)
        whole, size, checksum = header["whole"], header["size"], header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        return f"the header of the program is damaged ({error})", b""
    if not whole or len(payload) != size:
        cached = (
            "it came from JAX's persistent compilation cache, and XLA cannot send such a program"
        )
        return cached if not whole else f"the program is cut: {len(payload)} of {size} bytes", b""
    if hashlib.sha256(payload).hexdigest() != checksum:
        return "the program is damaged: its checksum does not match", b""
    if (difference := key.difference(its)) is not None:
        return f"the program was made for something else: its {difference}", b""
    return None, payload


def _deserialize(payload: bytes, lowered: Any, devices: list[Any]) -> jax.stages.Compiled:
    trees = (lowered.in_tree, lowered.out_tree)
    return serialize_executable.deserialize_and_load(payload, *trees, execution_devices=devices)


def devices_of(args: tuple[PyTree, ...]) -> list[Any]:
    """Return the devices that a program for these arguments runs on, in their order."""
    placed = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
    for sharding in placed:
        if isinstance(sharding, NamedSharding):
            mesh: Any = sharding.mesh
            return list(mesh.devices.ravel())
    for sharding in placed:
        if sharding is not None:
            return list(sharding.device_set)
    return jax.devices()[:1]


def _shape(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return f"{dtype if dtype is not None else np.asarray(leaf).dtype}{list(np.shape(leaf))}"


def _processor() -> str:
    """Return a hash of the CPU's model and instruction sets."""
    wanted = ("model name", "flags", "Features")
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            first = info.read().split("\n\n")[0]
    except OSError:
        first = f"flags: {platform.machine()} {platform.processor()}"
    lines = [line for line in first.splitlines() if line.startswith(wanted)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:28]}…{text[-28:]}"

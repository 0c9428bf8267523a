"""Batches of the host: what `Problem.batches` may be, as streams of pairs that begin anywhere.

A stream is a function of its source, its seed and a position: the number of pairs before the next
one. What its iterator says of its own state only shortens the way to a position.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.errors import check_same_tree, warn_user
from gradhpo.state import is_key

ACCEPTED = (
    "an iterable of (train_batch, val_batch) pairs, or a function of a NumPy generator, or of none "
    "(it may also take `start`) that returns one"
)
MARK_PAIRS = 16
"""Pairs between two notes of an iterator's state, while it is read ahead."""
Seed: TypeAlias = tuple[int, ...]
"""Of a stream; empty where all runs or slots have the same."""
Saved: TypeAlias = dict[str, Any]
"""Where a stream stands, as JSON: what shortens the way there, and proves that it is the same."""
Places: TypeAlias = list[tuple[Seed, Saved]]
"""Where streams stand."""


class Source:
    """What `Problem.batches` is.

    Args:
      batches: as in `Problem`.

    Raises:
      TypeError: if it is neither an iterable nor a function that takes what a source is given.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._function = callable(batches)
        self.own, self._starts = _takes(batches) if self._function else (False, False)
        if not self._function and not isinstance(batches, Iterable):
            raise TypeError(f"Problem.batches must be {ACCEPTED}, got {type(batches).__name__}")
        self._form: Form | None = None
        self._only: Stream | None = None
        """The stream of an iterator; or of another source that was opened to see a pair."""

    own: bool
    """Whether every trial has a stream of its own, seeded by its key, or all have the same."""

    @property
    def once(self) -> bool:
        """Whether it is an iterator, which is read on from where it stands."""
        return not self._function and isinstance(self._batches, Iterator)

    @property
    def reopens(self) -> bool:
        """Whether a position can be gone to again, in a new process too."""
        return not self.once or _has_state(self._batches)

    def shapes(self) -> Any:
        """Return the shapes of a pair, and leave an iterator with a state where it stands."""
        if not self.once:
            return self.form.shapes()
        state = self._batches.get_state()
        shapes = self.form.shapes()
        self._batches.set_state(state)
        return shapes

    @property
    def form(self) -> Form:
        """What every pair looks like, from one that is read for it.

        Raises:
          ValueError: if there is none.
        """
        if self._form is None:
            # An iterator's pair stays where it is, and is read by the run.
            if not self._peek().ahead(1):
                raise ValueError("Problem.batches is empty: no step was taken")
            assert self._form is not None
        return self._form

    def _peek(self) -> Stream:
        if self._only is None:
            self._only = Stream(self, self._batches, None) if self.once else self.open([0], 0)
        return self._only

    def open(self, seed: Sequence[int], position: int, saved: Saved | None = None) -> Stream:
        """Return the stream of this seed from a position on, the number of pairs before it.

        Args:
          seed: of the generator, where the source takes one.
          position: pairs that come before.
          saved: what `Stream.save` gave at that position or before it.

        Raises:
          ValueError: for an iterator that stands elsewhere, or if the source does not give the
            pairs any more that were read before.
        """
        saved = saved or {}
        if self.once:
            return self._stand(position, saved)
        if self._only is not None and not (self.own or position or saved):
            stream, self._only = self._only, None
            return stream
        pairs = self._begin(seed, position)
        if self._starts:
            return Stream(self, pairs, position)
        try:
            at = _set_state(pairs, position, saved) or 0
        except Exception as error:  # what it is made of has another name than before, perhaps
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            warn_user(
                "the iterator of Problem.batches refuses the state that it was in "
                f"({why}); the {position} pairs before are read again",
                RuntimeWarning,
            )
            pairs, at = self._begin(seed, position), 0
        stream = Stream(self, pairs, at, saved.get("first"))
        stream.skip(position - at)
        return stream

    def _begin(self, seed: Sequence[int], position: int) -> Iterator[Any]:
        if not self._function:
            return iter(self._batches)
        given = [np.random.default_rng(list(seed))] if self.own else []
        return iter(self._batches(*given, **({"start": position} if self._starts else {})))

    def _stand(self, position: int, saved: Saved) -> Stream:
        if (stream := self._only) is None:
            at = _set_state(self._batches, position, saved)
            at = position if at is None else at
            stream = self._only = Stream(self, self._batches, at)
            stream.skip(position - at)
        elif stream.position is None:
            stream.position = position
        elif stream.position != position:
            raise ValueError(
                f"Problem.batches is an iterator that stands before pair {stream.position}, and "
                f"pair {position} is needed, which it cannot go to: give the iterable that it was "
                "made from, or a function that makes it"
            )
        return stream

    def read(self, stream: Stream, pair: Any) -> Any:
        """Return a pair as NumPy arrays of its own, after a check that it is like the others."""
        number = stream.read
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = f"{type(pair).__name__} at index {number}"
            raise TypeError(f"Problem.batches must give (train_batch, val_batch) pairs, got {got}")
        if self._form is None:
            self._form = Form(tuple(pair), number)
        return self._form.take(tuple(pair), number)


class Form:
    """The structure, shapes and dtypes of every pair of a source, and which leaves are PRNG keys.

    Args:
      pair: the first one that was read.
      number: its number.
    """

    def __init__(self, pair: tuple[Any, Any], number: int) -> None:
        self.pair: Any = jax.tree.map(_on_host, pair)
        """That pair; of keys, the numbers."""
        self.kinds: Any = jax.tree.map(_kind_of_key, pair)
        """For each leaf the kind of PRNG key that it is, "" for none."""
        self._name = f"pair {number}"

    @property
    def nbytes(self) -> int:
        """Bytes of a pair."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.pair))

    def take(self, pair: tuple[Any, Any], number: int) -> Any:
        """Return copies of a pair's arrays.

        Raises:
          ValueError, TypeError: if it has another form.
        """
        arrays = jax.tree.map(_on_host, pair)
        try:
            check_same_tree(f"Problem.batches: pair {number}", arrays, self._name, self.pair)
        except ValueError as error:
            error.add_note(
                "a loader's last batch may be smaller: drop it (drop_last, drop_remainder)"
            )
            raise
        return arrays

    def shapes(self, *leading: int) -> Any:
        """Return the shapes of a stack of pairs with these leading axes, keys being typed."""

        def stacked(leaf: np.ndarray, kind: str) -> jax.ShapeDtypeStruct:
            def make() -> jax.Array:
                dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
                return self._typed(jnp.zeros((*leading, *leaf.shape), dtype), kind)

            return jax.eval_shape(make)

        return jax.tree.map(stacked, self.pair, self.kinds)

    def on_device(self, stack: Any, put: Callable[[Any], Any]) -> Any:
        """Return a stack of pairs, placed by `put`, its keys typed."""
        return jax.tree.map(lambda x, kind: self._typed(put(x), kind), stack, self.kinds)

    @staticmethod
    def _typed(array: jax.Array, kind: str) -> jax.Array:
        return jax.random.wrap_key_data(array, impl=kind) if kind else array


class Stream:
    """Pairs in order, from a position on; some may be read ahead.

    Args:
      source: whose pairs these are.
      pairs: an iterator of them.
      position: how many come before; None while that is not known.
      first: the digest of the source's first pair when it was read before.
    """

    def __init__(
        self, source: Source, pairs: Any, position: int | None, first: str | None = None
    ) -> None:
        self._source, self._pairs, self._first = source, pairs, first
        self.position = position
        """Pairs that were taken, those before the stream was opened included."""
        self._ahead: collections.deque[Any] = collections.deque()
        self._marks: collections.deque[Saved] = collections.deque()
        self._error: Exception | None = None

    @property
    def read(self) -> int:
        """The number of the next pair that is read."""
        return (self.position or 0) + len(self._ahead)

    @property
    def there(self) -> int:
        """How many pairs were read ahead."""
        return len(self._ahead)

    def ahead(self, wanted: int) -> int:
        """Read until so many pairs are there, untaken; return how many are.

        What the reader raises is raised when a pair is wanted that it did not give.
        """
        lacking = wanted - len(self._ahead)
        if lacking > 0 and self._error is None:
            try:
                self._mark()
                for pair in itertools.islice(self._pairs, lacking):
                    arrays = self._source.read(self, pair)
                    if self.read == 0 and not self._source.once:
                        self._check_first(arrays)
                    self._ahead.append(arrays)
            except Exception as error:
                self._error = error
        if self._error is not None and len(self._ahead) < wanted:
            raise self._error
        return min(wanted, len(self._ahead))

    def take(self, wanted: int) -> list[Any]:
        """Return the next pairs; fewer where the stream ends."""
        there = self.ahead(wanted)
        self.position = (self.position or 0) + there
        return [self._ahead.popleft() for _ in range(there)]

    def peek(self, wanted: int) -> list[Any]:
        """Return the next pairs, and leave them there."""
        return list(itertools.islice(self._ahead, self.ahead(wanted)))

    def skip(self, pairs: int) -> None:
        """Leave out pairs."""
        if pairs and self.position == 0 and self.ahead(1):  # see that it is the same source
            self.take(1)
            pairs -= 1
        self.position = (self.position or 0) + sum(1 for _ in itertools.islice(self._pairs, pairs))

    def save(self) -> Saved:
        """Return what leads back here, or a little before, without reading all that came before."""
        if not self._ahead:
            self._mark()
        while len(self._marks) > 1 and self._marks[1]["at"] <= self.position:
            self._marks.popleft()
        mark = self._marks[0] if self._marks else {}
        return {**mark, **({} if self._first is None else {"first": self._first})}

    def _mark(self) -> None:
        """Note the iterator's state, if nothing is read ahead or the last note is a while ago."""
        if self.position is None or not _has_state(self._pairs):
            return
        if not self._ahead:
            self._marks.clear()
        elif self._marks and self.read - self._marks[-1]["at"] < MARK_PAIRS:
            return
        self._marks.append({"at": self.read, "state": _as_json(self._pairs.get_state())})

    def _check_first(self, pair: Any) -> None:
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(pair):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        found = digest.hexdigest()[:16]
        if self._first is not None and found != self._first:
            raise ValueError(
                "Problem.batches does not give the pairs again that it gave before: its first pair "
                "differs. Let it depend on nothing but the generator that it is given, or on a "
                "seed of its own (a loader that shuffles is to be made anew, with its seed)"
            )
        self._first = found


def check_once(batches: Any) -> None:
    """Raise if batches are an iterator, where they have to be read from a beginning again.

    Raises:
      ValueError: if so.
    """
    if batches is not None and Source(batches).once:
        raise ValueError(
            f"Problem.batches is an iterator ({type(batches).__name__}), which a sweep cannot read "
            "again after a failure: give the iterable that it was made from (a list, a loader, a "
            "dataset), or a function that makes it"
        )


def seeds_of(keys: jax.Array) -> np.ndarray:
    """Return the seed of each key's stream, uint32 `(n, numbers)`; of one key `(1, numbers)`."""
    numbers = np.asarray(jax.random.key_data(keys))
    return numbers.reshape(-1, numbers.shape[-1])


def encode(places: Places) -> bytes | None:
    """Return places as bytes; None if they say nothing."""
    told = [[seed, saved] for seed, saved in places if saved]
    return json.dumps(told).encode() if told else None


def decode(data_state: bytes | None) -> Places:
    """Return what `encode` was given.

    Raises:
      ValueError: if it is something else.
    """
    if data_state is None:
        return []
    try:
        return [(tuple(seed), dict(saved)) for seed, saved in json.loads(data_state)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"data_state is not one of gradhpo: {error}") from None


def _takes(function: Callable[..., Any]) -> tuple[bool, bool]:
    """Return whether a function takes a generator, and whether it takes `start`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a function of C, which does not say
        return True, False
    starts = any(p.name == "start" for p in parameters)
    others = [p for p in parameters if p.name != "start" and p.kind is not p.VAR_KEYWORD]
    asked = [p for p in others if p.default is p.empty or p.name == "rng"]
    if len(asked) > 1 or any(p.kind is p.KEYWORD_ONLY for p in asked):
        names = ", ".join(p.name for p in parameters)
        raise TypeError(f"Problem.batches must be {ACCEPTED}, got a function of ({names})")
    return bool(asked), starts


def _has_state(pairs: Any) -> bool:
    return hasattr(pairs, "get_state") and hasattr(pairs, "set_state")


def _set_state(pairs: Any, position: int, saved: Saved) -> int | None:
    """Go to a saved state, if that helps on the way to a position; return where that is."""
    if not _has_state(pairs) or not 0 <= saved.get("at", -1) <= position:
        return None
    pairs.set_state(_from_json(saved["state"]))
    return saved["at"]


def _as_json(state: Any) -> Any:
    """Return a state as JSON: bytes (Grain's `DataLoader`), or numbers, texts, lists and tables."""
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    try:
        return {"json": json.loads(json.dumps(state, default=lambda number: number.item()))}
    except (AttributeError, TypeError, ValueError):
        got = type(state).__name__
        raise TypeError(
            "get_state of the iterator of Problem.batches must return bytes or what JSON can hold, "
            f"got {got}"
        ) from None


def _from_json(state: Any) -> Any:
    return base64.b64decode(state["bytes"]) if "bytes" in state else state["json"]


def _kind_of_key(leaf: Any) -> str:
    """Return the implementation of a typed PRNG key, "" for anything else."""
    return str(jax.random.key_impl(leaf)) if is_key(leaf) else ""


def _on_host(leaf: Any) -> np.ndarray:
    """Return a copy, since its owner may use the buffer again; of a typed key, its numbers."""
    if _kind_of_key(leaf):
        leaf = jax.random.key_data(leaf)
    elif hasattr(leaf, "numpy"):  # a tensor of PyTorch or TensorFlow
        leaf = leaf.numpy()
    return np.array(leaf)

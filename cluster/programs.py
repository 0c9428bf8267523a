"""What a storage says of its programs: their layout, what they compute, and on what data."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from gradhpo._version import __version__
from gradhpo.cluster import manifest
from gradhpo.cluster.events import Changed, Event, Note, Repaired
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.orders import Prepared
from gradhpo.cluster.storage import Storage
from gradhpo.files import Unreachable, Where

Entry = dict[str, Any]
"""Of a variant: its "batching", the step "key", the checksum of its "data", its "changes", the
"identity" of the sweep with the "order" of its space, and the version of "gradhpo"."""


def read(storage: Where) -> list[Entry] | None:
    """Return what an earlier run wrote of each variant; None before the first generation.

    Raises:
      SweepError: if it is missing or damaged.
    """
    text = Storage(storage).programs
    if not Storage(storage).begun:
        return None
    try:
        entries = json.loads(text.read_text())
        if not entries or any("batching" not in entry for entry in entries):
            raise ValueError("it names no layout")
        return entries
    except Unreachable:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise SweepError(
            f"{text}, which says how the sweep's programs are laid out, is missing or damaged "
            f"({error})"
        ) from None


def recovered(storage: Where, tell: Callable[[Event], None]) -> list[Entry] | None:
    """Return the same; where it is damaged, make it again from what the manifest says.

    Raises:
      SweepError: if it cannot be.
    """
    try:
        return read(storage)
    except SweepError as damaged:
        known = manifest.read(storage)
        copied, batching = known.get("programs"), known["batching"]
        if copied is not None:
            files = Storage(storage)
            manifest.write(files.programs, copied)
            tell(Repaired(f"{damaged}: it is made again from {files.manifest.name}"))
            return copied
        if batching == "auto":  # it was measured once, and may come out otherwise
            raise SweepError(f"{damaged}: without it the sweep cannot go on as it began") from None
        tell(
            Repaired(
                f"{damaged}: it is made again; whether code and data are those with which the "
                "sweep began cannot be checked"
            )
        )
        return [{"batching": batching}] * len(_variants(known))


def keep(
    storage: Where,
    known: Sequence[Entry] | None,
    prepared: Sequence[Prepared],
    generation: int,
    allowed: Collection[str],
    renamed: Collection[str],
    mine: Mapping[str, Any],
    tell: Callable[[Event], None],
) -> list[Entry]:
    """See that workers compiled what an earlier run did, on its data; write what they did.

    Args:
      storage: the sweep's.
      known: from `recovered`.
      prepared: of each variant that is needed; what is known of others stays.
      generation: the next one that is computed.
      allowed: what may have changed: "data", "code", "mesh".
      renamed: what of it has, by its name in the manifest.
      mine: this run's manifest.
      tell: takes events.

    Raises:
      SweepError: if something else changed.
    """
    its = manifest.digest(mine)
    order = manifest.order(mine)
    more = {"identity": its, "order": order, "gradhpo": __version__}
    about = ({"batching": p.batching, "key": p.key, "data": p.data} for p in prepared)
    fresh: list[Entry] = json.loads(json.dumps([{**entry, **more} for entry in about]))
    made: dict[int, Entry] = {
        n: {**old, "identity": its, "order": order} for n, old in enumerate(known or [])
    }
    made |= zip((p.variant for p in prepared), fresh, strict=True)
    began = manifest.read(storage).get("gradhpo")
    changed: set[str] = set()
    pairs = [] if known is None else zip((known[p.variant] for p in prepared), fresh, strict=True)
    for old, new in pairs:
        what = dict.fromkeys(sorted(renamed), "its name")
        what |= _changes({"gradhpo": began, **old}, new, tell, "mesh" in renamed)
        if refused := [name for name in what if name not in allowed]:
            raise SweepError(_refusal(storage, refused, what))
        new["changes"] = [*old.get("changes", []), *([generation, name] for name in what)]
        changed |= what.keys()
    for name in sorted(changed):
        tell(Changed(name, generation))
    entries = [made[number] for number in sorted(made)]
    if entries != known:
        manifest.write(Storage(storage).programs, entries)
    written = manifest.read(storage)
    further = mine["generations"] > written["generations"]
    if written.get("programs") != entries or renamed or further:
        total = max(mine["generations"], written["generations"])
        about = {**(mine if renamed or further else written), "generations": total}
        manifest.write(Storage(storage).manifest, about | {"programs": entries})
    return entries


def _changes(
    old: Entry, new: Entry, tell: Callable[[Event], None], elsewise: bool
) -> dict[str, str]:
    """Return what changed, each with how it shows; tell what may change the last bits alone.

    Programs of another mesh are others, whatever the code: `elsewise`.
    """
    if "key" not in old:
        return {}
    what: dict[str, str] = {}
    was, now = old["gradhpo"], new["gradhpo"]
    differing = [name for name in new["key"] if new["key"][name] != old["key"].get(name)]
    computed = [name for name in differing if name in ("computation", "shapes")]
    elsewhere = [name for name in differing if name not in computed]
    if computed and "jax" not in differing and was == now and not elsewise:
        # An axis of the mesh that has no size takes all devices that there are.
        what["mesh" if "devices" in differing else "code"] = ", ".join(computed)
    bits = "the last bits of results may differ from an undisturbed run's"
    for name in elsewhere:
        tell(Note(f"{name} was {old['key'].get(name)} and is {new['key'][name]}: {bits}"))
    if elsewise:
        tell(Note(f"the mesh is another one, whose programs are others: {bits}"))
    if computed and was != now:
        tell(
            Note(
                f"gradhpo was {was} and is {now}, whose programs are others: {bits}. Whether the "
                "problem and the optimizer compute what they did cannot be told"
            )
        )
    if not old.get("data"):
        tell(Note("no checksum of the data was saved so far: from now on it is compared"))
    elif old["data"] != new["data"] and not elsewhere:
        what["data"] = "the checksum of Problem.data's arrays"
    elif old["data"] != new["data"]:
        tell(Note(f"the data are not those of before, to the bit; nor is {', '.join(elsewhere)}"))
    return what


def _refusal(storage: Where, refused: Sequence[str], what: Mapping[str, str]) -> str:
    said = {
        "code": "the problem or the optimizer computes something else than when the sweep in "
        f"{storage} began",
        "data": f"the data are others than when the sweep in {storage} began",
        "mesh": "the mesh has another number of devices than when the sweep in "
        f'{storage} began, since its "data" has no size',
    }
    told = ", and ".join(f"{said[name]} ({what[name]} differ)" for name in refused)
    names = ", ".join(f'"{name}"' for name in refused)
    return (
        f"{told}: restore the {' and the '.join(refused)}, give another storage, or allow it by "
        f"name, allow_changed=({names},)"
    )


def _variants(known: Mapping[str, Any]) -> list[Any]:
    return manifest.space(known).variants()

"""How a population is divided into shards: part of what the numbers depend on."""

from __future__ import annotations

from gradhpo.cluster.plan import Layout
from gradhpo.cluster.settings import Identity


def divide(identity: Identity, workers: int, known: int | None = None) -> Layout:
    """Return which slots belong to which shard.

    Args:
      identity: the sweep's; its `shards` decides where it is given.
      workers: for how many there are shards at least, by default.
      known: shards with which a storage began: another number of workers keeps them.

    Raises:
      ValueError: if the population cannot be divided so.
    """
    population, variants = identity.population, len(identity.space.variants())
    if population % variants:
        raise ValueError(
            f"population must be a multiple of the {variants} combinations of choices, got "
            f"{population}"
        )
    shards = identity.shards or known
    if shards is None:
        shards = variants * max(1, -(-workers // variants))
        while population % shards and shards < population:
            shards += variants
    if shards % variants or population % shards:
        raise ValueError(
            f"shards must divide the population of {population}, and be a multiple of the "
            f"{variants} combinations of choices; got {shards}"
        )
    races = identity.space.race is not None
    layout = Layout(variants, shards, population // shards, races)
    trial = (identity.mesh or {}).get("trial", 1)
    if layout.slots % trial:
        raise ValueError(f"mesh: {layout.slots} slots of a shard do not divide over trial={trial}")
    return layout

"""What a driver does for each of very many workers and shards, and not for each pair of them."""

import random

from gradhpo import parts
from gradhpo.cluster.fleet import balanced
from gradhpo.cluster.storage import Storage


def by_definition(owner, shards, ready, most):
    """A shard stays where there is room; any other goes where the fewest are, the first of them."""
    made, moving = dict(owner), []
    load = {number: sum(made[s] == number for s in owner if s not in shards) for number in ready}
    for shard in shards:
        if load.get(owner.get(shard), most) < most:
            load[owner[shard]] += 1
        else:
            moving.append(shard)
    for shard in moving:
        made[shard] = min(ready, key=load.__getitem__)
        load[made[shard]] += 1
    return made


def test_shards_are_balanced_as_they_are_defined_to_be():
    rng = random.Random(0)
    for _ in range(300):
        ready = rng.sample(range(9), rng.randint(1, 5))
        owner = {shard: rng.randrange(9) for shard in range(12) if rng.random() < 0.7}
        shards = rng.sample(range(12), rng.randint(0, 12))
        most = rng.randint(0, 5)
        assert balanced(owner, shards, ready, most) == by_definition(owner, shards, ready, most)


def test_a_million_pairs_are_not_looked_at(tmp_path, monkeypatch):
    """Ten thousand shards on a thousand workers; checkpoints of a generation, all of them kept."""
    asked, is_of = [], parts.is_of
    monkeypatch.setattr(parts, "is_of", lambda *args: asked.append(1) or is_of(*args))
    made = balanced({}, range(10_000), range(1000), 10)
    assert all(list(made.values()).count(number) == 10 for number in (0, 499, 999))
    folder = tmp_path / "checkpoints/000003"
    folder.mkdir(parents=True)
    names = [f"checkpoints/000003/shard-{n:04d}-i1-0123456789abcdef.arrays" for n in range(300)]
    for name in names:
        (tmp_path / name).touch()
    Storage(tmp_path).prune(9, set(names[:200]))
    assert sorted(f"checkpoints/000003/{path.name}" for path in folder.iterdir()) == names[:200]
    assert len(asked) == len(names)

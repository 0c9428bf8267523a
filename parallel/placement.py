"""Where a population's arrays lie: slots over "trial", and a trial's own arrays by rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_map_with_path

from gradhpo.parallel.rules import Rules
from gradhpo.state import PyTree, is_key


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a population lie on a mesh."""

    mesh: Mesh
    sharded: bool
    """Whether slots are divided over the mesh axis "trial"."""
    rules: Rules | None = None
    """What divides the arrays of each trial."""

    @property
    def slots(self) -> NamedSharding:
        """Of arrays with a leading slot axis, which are divided along no other."""
        return NamedSharding(self.mesh, P("trial") if self.sharded else P())

    @property
    def shared(self) -> NamedSharding:
        """Of arrays that all slots share."""
        return NamedSharding(self.mesh, P())

    def of_state(self, state: PyTree, below: str = "") -> PyTree:
        """Return where each array of a state lies, all with a slot axis.

        Args:
          state: or a part of it; shapes are enough.
          below: the path of the part.
        """
        return tree_map_with_path(lambda path, x: self.of_leaf(below + keystr(path), x), state)

    def of_leaf(self, path: str, leaf: Any) -> NamedSharding:
        """Return where an array of the state lies, by its path.

        Raises:
          ValueError: if a rule divides it over "trial", or as it cannot be divided.
        """
        if self.rules is None or is_key(leaf):
            return self.slots
        spec = self.rules(path, jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype))
        named = [axis for one in spec for axis in (one if isinstance(one, tuple) else (one,))]
        if "trial" in named:
            raise ValueError(f'rules must not divide {path} over "trial", which divides slots')
        return NamedSharding(self.mesh, P("trial" if self.sharded else None, *spec))

"""What can go wrong with a sweep beside its files, which `DamagedFile` names."""


class SweepError(RuntimeError):
    """The sweep cannot go on; what is saved stays, and a resumed sweep continues from it."""


class StorageFailed(OSError):  # noqa: N818
    """A checkpoint cannot be written: a full disk, say."""


class StateGone(RuntimeError):  # noqa: N818
    """Nobody holds a shard's state any more that is in no checkpoint: it is computed again."""


class Superseded(RuntimeError):  # noqa: N818
    """This worker's shard belongs to a later incarnation; what it computed is not used."""

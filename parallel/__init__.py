"""Many devices and many trials in one process: sharded steps and batched populations.

Imported as `gradhpo.parallel`. Nothing is exported yet.
"""

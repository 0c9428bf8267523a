"""Many processes and hosts: sweeps of populations driven by Ray.

Imported as `gradhpo.cluster`; needs the `cluster` extra. Nothing is exported yet.
"""

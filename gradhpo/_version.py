"""The version, alone in a file, so that building the package does not import JAX."""

__version__ = "0.3.0"
"""The version, as `pip` knows it."""

"""Which cases of a test `make quick` takes: the first line of defence; `make test` takes all."""

import pytest


def slow_but(cases, *quick):
    """Return the cases of a parametrization, all but those in `quick` marked as slow."""
    cases = list(cases)
    assert all(case in cases for case in quick), f"{quick} are not all among the cases"

    def marked(case):
        values = case if type(case) is tuple else (case,)  # an optax optimizer is a NamedTuple
        return pytest.param(*values, marks=pytest.mark.slow)

    return [case if case in quick else marked(case) for case in cases]

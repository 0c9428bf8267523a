"""Which cases of a test `make quick` takes, and which of them take XLA as users do."""

import pytest


def slow_but(cases, *quick, compiler=()):
    """Return the cases of a parametrization, all but those in `quick` marked as slow.

    Those in `compiler` are compiled at XLA's full effort by `make test`, which costs five times as
    much: where all cases are to be equal to the bit, some stand for the others.
    """
    cases = list(cases)
    for some in (quick, compiler):
        assert all(case in cases for case in some), f"{some} are not all among the cases"

    def marked(case):
        marks = [pytest.mark.slow] if case not in quick else []
        marks += [pytest.mark.compiler] if case in compiler else []
        values = case if type(case) is tuple else (case,)  # an optax optimizer is a NamedTuple
        return pytest.param(*values, marks=marks) if marks else case

    return [marked(case) for case in cases]

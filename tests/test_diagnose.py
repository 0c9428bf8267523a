"""diagnose against closed forms, in float64, and what it refuses."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo.diagnose import NAMED, _named
from gradhpo.diagnosis import Row
from gradhpo.flops import flops
from gradhpo.horizon import estimate_at, fresh_state
from gradhpo.in_code import in_code
from gradhpo.regime import Regime, noise
from tests.small import BATCH, start, train_loss, val_loss

KEY = jax.random.key(0)
INNER = optax.sgd(0.1)


def quadratic_train(w, lam, batch):
    return 0.5 * jnp.sum(jnp.asarray([1.0, 0.5]) * (w - lam - batch) ** 2)


def quadratic_val(w, lam, batch):
    return jnp.sum(w**2) + 0.5 * jnp.sum(lam**2)


def draw(key):
    return jax.random.normal(key, (2,)), jnp.zeros(())


QUADRATIC = gradhpo.Problem(
    lambda key: (jnp.asarray([2.0, -1.0]), jnp.asarray([1.0, 1.0])),
    quadratic_train,
    quadratic_val,
    draw,
)
SMALL = gradhpo.Problem(start, train_loss, val_loss, lambda key: (BATCH, BATCH))


def state_of(problem, inner=INNER):
    return gradhpo.FOOptimizer(inner).init(*problem.start(KEY))


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_quadratic_in_closed_form():
    T, G = 7, np.asarray([1.0, 0.5])
    methods = ("first-order", "one-step", "t1t2", "drmad", "implicit", "unrolled")
    settings = {"inner_optimizer": INNER, "methods": methods, "samples": 3, "rounds": 0}
    found = gradhpo.diagnose(QUADRATIC, state_of(QUADRATIC), KEY, horizon=T, **settings)
    # dw_T/dλ = I - (I - ηG)^T, whatever the batches; One-Step has ηG, k unrolled steps the power k.
    data = [
        jax.random.split(jax.random.fold_in(gradhpo.problem.stream(KEY, "diagnosis"), i), 2 * T)
        for i in range(3)
    ]
    exacts = []
    for i, keys in enumerate(data):
        w, lam = np.asarray([2.0, -1.0]), np.ones(2)
        for key in keys[:T]:
            w = w - 0.1 * G * (w - lam - np.asarray(draw(key)[0]))
        gradients = {"exact": lam + (1 - (1 - 0.1 * G) ** T) * 2 * w}
        for name, k in (("one-step", 1), ("t1t2", 1), ("unrolled 2", 2), ("unrolled 5", 5)):
            gradients[name] = lam + (1 - (1 - 0.1 * G) ** k) * 2 * w
        exact = gradients["exact"]
        exacts.append(exact)
        for name, g in gradients.items():
            row = found.row(name)
            norms = np.linalg.norm(g), np.linalg.norm(exact)
            np.testing.assert_allclose(row.cosine[i], g @ exact / np.prod(norms), rtol=1e-6)
            np.testing.assert_allclose(row.norm_ratio[i], norms[0] / norms[1], rtol=1e-6)
            second = np.linalg.norm(g - lam)
            share = second / (second + np.linalg.norm(lam))
            np.testing.assert_allclose(row.second_order[i], share, rtol=1e-6)
    np.testing.assert_allclose(found.exact.cosine, 1, rtol=1e-12)
    np.testing.assert_allclose(found.exact.norm_ratio, 1, rtol=1e-12)
    assert found.row("first-order").second_order.tolist() == [0, 0, 0]
    np.testing.assert_allclose(found.exact.noise, noise(exacts), rtol=1e-6)
    # The weights are linear in λ, and the loss nearly so over a step of 0.01.
    np.testing.assert_allclose(found.regime.smoothness, np.ones((3, 2 * T)), rtol=1e-6)
    np.testing.assert_allclose(
        found.regime.promised, [-0.01 * g @ g / np.abs(g).max() for g in exacts], rtol=1e-6
    )
    assert 0.9 < found.regime.kept < 1.1
    # Its ridge is one over T rates of 0.1; the last two are the notes of the two solvers.
    assert all(note.endswith("damping=1.43.") for note in found.notes[-2:])
    np.testing.assert_allclose(found.row("drmad").cosine, 1, rtol=1e-12)  # A does not depend on w


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_an_online_method_walks_as_in_a_run():
    """The estimate at the end is that of T steps of `step` with a rate of 0 on λ."""
    optimizer = gradhpo.OnlineHypergradientOptimizer(optax.sgd(0.1, momentum=0.9), gamma=0.8, T=4)
    state = optimizer.init(*QUADRATIC.start(KEY))
    before = gradhpo.FOOptimizer(optax.sgd(0.1, momentum=0.9)).init(*QUADRATIC.start(KEY))
    losses, batches = (quadratic_train, quadratic_val), jax.random.normal(KEY, (4, 2))
    for batch in batches[:3]:
        state = optimizer.step(state, batch, 0.0, *losses, lr_hyper=0.0)
    expected = optimizer.compute_hypergradient(state, batches[3], 0.0, *losses)
    own = fresh_state(optimizer, before)
    got = estimate_at(optimizer, own, gradhpo.Task(batches, 0.0, *losses)).hypergradient
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.slow
def test_where_there_is_no_second_order_term_first_order_is_recommended():
    problem = dataclasses.replace(
        QUADRATIC, val_loss=lambda w, lam, batch: 1e-6 * jnp.sum(w) + jnp.sum(lam**2)
    )
    methods = ("first-order", "one-step", "greedy")
    settings = {"inner_optimizer": INNER, "methods": methods, "samples": 2, "rounds": 0}
    found = gradhpo.diagnose(problem, state_of(problem), KEY, horizon=4, **settings)
    assert found.recommended.name == "first-order"
    assert "second-order term" in found.recommendation


@pytest.mark.slow
def test_a_method_that_cannot_see_lambda_is_left_out_with_its_reason():
    problem = dataclasses.replace(
        QUADRATIC,
        init=lambda key: (jnp.ones(2), {"log_rate": jnp.asarray(-2.0)}),
        train_loss=lambda w, lam, batch: jnp.sum((w - batch) ** 2),
        val_loss=lambda w, lam, batch: jnp.sum(w**4),
    )

    def inner(lam):
        return optax.sgd(jnp.exp(lam["log_rate"]))

    found = gradhpo.diagnose(
        problem,
        state_of(problem, inner),
        KEY,
        inner_optimizer=inner,
        methods=["one-step", "implicit"],
        horizon=3,
        samples=2,
        rounds=0,
    )
    assert [row.name for row in found.rows] == ["one-step"]
    for name, note in zip(("implicit cg", "implicit nystrom"), found.notes, strict=True):
        assert note.startswith(f"{name} is left out:")
        assert "log_rate" in note


@pytest.mark.slow
def test_costs_the_table_and_the_figure(tmp_path, capsys):
    found = gradhpo.diagnose(
        SMALL,
        state_of(SMALL),
        KEY,
        inner_optimizer=INNER,
        methods=["one-step"],
        horizon=10,
        samples=2,
        rounds=2,
    )
    names = ["one-step", "exact"]
    for name in names:
        row = found.row(name)
        assert row.time.shape == (2,)
        assert np.all(row.time > 0)
        assert row.flops > 1  # training alone is part of each
    assert found.row("exact").flops > found.row("one-step").flops * 0.5
    found.show()
    shown = capsys.readouterr().out
    assert "…" not in shown, "a column was cut"
    for name in (*names, "Recommended"):
        assert name.split()[0] in shown
        assert name in str(found)
    path = tmp_path / "figure.png"
    found.plot(path)
    assert path.stat().st_size > 5_000
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert found.plot(axes) is axes
    assert len(axes.get_legend().get_texts()) == 2
    with pytest.raises(KeyError, match="one-step"):
        found.row("two-step")


@pytest.mark.slow
def test_quick_compares_four_and_tells_how_long_it_takes(capsys):
    settings = {"inner_optimizer": INNER, "horizon": 10, "samples": 1, "rounds": 0}
    found = gradhpo.diagnose(SMALL, state_of(SMALL), KEY, methods="quick", **settings)
    names = ["first-order", "one-step", "t1t2", "hyperdistill γ=0.9"]
    assert [row.name for row in found.rows] == names
    # On a slow machine there are signs of life between.
    told = [line for line in capsys.readouterr().err.splitlines() if "by now" not in line]
    alone = r"diagnose: training alone, [\d.]+ s; T = 10 steps, 4 methods .* may take \d+ s"
    assert re.fullmatch(alone, told[0])
    exact = r"diagnose: the exact .* took [\d.]+ s; 4 methods more, about \d+ s"
    assert re.fullmatch(exact, told[1])
    assert [re.fullmatch(r"diagnose: (.*), [\d.]+ s", line)[1] for line in told[2:]] == names


@pytest.mark.slow
def test_methods_that_draw_or_need_many_steps_are_compared_where_asked():
    settings = {"inner_optimizer": INNER, "horizon": 10, "samples": 2, "rounds": 0}
    names = ["pes", "forward-gradient", "soba", "masoba", "f2sa"]
    found = gradhpo.diagnose(SMALL, state_of(SMALL), KEY, methods=names, progress=False, **settings)
    assert not found.notes
    assert [row.name for row in found.rows] == names
    assert [row.aligned for row in found.rows[:2]] == [True, True]
    assert len({*found.row("pes").cosine}) == 2  # each walk draws anew
    assert min(row.cosine.min() for row in found.rows[2:]) > 0.5


@pytest.mark.slow
def test_what_no_budget_is_left_for_is_said(capsys):
    settings = {"inner_optimizer": INNER, "horizon": 10, "samples": 1, "rounds": 0}
    found = gradhpo.diagnose(SMALL, state_of(SMALL), KEY, budget=0.0, progress=False, **settings)
    assert found.recommended.name == "exact"
    both = [f"{name} γ={gamma}" for name in ("greedy", "hyperdistill") for gamma in (0.9, 0.99)]
    names = ["first-order", "one-step", "t1t2", *both, "drmad", "implicit cg", "implicit nystrom"]
    truncated = ["unrolled 2", "unrolled 5"]
    assert found.notes == tuple(f"{n} is left out: budget=0 s" for n in [*names, *truncated])
    assert not capsys.readouterr().err


def row(name, cosine, cost, share=0.5, ratio=1.0):
    each = np.ones(3)
    return Row(name, cosine * each, ratio * each, share * each, cost * each, cost)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("a", 0.95, 3.0), row("b", 0.92, 2.0)], "b"),  # the cheapest that is aligned
        ([row("a", 0.95, 2.1), row("b", 0.92, 2.0)], "a"),  # as cheap, and nearer
        ([row("a", 0.5, 2.0), row("b", np.nan, 1.0)], "exact"),
        ([row("first-order", 0.2, 1.0), row("a", 0.99, 2.0)], "a"),
    ],
)
def test_the_rule_of_the_recommendation(rows, expected):
    found = gradhpo.Diagnosis(rows, row("exact", 1.0, 9.0), 10, 1e-3)
    assert found.recommended.name == expected
    assert found.recommendation.startswith(expected)


@pytest.mark.parametrize(
    ("smooth", "expected"), [(12, "a"), (9, "unrolled 5"), (5, "unrolled 5"), (1, "one-step")]
)
def test_no_horizon_is_recommended_in_which_training_is_chaotic(smooth, expected):
    names = ("a", "one-step", "unrolled 2", "unrolled 5")
    rows = [row(name, 0.95 if name == "a" else 0.1, 2.0) for name in names]
    steps = np.where(np.arange(20) < smooth, 1.0, 0.1) * np.ones((3, 1))
    losses = np.ones((3, 20, 3))
    regime = Regime(0.01, steps, losses, -np.ones(3), losses[..., 0], 0.0)
    found = gradhpo.Diagnosis(rows, row("exact", 1.0, 9.0), 10, 1e-3, regime=regime)
    assert found.recommended.name == expected
    assert f"Chaotic beyond {smooth} steps" in str(found)
    if expected != "a":
        told = f"training is chaotic along the hypergradient beyond {smooth} steps"
        assert found.recommendation == f"{expected}: {told}."


def test_where_a_step_gets_what_is_promised_chaos_of_the_weights_decides_nothing():
    rows = [row(name, 0.95, 2.0) for name in ("a", "unrolled 2")]
    steps = np.where(np.arange(20) < 3, 1.0, 0.1) * np.ones((3, 1))
    losses = np.asarray([1.0, 0.9, 0.8]) * np.ones((3, 20, 1))
    regime = Regime(0.01, steps, losses, np.full(3, -0.1), losses[..., 0], 0.0)
    found = gradhpo.Diagnosis(rows, row("exact", 1.0, 9.0), 10, 1e-3, regime=regime)
    assert found.recommendation.startswith("a: cosine 0.950")


@pytest.mark.parametrize("name", [*NAMED, "exact"])
def test_each_method_is_told_in_code_that_makes_it(name):
    made = {"exact": gradhpo.UnrolledOptimizer(INNER, unroll_steps=20)}
    made = made if name == "exact" else _named([name], INNER, None, (0.9, 0.99), 20)
    for own, optimizer in made.items():
        code = in_code(own, 20).split(", K and damping")[0].replace(', solver="nystrom"', "")
        told = eval(code, {"gradhpo": gradhpo, "inner_optimizer": INNER, "outer_optimizer": INNER})
        assert type(told) is type(optimizer)
        names = {field.name for field in dataclasses.fields(optimizer)}
        for field in names & {"unroll_steps", "gamma", "directions"}:
            assert getattr(told, field) == getattr(optimizer, field)
    assert in_code("a method of my own", 20) is None


def test_a_small_norm_is_said():
    found = gradhpo.Diagnosis([row("a", 0.95, 2.0, ratio=0.01)], row("exact", 1.0, 9.0), 10, 1e-3)
    assert "0.01 times" in found.recommendation


@pytest.mark.slow
def test_host_batches():
    batches = [(np.ones(2, np.float32) * i, np.zeros(())) for i in range(12)]
    problem = dataclasses.replace(QUADRATIC, batch=None, batches=batches)
    settings = {"inner_optimizer": INNER, "methods": ["one-step"], "horizon": 3, "rounds": 0}
    found = gradhpo.diagnose(problem, state_of(problem), KEY, samples=2, **settings)
    assert found.row("one-step").cosine.shape == (2,)
    with pytest.raises(ValueError, match="ended early"):
        gradhpo.diagnose(problem, state_of(problem), KEY, samples=3, **settings)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"horizon": 0}, ValueError, "horizon"),
        ({"samples": 1.5}, TypeError, "samples"),
        ({"rounds": -1}, ValueError, "rounds"),
        ({"outer_step": 0}, ValueError, "outer_step"),
        ({"budget": -1}, ValueError, "budget"),
        ({"gammas": (1.5,)}, ValueError, "gammas"),
        ({"methods": ("two-step",)}, ValueError, "two-step"),
        ({"methods": "greedy"}, TypeError, "methods"),
        ({"methods": {}}, ValueError, "inner_optimizer"),
        ({"inner_optimizer": None}, ValueError, "inner_optimizer"),
        ({"inner_optimizer": None, "methods": {}}, ValueError, "methods is empty"),
        (
            {
                "inner_optimizer": None,
                "methods": {
                    "a": gradhpo.FOOptimizer(INNER),
                    "b": gradhpo.FOOptimizer(optax.sgd(1.0)),
                },
            },
            ValueError,
            "another inner optimizer",
        ),
        (
            {
                "inner_optimizer": None,
                "methods": {"a": gradhpo.UnrolledOptimizer(INNER, unroll_steps=99)},
            },
            ValueError,
            "unrolls 99",
        ),
        ({"inner_optimizer": optax.adam(0.1)}, ValueError, "inner_opt_state"),
        ({"problem": None}, TypeError, "problem"),
        ({"state": None}, TypeError, "state"),
    ],
)
def test_what_is_refused_is_named(changes, error, match):
    settings = {"problem": QUADRATIC, "state": state_of(QUADRATIC), "key": KEY}
    settings |= {"inner_optimizer": INNER, "horizon": 3, "rounds": 0}
    with pytest.raises(error, match=match):
        gradhpo.diagnose(**(settings | changes))


def test_flops_count_a_loop_as_often_as_it_runs():
    def power(x, length):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, length=length)[0]

    x = jnp.ones((16, 16))
    one = flops(lambda x: x @ x, x)
    assert one == 2 * 16**3
    nested = flops(jax.jit(lambda x: power(power(x, 5), 2)), x)
    assert nested == pytest.approx(7 * one, rel=0.01)

"""PB2's pieces against closed forms: the kernel, the posterior, a batch of bounds."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor

from gradhpo.cluster import SearchSpace, categorical, integer, loguniform
from gradhpo.cluster.schedulers import PB2, Table, bandit, pb2
from gradhpo.cluster.schedulers import gaussian_process as gp

ELL, EPSILON, SIZE, NOISE = 0.3, 0.2, 1.7, 0.04


def points(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.random((n, 2)), rng.integers(0, 9, n)])


def made():
    """The kernel at known lengths."""
    theta = np.log([SIZE, ELL, gp.length_of(EPSILON), NOISE])
    return gp.kernel().clone_with_theta(theta)


def process_of(rows, rewards):
    """A process at these lengths, as if they had been fitted."""
    return GaussianProcessRegressor(made(), optimizer=None).fit(rows, rewards)


def closed_form(a, b):
    """(Bogunovic et al. 2016), without noise."""
    distance = ((a[:, None, :-1] - b[None, :, :-1]) ** 2).sum(2)
    apart = np.abs(a[:, None, -1] - b[None, :, -1])
    return SIZE * np.exp(-distance / (2 * ELL**2)) * (1 - EPSILON) ** (apart / 2)


def test_the_kernel_is_squared_exponential_in_settings_and_forgets_in_time():
    a, b = points(7), points(5, 1)
    np.testing.assert_allclose(made()(a, b), closed_form(a, b), rtol=1e-12)
    np.testing.assert_allclose(made()(a), closed_form(a, a) + NOISE * np.eye(7), rtol=1e-12)
    np.testing.assert_allclose(made().diag(a), np.full(7, SIZE + NOISE))


def test_the_kernels_gradient_is_its_derivative():
    kernel, rows, step = made(), points(6), 1e-6
    gradient = kernel(rows, eval_gradient=True)[1]
    for i in range(len(kernel.theta)):
        moved = np.eye(len(kernel.theta))[i] * step
        up, down = (kernel.clone_with_theta(kernel.theta + s * moved)(rows) for s in (1, -1))
        np.testing.assert_allclose(gradient[:, :, i], (up - down) / (2 * step), atol=1e-7)


def test_the_posterior_is_that_of_the_closed_form():
    rows, at, rewards = points(9), points(4, 1), np.random.default_rng(2).normal(size=9)
    process = process_of(rows, rewards)
    known = closed_form(rows, rows) + (NOISE + process.alpha) * np.eye(9)
    across = closed_form(at, rows)
    expected = closed_form(at, at) + NOISE * np.eye(4) - across @ np.linalg.solve(known, across.T)
    np.testing.assert_allclose(gp.covariance(process, rows, at), expected, rtol=1e-7, atol=1e-9)
    assert gp.noise(process) == pytest.approx(NOISE)
    mean = across @ np.linalg.solve(known, rewards)
    np.testing.assert_allclose(process.predict(at), mean, rtol=1e-7)


@pytest.mark.parametrize("kappa", [0.0, 3.0])
def test_a_batch_is_what_choosing_one_by_one_and_conditioning_gives(kappa):
    rows, at = points(8), points(30, 1)
    mean = np.random.default_rng(3).normal(size=30)
    process = process_of(rows, np.arange(8.0))
    chosen = bandit.batch(mean, gp.covariance(process, rows, at), NOISE, 4, kappa)
    known = rows
    for index in chosen:
        deviation = np.sqrt(gp.covariance(process, known, at).diagonal() - NOISE)
        assert np.argmax(mean + kappa * deviation) == index
        known = np.concatenate([known, at[index : index + 1]])
    assert (len(set(chosen.tolist())) == 1) == (kappa == 0)


SPACE = SearchSpace({"rate": loguniform(1e-3, 1), "k": integer(1, 8), "c": categorical([0, 1])})


def recorded(generations=5, n=24, seed=0):
    """Tables whose scores fall most at a rate of 0.1, and rise in the second category."""
    rng, tables = np.random.default_rng(seed), []
    score = np.full(n, 10.0)
    for generation in range(generations):
        values = {name: kind.sample(rng, n) for name, kind in SPACE.settings().items()}
        fell = np.exp(-2 * np.log10(values["rate"] / 0.1) ** 2) - values["c"]
        score = score - fell
        tables.append(
            Table(
                generation, score, np.arange(n), np.full(n, generation + 1), values, {},
                earlier=tables.__getitem__,
            )
        )  # fmt: skip
    return tables


def test_it_chooses_what_improved_the_score():
    table = recorded()[-1]
    scheduler = PB2(exploration=0.0, candidates=128)
    decision = scheduler(table, SPACE, np.random.default_rng(0))
    copies = decision.changes["rate"].mask
    assert copies.sum() == 6
    np.testing.assert_array_equal(copies, decision.parents != np.arange(24))
    assert (decision.changes["c"].add[copies] == 0).all()
    assert (np.abs(np.log10(decision.changes["rate"].add[copies] / 0.1)) < 0.3).all()


def test_the_same_seed_decides_the_same_whatever_the_number_of_threads():
    from threadpoolctl import threadpool_limits

    table, made = recorded()[-1], []
    for threads in (1, 2):
        with threadpool_limits(threads):
            made.append(PB2()(table, SPACE, np.random.default_rng(1)))
    np.testing.assert_array_equal(made[0].parents, made[1].parents)
    for name, change in made[0].changes.items():
        assert change.add.tobytes() == made[1].changes[name].add.tobytes()


def test_the_process_is_of_the_newest_rows_and_of_what_diverged_as_the_worst():
    tables = recorded()
    points, rewards = pb2.observed(tables[-1], SPACE, 30)
    assert points.shape == (30, 5)
    assert sorted(points[:, -1].tolist()) == [3] * 6 + [4] * 24
    np.testing.assert_allclose(rewards[:24], tables[3].score - tables[4].score)
    score = tables[4].score.copy()
    score[[2, 5]] = np.nan
    gone = Table(
        4, score, np.arange(24), np.full(24, 5), tables[4].values, {},
        earlier=tables.__getitem__,
    )  # fmt: skip
    rewards = pb2.observed(gone, SPACE, 24)[1]
    others = np.delete(tables[3].score - tables[4].score, [2, 5])
    np.testing.assert_array_equal(rewards[[2, 5]], others.min())
    few = pb2.observed(tables[0], SPACE, 30)
    assert len(few[0]) == len(few[1]) == 0


def test_rewards_are_clipped_and_equal_ones_stay_finite():
    assert pb2.standardized(np.asarray([0.0] * 50 + [1e9])).max() == pb2.CLIP
    assert not pb2.standardized(np.full(4, 7.0)).any()


def test_without_rows_settings_are_drawn_and_without_settings_slots_only_copy():
    table = recorded(1)[0]
    decision = PB2()(table, SPACE, np.random.default_rng(0))
    copies = decision.changes["rate"].mask
    assert copies.any()
    assert len(set(decision.changes["rate"].add[copies])) == copies.sum()
    assert PB2()(table, SearchSpace(), np.random.default_rng(0)).changes == {}


def test_what_is_not_installed_is_told_before_anything_starts(monkeypatch):
    from gradhpo.cluster.schedulers import written as schedulers
    from gradhpo.observers import packages

    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"PB2 needs scikit-learn.*gradhpo\[search\]"):
        schedulers.loaded(PB2())
    assert schedulers.parse({"name": "PB2", "rows": 64}) == PB2(rows=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantile": 0.6}, "PB2: quantile"),
        ({"rows": 3}, "PB2: rows"),
        ({"candidates": 0}, "PB2: candidates"),
        ({"exploration": -1}, "PB2: exploration"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PB2(**settings)

"""Warm starts: a first generation from points, from another sweep, from a seed of its own."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from gradhpo.cluster import SearchSpace, Sweep, choice, loguniform, points, uniform
from gradhpo.cluster.drawing import Drawing
from gradhpo.cluster.manifest import OLDER, digest
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.plan import Layout, Rules, first_plan
from gradhpo.cluster.settings import Identity, read
from tests.sweeps import SETTINGS, sweep

DIGEST = "fc711940a96cd8f8f0c39e8b7adf133572e26e437ea34cbb010657ffa20ab358"
"""Of the small sweep, as it was before there were points and samplers."""
SPACE = SearchSpace(
    {"a": uniform(-2, 3), "b": loguniform(1e-3, 1, stored="log"), "c": choice([1, 2, 4])},
    lr_hyper=loguniform(0.01, 1),
    choices={"method": ["x", "y"], "wide": [True, False]},
)


def first(drawing, seed=0, space=SPACE):
    layout = Layout(len(space.variants()), len(space.variants()), 3)
    rules = Rules(None, space, seed, Objectives({"loss": 1}), drawing)
    plan = first_plan(layout, rules)
    return {**{n: change.add for n, change in plan.changes.items()}, "lr_hyper": plan.lr_hyper}


def test_points_take_the_first_slots_that_fit_and_all_else_is_drawn_as_before():
    given = (
        {"a": 0.25, "method": "y"},  # the third population is the first with it
        {"b": 0.5, "lr_hyper": 0.125},
        {"c": 4, "method": "y", "wide": True},
        {"method": "y", "wide": False, "a": -1},
    )
    drawn, plain = first(Drawing(points=points.checked(given, SPACE))), first(Drawing())
    assert points.slots_of(given, SPACE, 12) == [6, 0, 7, 9]
    changed = {"a": {6: 0.25, 9: -1}, "b": {0: np.log(0.5)}, "c": {7: 4}, "lr_hyper": {0: 0.125}}
    for name, column in plain.items():
        expected = column.copy()
        for slot, number in changed[name].items():
            expected[slot] = number
        assert drawn[name].tobytes() == expected.tobytes(), name


def test_another_first_seed_is_another_first_generation():
    as_three, with_three = first(Drawing(), seed=3), first(Drawing(first_seed=3), seed=0)
    for name, column in as_three.items():
        assert with_three[name].tobytes() == column.tobytes()
        assert (column != first(Drawing())[name]).any()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ([{"rate": 1}], ValueError, r"points\[0\] has 'rate'; the space has 'a', 'b', 'c', 'lr_hy"),
        ([{}, {"a": 4}], ValueError, r"points\[1\]\['a'\] must be from -2 to 3, got 4"),
        ([{"b": -7}], ValueError, r"points\[0\]\['b'\] must be from 0.001 to 1, got -7"),
        ([{"c": 3}], ValueError, r"points\[0\]\['c'\] must be one of 1, 2, 4, got 3"),
        ([{"a": "low"}], TypeError, r"points\[0\]\['a'\] must be a number"),
        ([{"a": float("nan")}], ValueError, r"points\[0\]\['a'\] must be a number"),
        ([{"method": "z"}], ValueError, r"points\[0\]\['method'\] must be one of \['x', 'y'\]"),
        ([{"wide": 1}], ValueError, r"points\[0\]\['wide'\] must be one of \[True, False\], got 1"),
        ([3], TypeError, r"points\[0\] must be a dictionary or a sweep's trial, got 3"),
        ([], TypeError, "points must be a list of dictionaries"),
        ({"a": 1}, TypeError, "points must be a list of dictionaries"),
    ],
)
def test_points_are_checked_before_anything_starts(given, error, said):
    with pytest.raises(error, match=said):
        points.checked(given, SPACE)


def test_more_points_than_slots_are_refused():
    with pytest.raises(ValueError, match=r"points\[3\]: all 3 slots for it are taken"):
        points.slots_of([{"method": "x", "wide": True}] * 4, SPACE, 12)
    with pytest.raises(ValueError, match=r"points\[12\]: all 12 slots for it are taken"):
        sweep("a", points=[{"log_rate": 0.1}] * 13)


def test_trials_of_another_sweep_are_taken_to_the_spaces_edge():
    @dataclasses.dataclass
    class Trial:
        settings: dict
        choices: dict

    moved = Trial({"a": 7.0, "b": 1e-5, "c": 3.4}, {"method": "y"})
    assert points.checked([moved], SPACE) == ({"a": 3.0, "b": 1e-3, "c": 4.0, "method": "y"},)


def test_a_trial_at_several_generations_is_one_point():
    """As a front has it; what is given as numbers is taken as often as it is given."""
    trial = SimpleNamespace(settings={"rate": 0.1}, choices={})
    space = SearchSpace({"rate": uniform(0.0, 1.0)})
    assert points.checked([trial, trial, {"rate": 0.1}], space) == ({"rate": 0.1},) * 2


def test_they_are_part_of_what_a_sweep_is_and_of_its_toml(tmp_path):
    given = {"points": [{"log_rate": 0.25}, {}], "first_seed": 7}
    about = sweep("a", **given).identity.describe()
    assert json.loads(json.dumps(about)) == about
    assert {name: about[name] for name in ("points", "first_seed", "sampler")} == {
        **given, "sampler": None
    }  # fmt: skip
    known = {**OLDER, "x64": False, "data": None, **sweep("a").identity.describe()}
    assert digest(known) == DIGEST, "a sweep without them is the one that it was"
    assert digest({**known, **about}) != DIGEST
    path = tmp_path / "a.toml"
    text = [f'{name} = "{SETTINGS[name]}"' for name in ("problem", "optimizer")]
    text += ["population = 4", "generations = 1", "steps_per_generation = 1", 'storage = "a"']
    text += ['sampler = {name = "OptunaSampler", kind = "QMCSampler"}', "first_seed = 3"]
    text += ["points = [{rate = 0.5}, {rate = 0.25}]", 'metric = ["val_loss", "train_loss"]']
    text += ["[space.hyperparams]", "rate = {uniform = [0.0, 1.0]}"]
    path.write_text("\n".join(text))
    identity = Sweep.from_toml(path).identity
    assert identity.points == ({"rate": 0.5}, {"rate": 0.25})
    assert (identity.first_seed, identity.sampler.kind) == (3, "QMCSampler")
    assert identity.metric == {"val_loss": "min", "train_loss": "min"}
    written = {**identity.describe(), "storage": "a", "generations": 1}
    again = read({n: x for n, x in written.items() if x is not None}, "a")
    names = {field.name for field in dataclasses.fields(Identity)}
    assert Identity(**{n: x for n, x in again.items() if n in names}).describe() == (
        identity.describe()
    )
    path.write_text("\n".join(text).replace("first_seed = 3", "first_seed = -1"))
    with pytest.raises(ValueError, match="first_seed must be at least 0"):
        Sweep.from_toml(path)
    path.write_text("\n".join(text).replace("[{rate = 0.5}, {rate = 0.25}]", "{best = 3}"))
    with pytest.raises(ValueError, match="points must be a list of tables, or"):
        Sweep.from_toml(path)

"""Rules that say which arrays are divided over which axes of a mesh."""

import hashlib
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gradhpo.cluster import manifest, settings
from gradhpo.parallel import by_path, fully_sharded, make_mesh
from gradhpo.parallel.placement import Placement
from tests.sweeps import sweep


def shape(*sizes):
    """An array of this shape, without its numbers."""
    return jax.ShapeDtypeStruct(sizes, np.float32)


def test_a_mesh_has_further_axes_by_name():
    mesh = make_mesh(data=2, model=4)
    assert dict(mesh.shape) == {"trial": 1, "data": 2, "model": 4}
    assert dict(make_mesh(trial=2, model=2).shape) == {"trial": 2, "data": 2, "model": 2}
    assert dict(make_mesh().shape) == {"trial": 1, "data": 8}
    with pytest.raises(ValueError, match="trial=1 times model=3 does not divide 8 devices"):
        make_mesh(model=3)
    with pytest.raises(ValueError, match="trial=1 times data=4 times model=4 devices wanted"):
        make_mesh(data=4, model=4)


def test_the_largest_dimension_that_divides_is_divided():
    rules = fully_sharded(make_mesh(), above=64)
    assert rules("w", shape(8, 24, 16)) == P(None, "data")
    assert rules("w", shape(3, 100, 16)) == P(None, None, "data")
    assert rules("w", shape(16, 16)) == P("data")
    assert rules("w", shape(8, 8)) == P()  # 64 elements
    assert rules("w", shape(101, 7)) == P()
    assert rules("w", shape()) == P()


def test_the_first_expression_that_is_found_in_a_path_holds():
    mesh = make_mesh(data=2, model=4)
    rules = by_path(
        mesh,
        {
            r"words": ["", "model"],  # as TOML has it
            r"\['up'\]$": P(("data", "model")),
            r"^\.hyperparams": {"axis": "data", "above": 10},
            r"mu": "model",
        },
    )
    assert rules(".params['words']", shape(5, 4)) == P(None, "model")
    assert rules(".inner_opt_state[0].mu['words']", shape(5, 4)) == P(None, "model")
    assert rules(".params['up']", shape(16, 3)) == P(("data", "model"))
    assert rules(".hyperparams['up']", shape(16, 3)) == P(("data", "model"))
    assert rules(".hyperparams['decay']", shape(12)) == P("data")
    assert rules(".hyperparams['decay']", shape(10)) == P()
    assert rules(".inner_opt_state[0].mu['b']", shape(3, 8)) == P(None, "model")
    assert rules(".params['b']", shape(8)) == P()
    assert rules(".params['words_scale']", shape(1, 1)) == P()


@pytest.mark.parametrize(
    ("rules", "leaf", "message"),
    [
        ({"w": ["data"]}, shape(12), r"rules\['w'\] divides a dimension of \.w over 8 devices"),
        ({"w": [None, "data"]}, shape(16), r"is for 2 dimensions; \.w has shape \(16,\)"),
        ({"w": ["model"]}, shape(16), "one of the mesh's"),
        ({"w": "model"}, shape(16), "one of the mesh's"),
        ({"(": "data"}, shape(16), "no regular expression"),
        ({}, shape(16), "rules must be a table of regular expressions"),
        ({"w": 3}, shape(16), r"rules\['w'\] must be .*; got 3"),
        ({"w": {"over": "data"}}, shape(16), r"rules\['w'\] must be"),
        ({"w": [1]}, shape(16), r"rules\['w'\] must be"),
        ({"w": ["data", ["trial", "data"]]}, shape(16), r"rules\['w'\] .* over an axis twice"),
        ({"w": {"axis": "data", "above": -1}}, shape(16), "above"),
    ],
)
def test_what_is_no_rule_is_named(rules, leaf, message):
    with pytest.raises(ValueError, match=message):
        by_path(make_mesh(), rules)(".w", leaf)


def test_slots_are_divided_over_trial_and_by_nothing_else():
    mesh = make_mesh(trial=2, data=4)
    lies = Placement(mesh, True, fully_sharded(mesh)).of_leaf(".w", shape(6, 3, 8))
    assert lies.spec == P("trial", None, "data")
    assert lies.shard_shape((6, 3, 8)) == (3, 3, 2)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    assert Placement(mesh, True, fully_sharded(mesh)).of_leaf(".key", keys).spec == P("trial")
    with pytest.raises(ValueError, match=r'must not divide \.w over "trial"'):
        Placement(mesh, True, by_path(mesh, {"": ["trial"]})).of_leaf(".w", shape(6, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": {"": "data"}}, "mesh must be .*and what rules name: data, got None"),
        ({"rules": {"": "model"}, "mesh": {"data": 8}}, r"axes of the mesh \('data'\)"),
        ({"rules": {"": "trial"}, "mesh": {"trial": 2}}, "rules must divide over axes"),
        ({"rules": {"": "data"}, "mesh": {"data": 2, "model": 4}}, "mesh must be"),
        ({"rules": {"": 3}, "mesh": {"data": 2}}, r"rules\[''\] must be"),
        ({"rules": ["data"], "mesh": {"data": 2}}, "rules must be a table"),
        ({"rules": {"": []}}, "mesh must be .*and what rules name: nothing, got None"),
        ({"mesh": {"data": 2, "model": 4}}, "mesh must be"),
    ],
)
def test_wrong_rules_of_a_sweep_are_named_before_anything_starts(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_devices_that_are_not_there_are_said_with_what_helps(tmp_path):
    said = r'mesh: trial=1 times data=16 devices wanted, 8 found\. .*allow_changed=\("mesh",\)'
    with pytest.raises(ValueError, match=said):
        sweep(tmp_path, mesh={"data": 16}, rules={"": "data"}).run()


def test_rules_keep_their_order_in_a_storage(tmp_path):
    rules = {"words": P(None, "model"), "": {"axis": "data", "above": 64}}
    made = sweep(tmp_path, mesh={"data": 2, "model": 4}, rules=rules)
    assert list(made.identity.rules) == ["words", ""]
    written = made.identity.describe()["rules"]
    assert written == [["words", [None, "model"]], ["", {"axis": "data", "above": 64}]]
    given = {name: x for name, x in made.identity.describe().items() if x is not None}
    read = settings.read({**given, "storage": tmp_path, "generations": 1}, "here")["rules"]
    assert list(read.items()) == list(made.identity.rules.items())


def test_a_sweep_without_rules_is_what_it_was(tmp_path):
    known = {**sweep(tmp_path).identity.describe(), "data": None, "x64": False}
    older = {name: known[name] for name in manifest.IDENTITY if name not in manifest.NEWER}
    text = json.dumps(older, sort_keys=True)
    assert manifest.digest(known) == hashlib.sha256(text.encode()).hexdigest()
    assert manifest.digest(known) != manifest.digest({**known, "rules": [["", "data"]]})

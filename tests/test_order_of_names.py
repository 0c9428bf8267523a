"""The order of a space's names decides what is drawn: a sweep goes on in the same."""

import pytest

from gradhpo.cluster import SearchSpace, SweepError, shard
from tests import file_operations
from tests.sweeps import sweep

TOML = {
    "hyperparams": {
        "log_rate": {"loguniform": [1e-3, 0.3], "stored": "log"},
        "other": {"uniform": [0, 1]},
    },
    "choices": {"size": [1], "kind": ["a", "b"]},
}


class Variant(file_operations.Variant):
    """With two settings."""

    def turn(self, state, order):
        state, columns = super().turn(state, order)
        return state, {**columns, "hyperparams.other": columns["hyperparams.log_rate"]}


@pytest.mark.parametrize("part", TOML)
def test_another_order_is_another_run(tmp_path, monkeypatch, part):
    monkeypatch.setattr(shard, "Variant", Variant)
    space, manifest = SearchSpace.parse(TOML), tmp_path / "manifest.json"
    sweep(tmp_path, space=space, generations=1).run()
    turned = SearchSpace.parse({**TOML, part: dict(reversed(TOML[part].items()))})
    assert turned == space
    said = f"its space.{part} are in the order {', '.join(TOML[part])}, here in"
    with pytest.raises(SweepError, match=said):
        sweep(tmp_path, space=turned, generations=2).run()
    manifest.write_text("")
    with pytest.raises(SweepError, match=said):  # from that it is not made again either
        sweep(tmp_path, space=turned, generations=2).run()
    assert sweep(tmp_path, space=space, generations=2).run().generations == 2

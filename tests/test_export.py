"""What was found is taken out: to safetensors, to Orbax, and as a script without gradhpo."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo.cluster import PBT, SearchSpace, loguniform
from gradhpo.export import save_orbax, save_safetensors, write_script
from tests.sweeps import sweep
from tests.test_stopping import command

pytestmark = pytest.mark.slow

# What a person has beside the script: a loss, an optimizer and data, none of which is gradhpo's.
PLAIN = """
import importlib, sys
import jax, jax.numpy as jnp, numpy as np, optax


def loss(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w["w"] - y) ** 2) + jnp.sum(jnp.exp(lam["decay"]["of"]) * w["w"] ** 2)


def optimizer(lam):
    return optax.sgd(jnp.exp(lam["log_rate"]), momentum=0.9)


def batches(step):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(3), step % 4), (8, 3))
    return x, x[:, 0] - x[:, 1]


START = {"w": jnp.ones(3)}
"""
ALONE = """
sys.modules["gradhpo"] = None  # an import of it would fail
for name in ("solved", "swept"):
    retrain = importlib.import_module(name)
    np.save(f"{name}.npy", retrain.train(START, loss, optimizer, batches)["w"])
    assert retrain.hyperparams(10**6)["decay"]["of"].shape == (3,)
    assert float(retrain.schedule("log_rate")(0)) == float(retrain.hyperparams(0)["log_rate"])
"""
made = {}
exec(compile(PLAIN, "plain", "exec"), made)


def val_loss(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w["w"] - y) ** 2)


def batch(key):
    return made["batches"](0), made["batches"](1)


def init(key):
    return made["START"], {"decay": {"of": jnp.full(3, -4.0)}, "log_rate": jnp.asarray(-4.0)}


PROBLEM = gradhpo.Problem(init, made["loss"], val_loss, batch=batch)
TUNER = gradhpo.OneStepOptimizer(made["optimizer"], optax.adam(0.05))


def problem():
    """The problem, as the command finds it by reference."""
    return PROBLEM


def optimizer():
    """One that leaves the rate alone, which the sweep's scheduler moves."""
    outer = optax.multi_transform(
        {"tuned": optax.adam(0.1), "fixed": optax.set_to_zero()},
        {"decay": "tuned", "log_rate": "fixed"},
    )
    return gradhpo.OneStepOptimizer(made["optimizer"], outer)


@pytest.fixture(scope="module")
def solution():
    return gradhpo.solve(PROBLEM, TUNER, 30, jax.random.key(0), record=["decay.of", "log_rate"],
                         eval_every=10, progress=False)  # fmt: skip


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("swept")


@pytest.fixture(scope="module")
def swept(storage):
    """A sweep in which rates are perturbed, whose winner has copied another trial."""
    space = SearchSpace(hyperparams={"log_rate": loguniform(1e-3, 3e-1, stored="log")})
    return sweep(
        storage, problem=f"{__name__}:problem", optimizer=f"{__name__}:optimizer", space=space,
        scheduler=PBT(0.34), generations=5, shards=2,
    ).run()  # fmt: skip


def test_scripts_give_the_weights_of_a_solve_and_of_a_sweeps_winner_without_gradhpo(
    tmp_path, solution, swept
):
    assert any(turn.changes for turn in swept.schedule[1:]), "the winner was perturbed"
    trajectory = swept.trajectory()
    assert trajectory["log_rate"].shape == (5 * (swept.best.generation + 1) + 1,)
    assert len(set(trajectory["log_rate"].tolist())) > 1
    best = swept.best.hyperparams
    np.testing.assert_allclose(trajectory["decay.of"][-1], best["decay"]["of"], rtol=1e-5)
    write_script(tmp_path / "swept.py", trajectory)
    write_script(tmp_path / "solved.py", solution.trajectory())
    (tmp_path / "plain.py").write_text(PLAIN.replace("step % 4", "0") + ALONE)
    done = subprocess.run([sys.executable, "plain.py"], cwd=tmp_path, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {name: np.load(tmp_path / f"{name}.npy") for name in ("solved", "swept")}
    np.testing.assert_allclose(found["solved"], solution.state.params["w"], rtol=1e-5)
    np.testing.assert_allclose(found["swept"], swept.best.params["w"], rtol=1e-4)


@pytest.mark.parametrize(
    ("path", "values", "message"),
    [
        ("a-b.py", {"x": np.zeros(2)}, "Python file such as retrain.py"),
        ("a.txt", {"x": np.zeros(2)}, "Python file such as retrain.py"),
        ("a.py", {}, "one length, got nothing"),
        ("a.py", {"x": np.zeros(2), "y": np.zeros(3)}, r"one length, got \[2, 3\]"),
    ],
)
def test_what_is_no_script_is_refused(tmp_path, path, values, message):
    with pytest.raises(ValueError, match=message):
        write_script(tmp_path / path, values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whose", ["solve", "sweep"])
def test_safetensors_has_weights_and_hyperparameters(tmp_path, solution, swept, whose):
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    found = solution.best.state if whose == "solve" else swept.best
    names = save_safetensors(tmp_path / "a.safetensors", found)
    arrays = numpy.load_file(tmp_path / "a.safetensors")
    assert set(arrays) == set(names) == {
        "params.w", "hyperparams.decay.of", "hyperparams.log_rate"
    }  # fmt: skip
    np.testing.assert_array_equal(arrays["params.w"], found.params["w"])
    assert arrays["hyperparams.log_rate"].shape == ()


@pytest.mark.filterwarnings("default")  # of Orbax's own
@pytest.mark.parametrize("whose", ["solve", "sweep"])
def test_orbax_restores_the_trees(tmp_path, solution, swept, whose):
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    found = solution.best.state if whose == "solve" else swept.best
    save_orbax(tmp_path / "a", found)
    with checkpoint.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "a")
    np.testing.assert_array_equal(tree["params"]["w"], found.params["w"])
    np.testing.assert_array_equal(
        tree["hyperparams"]["decay"]["of"], found.hyperparams["decay"]["of"]
    )
    with pytest.raises(FileExistsError, match="folder must be new"):
        save_orbax(tmp_path / "a", found)


@pytest.mark.usefixtures("swept")
def test_the_command_exports_the_best_trial(tmp_path, storage):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    said, status = command("export", storage, "--safetensors", tmp_path / "b.safetensors",
                           "--script", tmp_path / "retrain.py")  # fmt: skip
    assert status == 0, said
    assert "params" in said
    assert f"importing {__name__}:problem, {__name__}:optimizer, looked" in said
    assert (tmp_path / "retrain.npz").exists()
    said, status = command("export", storage)
    assert "say what to export" in said
    assert status == 1

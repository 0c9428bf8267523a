"""Draw the figures of the documentation from the code of its pages.

`python docs/pictures/draw.py` runs the pages and writes the figures beside this file. They have no
background, and greys that can be read on a light page and on a dark one.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import typer

import gradhpo

HERE = Path(__file__).parent
GREY, BLUE, ORANGE, GREEN = "#7d8891", "#2a86c4", "#d9762b", "#22997a"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": GREY,
    "axes.titlesize": 11,
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "savefig.transparent": True,
    "svg.hashsalt": "gradhpo",
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def first(made: dict[str, Any]) -> Any:
    """Draw the validation loss and all decays of the first run."""
    solution = gradhpo.solve(
        made["problem"],
        made["tuner"],
        500,
        jax.random.key(2),
        record=lambda lam: {"decay": jax.nn.sigmoid(lam)},
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    left.plot(solution.metrics["val_loss"], color=BLUE, linewidth=2)
    left.set(xlabel="step", title="validation loss", ylim=(0, None))
    decays = np.asarray(solution.record["decay"])
    right.plot(decays[:, 2:], color=GREY, linewidth=0.8, alpha=0.6)
    right.plot(decays[:, :2], color=ORANGE, linewidth=2.4)
    right.plot([], color=ORANGE, label="the two inputs that matter")
    right.plot([], color=GREY, label="the 18 others")
    right.set(xlabel="step", yscale="log", ylim=(1e-3, None), title="weight decay of each input")
    right.legend(fontsize=9, loc="lower left")
    return figure


def schedule(made: dict[str, Any]) -> Any:
    """Draw the learning rate that was given, the one that was found, and the decay."""
    record, steps = made["solution"].record, np.arange(made["STEPS"])
    shape = np.asarray(jax.vmap(made["shape"])(steps))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    left.plot(steps, 1e-4 * shape, color=GREY, linewidth=2, label="guessed")
    left.plot(steps, np.exp(record["log_peak"]) * shape, color=BLUE, linewidth=2, label="found")
    left.set(xlabel="step", yscale="log", ylim=(1e-6, None), title="learning rate")
    left.legend(fontsize=9, loc="lower center")
    right.plot(steps, np.exp(record["log_decay"]), color=ORANGE, linewidth=2)
    right.set(xlabel="step", yscale="log", title="weight decay")
    return figure


def weights(made: dict[str, Any]) -> Any:
    """Draw how the weights of clean and of wrong examples are distributed."""
    weight = np.asarray(jax.nn.sigmoid(made["solution"].state.hyperparams))
    wrong, bins = np.asarray(made["split"]["wrong"]), np.linspace(0, 1, 26).tolist()
    figure, axes = plt.subplots(figsize=(5.4, 2.6), layout="constrained")
    axes.hist(weight[~wrong], bins, color=BLUE, alpha=0.75, label="right label")
    axes.hist(weight[wrong], bins, color=ORANGE, alpha=0.75, label="wrong label")
    axes.set(xlabel="weight σ(λ)", ylabel="examples")
    axes.legend(fontsize=9, loc="upper center")
    return figure


def distilled(made: dict[str, Any]) -> Any:
    """Draw the ten images that were learned, above ten real ones."""
    figure, rows = plt.subplots(2, 10, figsize=(7.2, 1.7), layout="constrained")
    for row, images in zip(rows, (made["lam"]["images"], made["real"]), strict=True):
        for axes, image in zip(row, np.asarray(images), strict=True):
            axes.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
    return figure


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "first": ("index.md", first),
    "schedule": ("tutorials/schedule-and-decay.md", schedule),
    "weights": ("tutorials/example-weights.md", weights),
    "distilled": ("tutorials/distillation.md", distilled),
}


def draw(name: str, made: dict[str, Any], folder: Path) -> Path:
    """Draw a figure of what its page made, and return its file."""
    with mpl.rc_context(STYLE):
        figure = FIGURES[name][1](made)
        path = folder / f"{name}.svg"
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(path, metadata=nothing)
        plt.close(figure)
    return path


def ran(page: Path) -> dict[str, Any]:
    """Return what the Python of a page defines, run in a temporary folder."""
    made: dict[str, Any] = {"__name__": "page"}
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        before = Path.cwd()
        os.chdir(folder)
        try:
            for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
                exec(compile(block, str(page), "exec"), made)
        finally:
            os.chdir(before)
    return made


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Which; by default all.")] = None,
    folder: Annotated[Path, typer.Option(help="Where they are written.")] = HERE,
) -> None:
    """Draw the figures of the documentation from the code of its pages."""
    mpl.use("agg")
    for name in names or FIGURES:
        if name not in FIGURES:
            raise typer.BadParameter(f"a figure must be one of {list(FIGURES)}, got {name!r}")
        typer.echo(draw(name, ran(HERE.parent / FIGURES[name][0]), folder))


if __name__ == "__main__":
    typer.run(main)

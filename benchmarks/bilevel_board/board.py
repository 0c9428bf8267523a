"""gradhpo on a public board of bilevel solvers, benchopt's `benchmark_bilevel`: `docs/board.md`.

The board is cloned, not kept here: `--board` takes its git URL or a folder with a clone of it. The
files of `plugged/` go among its own, and all of it runs in an environment of the board's below
`--environments`. Data cleaning is the board's own dataset on Fashion-MNIST in the place of MNIST;
its four IDX files are Debian's package `dataset-fashion-mnist`, or any folder with `--images`.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
sys.path += [str(CHECKOUT / path) for path in ("benchmarks/peers", "examples/papers")]

import board_page  # noqa: E402
import data_sets  # noqa: E402
import environments  # noqa: E402
import mnist  # noqa: E402
from compare import machine  # noqa: E402
from processes import ONE_CORE  # noqa: E402

URL = "https://github.com/benchopt/benchmark_bilevel"
COMMIT = "3ad65dccff5cce27a656630a4f98be52920850b4"
IMAGES = data_sets.DEBIAN / "fashion-mnist"
PAGE = CHECKOUT / "docs" / "board.md"
THEIRS = "SABA,SOBA,F2SA,StocBiO"
OURS = "saba,soba,masoba,f2sa,bome,implicit,one-step,hyperdistill,greedy,unrolled"
OF_CLEANING = (  # without SABA, 12 ms a step, and BOME, 4,219 calls a step
    "SOBA,F2SA,StocBiO,saba,soba,masoba,f2sa,implicit,one-step,hyperdistill,greedy,unrolled"
)
PAIRS = ["--pairs", "soba:SOBA,saba:SABA,f2sa:F2SA,implicit:StocBiO"]
RUNS: dict[str, list[str]] = {
    "small": ["--solvers", f"{THEIRS},{OURS}"],
    "small-pairs": PAIRS,
    "small-10": ["--problem", "small-10", "--solvers", f"{THEIRS},{OURS}"],
    "published": [  # 1.3 GB, which a timed program would hold once more; BOME: 6,688 calls a step
        *("--problem", "published", "--solvers", f"SABA,{OF_CLEANING}", "--timed", "0"),
    ],
    **{
        f"cleaning-{ratio}": [
            *("--problem", f"cleaning-{ratio}", "--outer-ratio", "0.0001"),
            *("--solvers", OF_CLEANING),
            *("--calls", "32000", "--seeds", "3"),
        ]
        for ratio in ("0.5", "0.7", "0.9")
    },
    "cleaning-pairs": ["--problem", "cleaning-0.5", "--outer-ratio", "0.0001", *PAIRS],
}
"""What the page shows, each as arguments of `measure.py`."""


def prepared(board: str, folder: Path) -> Path:
    """Return the board's folder with our solvers among its own; cloned first if it is not there."""
    clone = folder.resolve() / "benchmark_bilevel"
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", board, clone], check=True)
        subprocess.run(["git", "-C", clone, "checkout", "--quiet", COMMIT], check=True)
    shutil.copytree(HERE / "plugged", clone, dirs_exist_ok=True)
    return clone


def missing_images(images: Path) -> str | None:
    """Return why data cleaning is left out; None where the images are there."""
    if images.is_dir():
        return None
    return (
        f"data cleaning is left out: {images} is not there. `apt-get install "
        "dataset-fashion-mnist` brings it on Debian and Ubuntu; --images takes any folder with "
        "MNIST's four IDX files"
    )


def write_images(images: Path, folder: Path) -> None:
    """Write the images where the board's dataset looks for MNIST before it downloads any."""
    kept: dict[str, Any] = {}
    for name, kind in (("training", "train"), ("test", "t10k")):
        for what, axes in (("images", 3), ("labels", 1)):
            path = images / f"{kind}-{what}-idx{axes}-ubyte"
            path = path if path.exists() else path.with_name(f"{path.name}.gz")
            found = mnist.read_idx(path, axes)
            kept[f"{name}_{what}"] = found.reshape(len(found), -1) if axes == 3 else found
    (folder / "mnist.pkl").write_bytes(pickle.dumps(kept))


def measured(python: Path, clone: Path, arguments: list[str], results: Path) -> None:
    """Run `measure.py` in the board's environment."""
    kept = environments.variables("board") | {"PYTHONPATH": str(CHECKOUT)}
    command = [*ONE_CORE, python, HERE / "measure.py", clone, results, *arguments]
    subprocess.run(command, check=True, env=kept, cwd=clone.parent)


def described() -> str:
    """Return the machine, the versions, and which commit of the board it is."""
    pinned = (environments.HERE / "requirements" / "board.txt").read_text()
    kept = re.findall(r"^(benchopt|jax|optax)==(\S+)", pinned, re.MULTILINE)
    versions = ", ".join(f"{name} {number}" for name, number in kept)
    return f"{machine()}, {versions}, the board at {COMMIT[:7]}"


def main(
    board: Annotated[str, typer.Option(help="The board: a git URL, or a folder.")] = URL,
    environments_folder: Annotated[
        Path, typer.Option("--environments", help="Where the board and its environment are made.")
    ] = Path(".venv-peers"),
    images: Annotated[Path, typer.Option(help="A folder with MNIST's four IDX files.")] = IMAGES,
    runs: Annotated[str, typer.Option(help="With commas; all by default, none to draw.")] = "all",
    page: Annotated[Path, typer.Option(help="Whose measured part is written.")] = PAGE,
) -> None:
    """Measure gradhpo's methods and the board's own, and write the page with its figures."""
    chosen = {"all": list(RUNS), "none": []}.get(runs, runs.split(","))
    if unknown := [name for name in chosen if name not in RUNS]:
        raise typer.BadParameter(f"--runs takes {', '.join(RUNS)}; got {', '.join(unknown)}")
    environments_folder.mkdir(parents=True, exist_ok=True)
    (environments_folder / ".gitignore").write_text("*\n")
    results = environments_folder.resolve() / "board.json"
    if chosen:
        python = environments.python(environments_folder, "board")
        clone = prepared(board, environments_folder)
        reason = missing_images(images)
        if reason is None:
            write_images(images, clone.parent)
        for name in chosen:
            if reason is not None and name.startswith("cleaning"):
                print(reason, flush=True)
                continue
            print(name, flush=True)
            measured(python, clone, RUNS[name], results)
        kept: dict[str, Any] = json.loads(results.read_text())
        results.write_text(json.dumps(kept | {"machine": described()}, indent=1))
    board_page.write(json.loads(results.read_text()), page)
    print(f"Written: {page}")


if __name__ == "__main__":
    typer.run(main)

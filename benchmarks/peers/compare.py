"""gradhpo side by side with what people use today: `docs/comparison.md`, by one command."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Annotated, Any

import environments
import inputs
import measuring
import populations
import typer
from comparison_page import COLUMNS, filled, row, table
from contenders import CASES, PEERS
from counted_lines import count

PAGE = environments.CHECKOUT / "docs" / "comparison.md"
TITLES = {
    "mlp": "MLP, 64-256-256-10, batches of 256",
    "cnn": "CNN, two convolutions of 16 and 32 channels on 8×8, batches of 64",
    "transformer": "Transformer, two blocks of width 64 on 8 tokens, batches of 64",
}


def measured(found: dict[str, Any]) -> str:
    """Return the measured part of the page."""
    parts: list[str] = []
    for model, title in TITLES.items():
        rows = [
            row(case.title, PEERS[peer].title, of[peer], lines(peer, name))
            for name, case in CASES.items()
            if (of := found.get(f"{model}/{name}"))
            for peer in case.peers
        ]
        if rows:
            parts += [f"### {title}", table(COLUMNS, rows)]
    if "population" in found:
        parts += ["### A population of 64 trials", populations.rows(found["population"])]
    return "\n\n".join([f"Measured on {found['machine']}.", *parts])


def machine() -> str:
    """Return the processor and its cores; JAX is not asked, which would swell this process."""
    info = Path("/proc/cpuinfo")
    text = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = text.group(1) if text else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def lines(peer: str, case: str) -> int:
    """Return how many lines a user of a peer writes for a case."""
    return count(environments.HERE / "scripts" / f"{PEERS[peer].script}.py", case)


def _chosen(given: str, known: dict[str, Any], option: str) -> list[str]:
    names = given.split(",") if given else list(known)
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{option} takes {', '.join(known)}; got {', '.join(unknown)}")
    return names


def main(
    environments_folder: Annotated[
        Path, typer.Option("--environments", help="Where the peers' environments are made.")
    ] = Path(".venv-peers"),
    models: Annotated[str, typer.Option(help="With commas; all by default.")] = "",
    cases: Annotated[str, typer.Option(help="With commas; all by default.")] = "",
    rounds: Annotated[int, typer.Option(min=3, help="Turns of each peer.")] = 11,
    wholes: Annotated[int, typer.Option(min=1, help="Whole processes of each peer.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of a whole process.")] = 100,
    population: Annotated[bool, typer.Option(help="Measure sweeps against Ray Tune.")] = True,
    page: Annotated[Path, typer.Option(help="Whose measured part is written.")] = PAGE,
) -> None:
    """Measure the cases, and write them with what was measured before into the page."""
    chosen = _chosen(models, TITLES, "--models"), _chosen(cases, CASES, "--cases")
    environments_folder.mkdir(parents=True, exist_ok=True)
    (environments_folder / ".gitignore").write_text("*\n")
    results, data = environments_folder / "results.json", environments_folder / "inputs.npz"
    inputs.write(data)
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    found["machine"] = machine()
    for model in chosen[0]:
        for case in chosen[1]:
            if model not in CASES[case].models:
                continue
            print(f"{model}, {case}", flush=True)
            found[f"{model}/{case}"] = measuring.measure(
                environments_folder, data, model, case, rounds, wholes, steps
            )
            results.write_text(json.dumps(found, indent=1))
    if population:
        found["population"] = populations.measure(environments_folder)
        results.write_text(json.dumps(found, indent=1))
    page.write_text(filled(page.read_text(), measured(found)))
    print(f"Written: {page}")


if __name__ == "__main__":
    typer.run(main)

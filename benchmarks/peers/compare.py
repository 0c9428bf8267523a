"""gradhpo side by side with what people use today: `docs/comparison.md`, by one command."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import environments
import inputs
import measuring
import memory
import populations
import typer
from comparison_page import COLUMNS, filled, row, table
from contenders import CASES, PEERS, why_another
from counted_lines import count

PAGE = environments.CHECKOUT / "docs" / "comparison.md"
RESULTS = environments.HERE / "results.json"
TITLES = {
    "mlp": "MLP, 64-256-256-10, batches of 256",
    "cnn": "CNN, two convolutions of 16 and 32 channels on 8×8, batches of 64",
    "transformer": "Transformer, two blocks of width 64 on 8 tokens, batches of 64",
}


def measured(found: dict[str, Any]) -> str:
    """Return the measured part of the page."""
    parts: list[str] = []
    for model, title in TITLES.items():
        cells = {name: found["cells"].get(f"{model}/{name}") for name in CASES}
        present = {name: cell for name, cell in cells.items() if cell}
        rows = [
            row(CASES[name].title, PEERS[peer].title, cell["peers"][peer], lines(peer, name))
            for name, cell in present.items()
            for peer in CASES[name].peers
            if peer in cell["peers"]
        ]
        if rows:
            parts += [f"### {title}", table(COLUMNS, rows)]
            parts += ["\n".join(notes)] if (notes := list(_notes(model, present))) else []
    if "population" in found:
        parts += ["### A population of 64 trials", populations.rows(found["population"])]
    if "memory" in found:
        parts += ["### Where the memory of a process goes", memory.rows(found["memory"])]
    return "\n\n".join([*_where(found["cells"]), *parts])


def _notes(model: str, cells: dict[str, Any]) -> Iterator[str]:
    """Yield why a peer has no figures, and whose hypergradients are other ones."""
    for case, cell in cells.items():
        for peer, of in cell["peers"].items():
            another = why_another(peer, case, model)
            if reason := of.get("failed") or (another and f"another hypergradient; {another}"):
                yield f"- {CASES[case].title} by {PEERS[peer].title}: {reason}."


def _where(cells: dict[str, Any]) -> Iterator[str]:
    """Yield on what machine the cells were measured: one text for those of the same."""
    ways: dict[str, list[str]] = {}
    for name, cell in cells.items():
        model, _, case = name.partition("/")
        text = f"{TITLES[model].partition(',')[0]} {CASES[case].title}"
        ways.setdefault(cell["on"], []).append(text)
    for machine, names in ways.items():
        rest = "" if len(ways) == 1 else f": {'; '.join(names)}"
        yield f"Measured on {machine}{rest}."


def machine() -> str:
    """Return what processes run on; JAX is not asked, which would swell this process."""
    info = Path("/proc/cpuinfo")
    text = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = text.group(1) if text else platform.machine()
    return f"one core of {name}, Python {platform.python_version()}"


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
    wholes: Annotated[
        int, typer.Option(min=0, help="Whole processes of each peer; 0 keeps what is there.")
    ] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of a whole process.")] = 100,
    population: Annotated[bool, typer.Option(help="Measure sweeps against Ray Tune.")] = True,
    ways: Annotated[str, typer.Option(help="Of a population, with commas; all by default.")] = "",
    cells: Annotated[bool, typer.Option(help="Measure the cases.")] = True,
    memory_stages: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure a process by its stages.")
    ] = True,
    only_page: Annotated[bool, typer.Option(help="Measure nothing; write the page.")] = False,
    page: Annotated[Path, typer.Option(help="Whose measured part is written.")] = PAGE,
    results: Annotated[Path, typer.Option(help="Where what was measured is kept.")] = RESULTS,
) -> None:
    """Measure the cases, and write them with what was measured before into the page."""
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    found.setdefault("cells", {})
    todo = [
        (model, case)
        for model in _chosen(models, TITLES, "--models")
        for case in _chosen(cases, CASES, "--cases")
        if cells and model in CASES[case].models
    ]
    chosen_ways = _chosen(ways, populations.WAYS, "--ways") if population else []

    def keep() -> None:
        kept = _rounded(found)
        results.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")
        page.write_text(filled(page.read_text(), measured(kept)))

    if not only_page:
        folder, data = environments_folder, environments_folder / "inputs.npz"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        inputs.write(data)
        for model, case in todo:
            print(f"{model}, {case}", flush=True)
            peers = measuring.measure(folder, data, model, case, rounds, wholes, steps)
            _merge(found["cells"], f"{model}/{case}", peers, wholes)
            keep()
        for way in chosen_ways:
            print(f"population, {way}", flush=True)
            found.setdefault("population", {})[way] = populations.measure(folder, way)
            keep()
        if memory_stages:
            print("memory", flush=True)
            found["memory"] = memory.measure(folder, data)
    keep()
    print(f"Written: {results}, {page}")


def _merge(cells: dict[str, Any], name: str, peers: dict[str, Any], wholes: int) -> None:
    """Put a cell in its place; without whole processes, those that were there stay."""
    before = cells.get(name, {}).get("peers", {})
    for peer, of in peers.items():
        if not wholes and "failed" not in of:
            kept = {key: before.get(peer, {}).get(key) for key in ("whole", "mebibytes")}
            of.update({key: value for key, value in kept.items() if value is not None})
    cells[name] = {"on": machine(), "peers": peers}


def _rounded(value: Any) -> Any:
    """Return the results with four digits, which is more than they mean."""
    if isinstance(value, dict):
        return {name: _rounded(of) for name, of in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_rounded(of) for of in cast(list[Any], value)]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)

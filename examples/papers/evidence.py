"""Run the claims of `claims/`, and write the tables of `docs/evidence.md` from what was measured.

`make evidence` runs what is missing, which takes hours; each method of each case is a cell, and
what is done is kept: a run goes on where it was stopped. `--list` says what there is.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import claim_figures
import claims
import jax
import jax.numpy as jnp
import report
import typer
from tqdm import tqdm

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "evidence.md"
PACKAGES = ("jax", "jaxlib", "optax")


class Cell(NamedTuple):
    """One method in one case of one claim, and whether it was measured with so many seeds."""

    claim: claims.Claim
    case: str
    method: str
    done: bool

    @property
    def name(self) -> str:
        """What `--only` is compared with."""
        return f"{self.claim.name}/{self.case}/{self.method}"


def cells(only: list[str], seeds: int | None, results: Path, tiny: bool) -> list[Cell]:
    """Return the cells whose name fits one of the patterns, in the order of the files.

    Raises:
      typer.BadParameter: if a pattern fits none.
    """
    made: list[Cell] = []
    for claim in map(claims.load, claims.names()):
        for case in claim.cases:
            found = claims.result(claim, case, results, tiny)
            for method in claim.methods:
                have = len(next(iter(found.get(method, {"": []}).values())))
                made.append(Cell(claim, case, method, have >= (seeds or claim.seeds_of(case))))
    for pattern in only:
        if not any(fits(cell, pattern) for cell in made):
            raise typer.BadParameter(f"--only {pattern} fits no cell; --list names them all")
    return [c for c in made if not only or any(fits(c, pattern) for pattern in only)]


def fits(cell: Cell, pattern: str) -> bool:
    """Whether the pattern names the cell, its case or its claim."""
    parts = cell.name.split("/")
    return any(fnmatch.fnmatchcase("/".join(parts[:n]), pattern) for n in (1, 2, 3))


def measure(cell: Cell, seeds: int, results: Path, tiny: bool) -> None:
    """Run a cell, and keep what it gave."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(seeds))
    module = importlib.import_module(cell.claim.script)
    began = time.process_time()
    found = module.evidence(cell.claim.settings_of(cell.case, tiny), cell.method, keys)
    own = {name: claims.rounded(values) for name, values in found.items()}
    own["cpu_seconds"] = round(time.process_time() - began)
    methods = claims.result(cell.claim, cell.case, results, tiny) | {cell.method: own}
    ordered = {m: methods[m] for m in cell.claim.methods if m in methods}
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    claims.keep(cell.claim, cell.case, results, ordered, versions, tiny)


def tables(claim: claims.Claim, results: Path) -> str:
    """Return a claim in Markdown: what was to be found out, and what was found."""
    lines = [f"### {claim.title}", "", claim.source, "", claim.protocol, ""]
    lines += [f"`python examples/papers/evidence.py --only {claim.name}`.", ""]
    found = claims.results(claim, results)
    lines += ["| registered | " + " | ".join(claim.cases) + " |", "|---" * (len(found) + 1) + "|"]
    for told in claim.statements:
        spoken = [told.cases is None or case in told.cases for case in found]
        given = [
            told.verdict(methods, claim.digits) if speaks else ""
            for speaks, methods in zip(spoken, found.values(), strict=True)
        ]
        lines.append(f"| {told.says} | " + " | ".join(given) + " |")
    for case, methods in found.items():
        if methods:
            lines += ["", *table(claim, case, methods)]
    if claim_figures.is_drawn(claim, found):
        lines += ["", f"![{claim.title}: {shown(claim)}](pictures/{claim_figures.name_of(claim)})"]
    if missing := [case for case, methods in found.items() if not methods]:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(lines)


def shown(claim: claims.Claim) -> str:
    """Return what a claim's figure shows."""
    if claim.curves:
        return f"{' and '.join(claim.curves.values())} along the run, mean and range of seeds"
    if claim.pairs:
        return f"{' against '.join(claim.pairs.values())}, every seed"
    return f"{next(iter(claim.measures.values()))}, means with 95% intervals, and every seed"


def table(claim: claims.Claim, case: str, methods: dict[str, Any]) -> list[str]:
    """Return the lines of a case's table: a row for each method, run or not."""
    published = claim.cases[case].get("published", {})
    columns = [case, *([claim.published] if published else []), *claim.measures.values(), "seeds"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for method in claim.methods:
        row = [method, *([str(published.get(method, "–"))] if published else [])]
        own = methods.get(method)
        if own is None:
            row += ["not run yet", *[""] * len(claim.measures)]
        else:
            row += [
                report.interval(own[name], claim.digits) if name in own else ""
                for name in claim.measures
            ]
            row.append(str(len(next(iter(own.values())))))
        lines.append("| " + " | ".join(row) + " |")
    return lines


def written(page: str, results: Path) -> str:
    """Return the page with the tables of all claims between its marks.

    Raises:
      ValueError: if a mark is missing.
    """
    for name in claims.names():
        begin, end = f"<!-- evidence: {name} -->", f"<!-- end: {name} -->"
        if begin not in page or end not in page:
            raise ValueError(f"the page must have {begin} and {end}")
        head, rest = page.split(begin, 1)
        made = tables(claims.load(name), results)
        page = f"{head}{begin}\n\n{made}\n\n{end}{rest.split(end, 1)[1]}"
    return page


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="CLAIM, CLAIM/CASE or CLAIM/CASE/METHOD; repeat.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="Runs of a cell.")] = None,
    tiny: Annotated[bool, typer.Option(help="Only to see that all runs; no evidence.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Name the cells, and run none.")] = False,
    write: Annotated[bool, typer.Option(help="Write the tables into the page.")] = True,
    results: Annotated[Path | None, typer.Option(help="Holds what was measured.")] = None,
) -> None:
    """Run the claims that have not been run."""
    folder = results or (ROOT / "out" / "tiny" if tiny else claims.FOLDER / "results")
    found = cells(only or [], seeds, folder, tiny)
    if show:
        for cell in found:
            report.say(f"{'done' if cell.done else 'to do':<6}{cell.name}")
        return
    try:  # before hours of measuring
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(f"--results {folder} cannot be written: {error}") from None
    with tqdm([cell for cell in found if not cell.done], unit="cell") as bar:
        for cell in bar:
            bar.set_postfix_str(cell.name)
            measure(cell, seeds or cell.claim.seeds_of(cell.case), folder, tiny)
    for name in dict.fromkeys(cell.claim.name for cell in found):
        if tiny:
            report.say(f"{name}: runs")
        else:
            report.say(tables(claims.load(name), folder))
    if write and not tiny and results is None:
        PAGE.write_text(written(PAGE.read_text("utf-8"), folder), encoding="utf-8")
        for name in dict.fromkeys(cell.claim.name for cell in found):
            claim = claims.load(name)
            if claim_figures.is_drawn(claim, measured := claims.results(claim, folder)):
                claim_figures.draw(claim, measured)


if __name__ == "__main__":
    sys.path.append(str(ROOT / "examples"))  # the rater lies there
    typer.run(main)

"""A first problem and sweep, which `gradhpo init` writes for a person to change."""

from __future__ import annotations

from pathlib import Path

FILES = ("problem.py", "sweep.toml")


def write_starter(folder: Path) -> list[Path]:
    """Write the files into a folder; return their paths.

    Raises:
      FileExistsError: if one is there already; nothing is written then.
    """
    made = [folder / name for name in FILES]
    for path in made:
        if path.exists():
            raise FileExistsError(f"{path} is there already, and is not replaced")
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        path.write_text((Path(__file__).parent / path.name).read_text())
    return made

"""The command `gradhpo`, and `python -m gradhpo.cluster`."""

import importlib.util
import sys


def main() -> None:
    """Run the command line."""
    if importlib.util.find_spec("typer") is None:
        sys.exit("gradhpo: the command line needs typer: pip install 'gradhpo[cluster]'")
    from gradhpo.cluster import cli

    cli.app()


if __name__ == "__main__":
    main()

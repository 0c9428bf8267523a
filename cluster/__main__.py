"""The command `gradhpo`, and `python -m gradhpo.cluster`."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        import typer as _
    except ImportError:
        sys.exit("gradhpo: the command line needs typer: pip install gradhpo[cluster]")
    from gradhpo.cluster import cli

    cli.app()


if __name__ == "__main__":
    main()

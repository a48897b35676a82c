"""The `covft` command, and `python -m covft`.

Apart from `cli.py`, so that an installation without the extra `cli` says so in one sentence.
"""

from __future__ import annotations

import sys

from covft.errors import MissingDependencyError


def main() -> None:
    """Run the command; without the libraries of the extra `cli`, name it and exit with code 2."""
    try:
        from covft.cli import main as run
    except MissingDependencyError as error:
        print(f"{error.problem} Fix: {error.fix}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()

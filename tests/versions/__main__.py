"""Runs the tests with other releases of Python, torch, transformers and the rest: `make versions`.

    python -m tests.versions [ROW ...]     by default every row
    python -m tests.versions --page        write docs/versions.md from the results alone

Each row of rows.py gets an environment in .versions/, which is removed afterwards; its log stays there. Results are
in tests/versions/results. It needs the standard library and pip. PIP_ARGS, TORCH and PYTEST_ARGS are those of the
Makefile.
"""

from __future__ import annotations

import argparse
import sys

from tests.versions.page import PAGE, page
from tests.versions.rows import ROWS
from tests.versions.running import run


def main() -> int:
    """Run the rows one after the other; return 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description="Run the tests with other releases.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: {' '.join(ROWS)}")
    parser.add_argument("--keep", action="store_true", help="keep the environments; the next run reuses them")
    parser.add_argument("--page", action="store_true", help="only write docs/versions.md")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.rows) - set(ROWS))
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    names = [] if arguments.page else arguments.rows or list(ROWS)
    failed = [name for name in names if not run(ROWS[name], arguments.keep)]
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{len(names) - len(failed)} passed, {len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

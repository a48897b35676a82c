"""Wraps every ViT of a library, in batches that can be interrupted, and writes the results.

python -m benchmarks.coverage timm|open_clip|transformers|all
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib import metadata

from benchmarks.coverage import page
from covft.adapters.coverage import LIBRARIES


def main() -> None:
    """Run the missing checks for the installed versions, then write the table and the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("library", choices=[*LIBRARIES, "all"])
    parser.add_argument("--batch", type=float, default=300, help="seconds after which a new process takes over")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    parser.add_argument("--page", action="store_true", help="run nothing, only write the table and the page")
    arguments = parser.parse_args()
    page.RESULTS.mkdir(exist_ok=True)
    for library in LIBRARIES if arguments.library == "all" else (arguments.library,):
        if not arguments.page:
            sweep(library, arguments.batch, fresh=arguments.fresh)
    page.write()


def sweep(library: str, batch: float, *, fresh: bool) -> None:
    """Check the models without a result, batch by batch, each in its own process to free its memory.

    Args:
        library: The library.
        batch: Seconds of a batch.
        fresh: Whether to discard earlier results. Those for another version of the library are always discarded.
    """
    installed, known = metadata.version(page.DISTRIBUTIONS[library]), page.versions()
    file = page.results_file(library)
    if fresh or known[library] != installed:
        file.unlink(missing_ok=True)
    written = json.dumps({**known, library: installed}, indent=1) + "\n"
    (page.RESULTS / "versions.json").write_text(written, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        f"benchmarks.coverage.{library}_models",
        "--out",
        str(file),
        "--seconds",
        str(batch),
    ]
    while True:
        before = len(page.read(library))
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if len(page.read(library)) == before:
            return


if __name__ == "__main__":
    main()

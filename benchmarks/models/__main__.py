"""Measure every checkpoint on the meta device, and write the tables.

python -m benchmarks.models
"""

from __future__ import annotations

import json

from benchmarks.models.checkpoints import CHECKPOINTS
from benchmarks.models.measure import measure
from benchmarks.models.page import PAGES, RESULTS, written


def main() -> None:
    """Write `results.json`, and the tables of the pages from it."""
    rows = [measure(checkpoint) for checkpoint in CHECKPOINTS]
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(written(page, rows), encoding="utf-8")


if __name__ == "__main__":
    main()

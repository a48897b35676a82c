"""Writes the screenshots of the docs: `python -m tests.helpers.screenshots PAGE FOLDER`, of a page of a report."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.helpers.chromium import browser

SHOTS = {  # name: width, height, scheme, section
    "diagnosis-light": (1000, 760, "light", "diagnosis"),
    "contexts-dark": (1000, 760, "dark", "contexts"),
    "diagnosis-phone": (390, 760, "light", "diagnosis"),
    "attention-phone": (390, 760, "dark", "attention"),
}


def main(page: str, folder: str) -> None:
    """Write a PNG of each section that the page has."""
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as tab:
        for name, (width, height, scheme, section) in SHOTS.items():
            tab.window(width, height, scheme)
            tab.open(Path(page))
            if tab.run(f"!!document.getElementById('{section}')"):
                tab.run(f"document.getElementById('{section}').scrollIntoView()")
                tab.screenshot(output / f"{name}.png")
                print(output / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])

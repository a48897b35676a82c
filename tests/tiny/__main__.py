"""Write a small random model of a family, with its processor, a data set and an image. Nothing is downloaded.

python -m tests.tiny FAMILY FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.tiny.folders import TINY, write


def main() -> None:
    """Read the arguments, and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.tiny", description="A small random model, with data.")
    parser.add_argument("family", choices=TINY)
    parser.add_argument("folder", type=Path, help="Where to write model/, data/ and image.png.")
    args = parser.parse_args()
    write(args.family, args.folder)
    print(f"{args.folder}: model, data, image.png")


if __name__ == "__main__":
    main()

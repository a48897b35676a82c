"""What the guards of the package and of the repository read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it along where the standard library has none
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def project_files():
    """List the files that are, or would be, in the repository; without one, all files of the tree."""
    if (ROOT / ".git").exists():
        done = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        names = [ROOT / name for name in done.stdout.split("\0") if name]
    else:  # an unpacked sdist, perhaps inside the repository of something else
        left_out = {".venv", ".real", "site", "build", "dist"}
        names = [path for path in ROOT.rglob("*") if not left_out & set(path.relative_to(ROOT).parts)]
    files = [path for path in names if path.is_file()]
    assert len(files) > 20
    return files


def modules():
    """Names of the modules and folders of the package."""
    return {path.stem for path in (ROOT / "covft").iterdir() if path.suffix == ".py" or path.is_dir()}

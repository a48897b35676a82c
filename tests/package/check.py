"""Builds the sdist and the wheel into dist/, and tries both as a user would: `make package`.

    python tests/package/check.py [EXTRA ...]     by default every extra that needs no compiler

The tests of the metadata run in the unpacked sdist. The wheel is installed without extras, then with each, in
environments of their own, where `smoke.py` uses it. An environment with an extra sees the packages of the one without,
so that torch is installed once. PIP_ARGS goes to every pip install.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
EXTRAS = (
    "timm",
    "open-clip",
    "transformers",
    "sentence-transformers",
    "train",
    "analysis",
    "metrics",
    "cli",
    "onnx",
    "all",
)
SDIST_TESTS = (
    "tests/test_project.py",
    "tests/test_package.py",
    "tests/test_packaging.py",
    "tests/test_docs.py",
    "tests/test_cli.py",
)


def main() -> None:
    """Build, then check; the first failure ends the run with its command's output above."""
    parser = argparse.ArgumentParser(description="Build the sdist and the wheel and try them in clean environments.")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"default: {' '.join(EXTRAS)}")
    extras = parser.parse_args().extras or EXTRAS
    sdist, wheel = build()
    with tempfile.TemporaryDirectory() as folder:
        check_sdist(sdist, Path(folder))
        core = environment(Path(folder) / "core", wheel)
        smoke(core, "core", Path(folder))
        for extra in extras:
            python = environment(Path(folder) / extra, wheel, extra, below=core)
            smoke(python, extra, Path(folder))
            shutil.rmtree(Path(folder) / extra)
    print(f"::: good: {sdist.name} and {wheel.name}, without extras and with {', '.join(extras)}")


def build() -> tuple[Path, Path]:
    """Build the sdist, and from it the wheel."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def check_sdist(sdist: Path, folder: Path) -> None:
    """Run the tests of the metadata, the pages and the command in the unpacked sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    run(sys.executable, "-m", "pytest", "-q", *SDIST_TESTS, cwd=folder / sdist.name.removesuffix(".tar.gz"))


def environment(folder: Path, wheel: Path, extra: str | None = None, below: Path | None = None) -> Path:
    """Create an environment with the wheel, over the packages of the environment of the Python `below`.

    Returns:
        Its Python.
    """
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if below is not None:
        (packages_of(python) / "below.pth").write_text(f"{packages_of(below)}\n", encoding="utf-8")
    pip = [python, "-m", "pip", "install", "-q", *shlex.split(os.environ.get("PIP_ARGS", ""))]
    if extra is None:
        run(*pip, wheel)
    else:
        run(*pip, "--no-deps", "--ignore-installed", wheel)  # its own copy, with the command
        run(*pip, f"{wheel}[{extra}]")
    return python


def packages_of(python: Path) -> Path:
    """Return the folder of the packages of an environment."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def smoke(python: Path, extra: str, folder: Path) -> None:
    """Use the installed package, from a folder that is not the repository."""
    empty = folder / f"empty-{extra}"
    empty.mkdir()
    run(python, "-W", "error::DeprecationWarning:covft", SMOKE, extra, cwd=empty)


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Print and run a command; end this program if it fails."""
    print(":::", *command, flush=True)
    done = subprocess.run([str(part) for part in command], cwd=cwd, check=False)
    if done.returncode:
        sys.exit(f"::: failed with code {done.returncode}")


if __name__ == "__main__":
    main()

"""Starts the worker in several processes, which meet at a file, and waits for all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.distributed.llava import save_base

ROOT = Path(__file__).resolve().parents[2]
LIMIT_IN_SECONDS = 180  # gloo gives up sooner where one waits for another; this is for what hangs elsewhere


def run(scenario: str, folder: Path, world: int = 2, *more: str, worker: str = "tests.distributed.worker") -> None:
    """Run a scenario of the worker in a folder; what the processes wrote to their logs is in the failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-W", "ignore", "-m", worker, scenario]
    save_base(folder)
    logs = [folder / f"log-{rank}.txt" for rank in range(world)]
    workers: list[subprocess.Popen[bytes]] = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            arguments = [*command, str(rank), str(world), str(folder), *more]
            workers.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=LIMIT_IN_SECONDS) for process in workers]
    finally:
        for process in workers:
            process.kill()
            process.wait()
    assert not any(codes), "\n".join(log.read_text(encoding="utf-8")[-4000:] for log in logs)

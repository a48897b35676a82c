"""Runs one batch of checks: models without a result, until the time is up."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.coverage.check import Result


def options(description: str | None, *, sized: bool = True) -> argparse.ArgumentParser:
    """Return the options of every library's command.

    Args:
        description: Of the command.
        sized: Whether models may be too large to run.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    if sized:
        parser.add_argument("--largest", type=int, default=150, help="million parameters up to which a model is run")
    return parser


def run(
    arguments: argparse.Namespace, names: Iterable[str], check: Callable[[str], dict[str, Any]], key: str = "name"
) -> None:
    """Check the models without a result, and append a line for each.

    Args:
        arguments: As parsed by `options`.
        names: Models to check.
        check: Returns the line of a model.
        key: The field of a line that holds the name.
    """
    torch.set_num_threads(1)
    start, done = time.perf_counter(), set()
    if arguments.out.exists():
        done = {json.loads(line)[key] for line in arguments.out.read_text().splitlines()}
    with arguments.out.open("a") as file:
        for name in names:
            if name in done:
                continue
            if time.perf_counter() - start > arguments.seconds:
                break
            file.write(json.dumps(check(name)) + "\n")
            file.flush()
            gc.collect()
    lines = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    print(dict(Counter(line["verdict"] for line in lines)))


def with_two_blocks(whole: Result, shallow: Result) -> Result:
    """Complete the result of a full model on the meta device with that of two of its blocks, which were run.

    Args:
        whole: Of the full model; changed in place.
        shallow: Of the model with two blocks.
    """
    whole.change, whole.ffn_change = shallow.change, shallow.ffn_change
    whole.missing_gradients, whole.device = shallow.missing_gradients, "meta, and two blocks on the cpu"
    if shallow.verdict != "wrapped":
        whole.verdict, whole.reason = shallow.verdict, f"with two blocks: {shallow.reason}"
    return whole

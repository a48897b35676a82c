"""What several runs need, made once before their processes are forked: text features, and projectors to start from.

They are made by processes with as many threads as a run has, so that they are what a run alone would make. The parent
only keeps them, for its children to find.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any

from study.runs import starts, texts
from study.runs.methods import reads_states
from study.runs.settings import RunSettings
from study.runs.tables import draw

Make = Callable[[], Any]
Keep = Callable[[Any], None]


def prepare(runs: Sequence[RunSettings], *, jobs: int, threads: int, show: bool = True) -> None:
    """Make what at least two runs need, and keep it for processes that are forked from this one.

    What cannot be made is left to the runs, which say why.

    Args:
        runs: The runs, on a CPU.
        jobs: Processes.
        threads: Threads of each.
        show: Whether to show progress.
    """
    from rich.progress import track

    made = [*_shared_starts(runs), *_shared_texts(runs)]
    if not made:
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(jobs, len(made)), context, _use_threads, (threads,)) as pool:
        keeps = {pool.submit(_pickled, make): keep for make, keep in made}
        for done in track(as_completed(keeps), "what runs share", len(made), disable=not show):
            if done.exception() is None:
                keeps[done](pickle.loads(done.result()))


def _shared_starts(runs: Sequence[RunSettings]) -> list[tuple[Make, Keep]]:
    """Return projectors that runs start from."""
    found: dict[str, list[RunSettings]] = defaultdict(list)
    for run in runs:
        first = starts.of_projector(run)
        found[str(first)].append(first)
    return [
        (partial(starts.projector, same[0], "cpu"), partial(starts.keep_projector, same[0], "cpu"))
        for same in found.values()
        if len(same) > 1
    ]


def _shared_texts(runs: Sequence[RunSettings]) -> list[tuple[Make, Keep]]:
    """Return features of texts, or states of their tokens, that MiniLM makes."""
    found: list[tuple[Make, Keep]] = []
    for states in (False, True):
        wanted = [
            {text: None for table in draw(run) for text in texts.texts_read(run, table)}
            for run in runs
            if run.text_encoder == "minilm" and (reads_states(run) if states else run.method == "covft")
        ]
        read = tuple({text: None for own in wanted for text in own})
        if len(wanted) > 1 and read:
            found.append((partial(texts.encode, "minilm", read, states=states), partial(texts.keep, read, states)))
    return found


def _use_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _pickled(make: Make) -> bytes:
    return pickle.dumps(make())  # as bytes: torch would send tensors as files that end with their process

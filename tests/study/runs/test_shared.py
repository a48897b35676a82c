"""What several runs need is made once, and is what each would have made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from study.runs import shared, starts, texts
from study.runs.build import new_llava
from study.runs.settings import RunSettings
from study.runs.starts import of_projector
from study.runs.tables import draw

TINY: dict[str, Any] = {
    "steps": 3, "first_steps": 2, "train_scenes": 24, "held_out_scenes": 24, "held_out_questions": 4, "batch": 8,
    "tasks": ("count", "caption"),
}  # fmt: skip


def lengths(given: tuple[str, ...], *, states: bool = False) -> torch.Tensor:
    """Stands for MiniLM."""
    rows = torch.tensor([[float(len(text))] * texts.WIDTH for text in given])
    return rows[:, None].expand(-1, 8, -1) if states else rows


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork of a process that has had more cannot use them
    monkeypatch.setattr(starts, "_known", {})
    monkeypatch.setattr(texts, "_known", {False: {}, True: {}})
    monkeypatch.setattr(texts, "encode_texts", lengths)
    yield
    torch.set_num_threads(threads)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("made again")


def test_what_runs_share_is_what_each_would_make(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [RunSettings(**TINY), RunSettings(**TINY, control="generic"), RunSettings(**TINY, method="full")]
    alone = starts.projector(of_projector(runs[0]), "cpu")
    shared.prepare(runs, jobs=2, threads=1, show=False)
    monkeypatch.setattr(starts, "fit", refuse)
    monkeypatch.setattr(texts, "encode_texts", refuse)
    llava = new_llava(runs[0])
    starts.start(llava, runs[0], "cpu")
    found = llava.model.multi_modal_projector.state_dict()
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[name], value) for name, value in alone.items())
    for run in runs[:2]:
        for table in draw(run):
            rows = texts.text_rows(run, table, states=False)
            read = [texts.generic()] * len(table.texts) if run.control == "generic" else table.texts
            assert rows[:, 0].tolist() == [len(text) for text in read]


def test_what_one_run_needs_is_left_to_it() -> None:
    shared.prepare([RunSettings(**TINY), RunSettings(**TINY, method="qa_vit", seed=1)], jobs=2, threads=1, show=False)
    assert (starts._known, texts._known) == ({}, {False: {}, True: {}})


def test_states_of_tokens_are_shared_too() -> None:
    runs = [RunSettings(**TINY, method=method) for method in ("qa_vit", "cross_attention")]
    shared.prepare(runs, jobs=2, threads=1, show=False)
    assert texts._known[False] == {}
    assert {text for table in draw(runs[0]) for text in table.texts} == texts._known[True].keys()
    assert next(iter(texts._known[True].values())).shape == (8, texts.WIDTH)


def test_what_fails_is_left_to_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "encode_texts", refuse)
    shared.prepare([RunSettings(**TINY), RunSettings(**TINY, experts=2)], jobs=2, threads=1, show=False)
    assert len(starts._known) == 1
    assert texts._known == {False: {}, True: {}}

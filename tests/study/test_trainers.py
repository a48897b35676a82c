"""The study's LLaVA in covft's trainer and in transformers': equal, falling losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import covft
from covft.data import IGNORE_INDEX
from covft.integrations import CoVFTCallback, MLLMTrainer, MLLMTrainingArguments, get_encoder, train_only
from study.data.scenes import as_batch, make_scenes
from study.data.tasks import Example, make_examples
from study.data.tokenizer import build_tokenizer, prompt
from study.llava import build_llava
from study.towers import IMAGE_TOKENS, small_vit


class Batches:
    """Examples as batches of LLaVA, padded on the left, with the questions as `context_text` for an attached model."""

    def __init__(self, pictures: torch.Tensor, tokenizer: Any) -> None:
        self.pictures, self.tokenizer, self.ids = pictures, tokenizer, tokenizer.get_vocab()

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        answers = [[self.ids[word] for word in f"{e.answer} <eos>".split()] for e in examples]
        asked = [[self.ids[word] for word in prompt(e.question, IMAGE_TOKENS).split()] for e in examples]
        longest = max(len(before) + len(after) for before, after in zip(asked, answers, strict=True))
        ids = torch.full((len(examples), longest), self.tokenizer.pad_token_id)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for row, (before, after) in enumerate(zip(asked, answers, strict=True)):
            ids[row, longest - len(before) - len(after) :] = torch.tensor(before + after)
            labels[row, longest - len(after) :] = torch.tensor(after)
        return {
            "input_ids": ids,
            "attention_mask": (ids != self.tokenizer.pad_token_id).long(),
            "labels": labels,
            "pixel_values": self.pictures[[e.scene for e in examples]],
            "context_text": [e.question for e in examples],
        }


@pytest.fixture(autouse=True)
def _quiet_transformers():
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.mark.long
def test_both_trainers_have_the_same_falling_losses(tmp_path: Path) -> None:
    from transformers import Trainer

    scenes, tokenizer = make_scenes("train", 24), build_tokenizer()
    questions: Any = make_examples(scenes)
    collate = Batches(torch.from_numpy(as_batch(scenes)), tokenizer)
    curves = []
    for kind, trainer_class in (("ours", MLLMTrainer), ("plain", Trainer)):
        model = build_llava(small_vit(), folder=None)
        callback = CoVFTCallback(covft.testing.HashTextEncoder(64), layers=[3, 4], experts=2)
        args = MLLMTrainingArguments(
            str(tmp_path / kind),
            max_steps=12,
            per_device_train_batch_size=12,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            weight_decay=0.01,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            seed=3,
        )
        trainer = trainer_class(model, args, collate, train_dataset=questions, callbacks=[callback])
        assert get_encoder(trainer.model).layers == (3, 4)
        counts = train_only(model, ["projector", "llm", "covft"])
        assert counts["experts"] == 2 * 2 * sum(p.numel() for p in small_vit().encoder.layers[0].mlp.parameters())
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    ours, plain = curves
    assert len(ours) == 12
    assert ours == pytest.approx(plain, abs=1e-5)
    assert sum(ours[-3:]) < 0.7 * sum(ours[:3])

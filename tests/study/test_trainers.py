"""The study's LLaVA in covft's trainer and in transformers': equal, falling losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import covft
from covft.integrations import CoVFTCallback, MLLMTrainer, MLLMTrainingArguments, get_encoder, train_only
from study.batches import Collator, Questions
from study.data.scenes import as_batch, make_scenes
from study.data.tasks import make_examples
from study.data.tokenizer import build_tokenizer
from study.llava import build_llava
from study.towers import small_vit


class Batches:
    """The study's collator, with the questions as `context_text`, which an attached model reads."""

    def __init__(self, inputs: torch.Tensor, pad_token_id: int) -> None:
        self.collator = Collator(inputs, pad_token_id)

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        batch = self.collator(rows)
        return {**batch, "context_text": batch.pop("questions")}


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
    questions = Questions(make_examples(scenes), tokenizer)
    collate = Batches(torch.from_numpy(as_batch(scenes)), tokenizer.pad_token_id)
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

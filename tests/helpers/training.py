"""A tiny LLaVA with its data, for trainers; also run as a script, by tests that kill it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import covft
from covft.data import Collator, ConversationDataset, ImageText, LlavaRows
from tests.helpers.mllm_configs import PATCH, SIZE
from tests.helpers.mllms import BY_NAME
from tests.helpers.towers import perturb

QUESTIONS = ("what is left of the cup?", "how many people are there?", "where is the dog?", "is the ball red?")
TEXTS = covft.testing.HashTextEncoder(16)
COVFT_PARTS = ("experts", "router", "norms")
WORDS = ("a dog", "two people stand there", "a red ball", "yes", "to the left of a cup and a ball", "no")


def write_folder(folder: Path, rows: int = 12, text_only: tuple[int, ...] = (2, 7)) -> Path:
    """A LLaVA folder: `train.json` and `images/`; answers differ in length, and some rows have no image."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for row in range(rows):
        question, answer = QUESTIONS[row % 4], " and ".join(WORDS[(row + i) % 6] for i in range(1 + row % 3))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        record: dict[str, Any] = {"id": str(row), "conversations": turns}
        if row not in text_only:
            pixels = random.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{row}.png")
            turns[0]["value"], record["image"] = f"<image>\n{question}", f"{row}.png"
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def dataset(folder: Path) -> ConversationDataset:
    from transformers import CLIPImageProcessor

    side = {"height": SIZE, "width": SIZE}
    return ConversationDataset(
        LlavaRows(folder / "train.json", folder / "images"),
        BY_NAME["llava"].tokenizer,
        CLIPImageProcessor(size=side, crop_size=side),
        image_text=ImageText("<image>", per_tile=(SIZE // PATCH) ** 2),
    )


def build(seed: int = 0, *, attached: bool = True, **settings: Any) -> Any:
    """LLaVA with seeded weights; attached, its experts still equal."""
    torch.manual_seed(seed)
    model = BY_NAME["llava"].build()
    if attached:
        covft.attach(model, TEXTS, tokenizer=BY_NAME["llava"].tokenizer, **settings)
    return model


def tower_name(model: Any) -> str:
    """The name of the module with the tower's parts; before release 5 of transformers CLIP had one more level."""
    names = [name for name, _ in model.named_modules() if name.endswith(".encoder.layers")]
    return names[0].removesuffix(".encoder.layers")


def arguments(output: Path, **changes: Any) -> Any:
    from covft.integrations import MLLMTrainingArguments

    options: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 7,
        "dataloader_pin_memory": False,
    }
    return MLLMTrainingArguments(str(output), **{**options, **changes})


def collator(rows):
    return Collator(rows.tokenizer.pad_token_id, rows.image_shape)


def trained_updates(folder: Path, **changes: Any) -> Any:
    """Train nine steps on the data in a folder, comparing each update; return the trainer."""
    from transformers import Trainer

    from covft.integrations import CoVFTCallback, get_encoder, train_only

    model, rows = build(), dataset(folder / "data")
    train_only(model, ["covft"])
    perturb_alike(get_encoder(model))
    args = arguments(folder / "out", max_steps=9, **changes)
    callbacks: list[Any] = [CoVFTCallback(conflict_every=1)]
    trainer = Trainer(model, args, collator(rows), train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def perturb_alike(encoder):
    torch.manual_seed(11)
    perturb(encoder)


def main(folder: str, output: str, kill_at: str, resume: str) -> None:
    """Train eight steps with a checkpoint every two; `kill_at` is where or when the process kills itself."""
    import os
    import signal
    import threading

    from transformers import TrainerCallback

    from covft.integrations import MLLMTrainer, train_only

    class Killer(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if kill_at.startswith("after "):
                seconds = float(kill_at.removeprefix("after "))
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

        def on_step_begin(self, args, state, control, **kwargs):
            if kill_at == f"step {state.global_step}":
                os.kill(os.getpid(), signal.SIGKILL)

    class Trainer(MLLMTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            if kill_at == f"saving {self.state.global_step}":
                os.kill(os.getpid(), signal.SIGKILL)
            super()._save_optimizer_and_scheduler(output_dir)

    torch.set_num_threads(1)
    model = build(routing="sparse")
    model.model.language_model.config.attention_dropout = 0.1  # so that random states matter
    train_only(model, ("projector", "llm", "covft"))
    args = arguments(
        Path(output),
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        group_by_modality_length=True,
        global_batch_size=4,
    )
    trainer = Trainer(model, args, train_dataset=dataset(Path(folder)), callbacks=[Killer()])
    trainer.train(resume_from_checkpoint=resume == "resume")
    torch.save(model.state_dict(), Path(output) / "final.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

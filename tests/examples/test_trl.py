"""TRL's trainers with LoRA on the language model and experts in the tower: what they save is all that was trained."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.testing import HashTextEncoder
from tests.examples.folders import COLOURS, write_llava_model

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TEXTS = HashTextEncoder(16)
LORA = r".*language_model.*\.(q|v)_proj"
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is left of the cup?"}]}]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_llava_model(tmp_path_factory.mktemp("llava")) / "model"


def answer(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def rows(**columns):
    import datasets
    from PIL import Image

    made = [
        {"images": [Image.new("RGB", (40, 30), colour)], **{name: of(word) for name, of in columns.items()}}
        for word, colour in COLOURS.items()
    ]
    return datasets.Dataset.from_list(made)


def trainer(kind, model, output):
    """A trainer of TRL for two steps with a checkpoint after each, of a model by its path."""
    import peft

    data = {
        "sft": lambda: rows(messages=lambda word: QUESTION + answer(word)),
        "dpo": lambda: rows(prompt=lambda _: QUESTION, chosen=answer, rejected=lambda _: answer("no")),
        "grpo": lambda: rows(prompt=lambda _: QUESTION),
        "rloo": lambda: rows(prompt=lambda _: QUESTION),
    }
    makers = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }
    make, config = makers[kind]
    sampling = kind in ("grpo", "rloo")
    own = {"num_generations": 2, "max_completion_length": 4} if sampling else {"max_length": None}
    reward = {"reward_funcs": lambda completions, **_: [float(len(str(text))) for text in completions]}
    args = config(
        str(output), max_steps=2, save_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        bf16=False, report_to=[], **own,
    )  # fmt: skip
    return make(
        str(model),
        args=args,
        train_dataset=data[kind](),
        peft_config=peft.LoraConfig(r=2, target_modules=LORA),
        callbacks=[covft.CoVFTCallback(TEXTS)],
        **(reward if sampling else {}),
    )


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "rloo"])
def test_save_model__of_every_trainer_is_all_that_was_trained(kind, llava, tmp_path):
    made = trainer(kind, llava, tmp_path / "run")
    start = {name: parameter.clone() for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    made.train()
    made.save_model(str(tmp_path / "final"))
    trained = made.model.state_dict()
    moved = {name for name, tensor in start.items() if not torch.equal(tensor, trained[name])}
    assert {"experts", "lora_B"} <= {part for name in moved for part in name.split(".")}
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-2"):
        model, _ = covft.load_model(folder, TEXTS, base=llava)
        loaded = model.state_dict()
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in trained.items())

"""peft's save_pretrained of an attached model: the tower and what else was trained are beside the adapters."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import covft
from covft.errors import CheckpointError
from covft.integrations import CoVFTCallback, MLLMTrainer, get_encoder, train_only
from covft.integrations.training.peft_saving import save_with_adapters
from tests.helpers.attached import CUP, PEOPLE
from tests.helpers.hub import without_repositories
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.snapshots import aligned
from tests.helpers.towers import perturb
from tests.helpers.training import arguments, build, collator, same, state

pytestmark = pytest.mark.usefixtures("quiet")
peft = pytest.importorskip("peft")
LORA = {"r": 2, "target_modules": r".*language_model.*\.(q|v)_proj", "init_lora_weights": False}
ALL = {"adapter_config.json", "adapter_model.safetensors", "covft/covft_config.json", "covft/model.safetensors"}
ALL |= {"covft/trained.json", "covft/trained.safetensors"}


def with_lora(parts=("projector", "llm", "covft"), **changes):
    """An attached LLaVA with LoRA whose projector, norms, experts and adapters differ from those it was built with."""
    model = peft.get_peft_model(build(), peft.LoraConfig(**{**LORA, **changes}))
    train_only(model, parts)
    perturb(get_encoder(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "projector" in name and parameter.requires_grad:
                parameter.add_(0.1)
    return model.eval()


def checkpointed(model):
    """Put each layer of the language model into torch's wrapper, as accelerate's fsdp_activation_checkpointing does."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "DecoderLayer" in type(child).__name__:
                setattr(parent, name, checkpoint_wrapper(child))
    return model


@functools.cache
def batch():
    return BY_NAME["llava"].batch(build(attached=False), [Row(1, CUP), Row(1, PEOPLE)]).inputs


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def files(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def assert_loads(folder, model):
    """The folder alone, and the model that LoRA was trained on, make the same model again."""
    assert files(folder) >= ALL
    given = {"base": build(attached=False), "processor": BY_NAME["llava"].tokenizer}
    again, _ = covft.load_model(folder, **given)
    assert same(state(again), state(model))
    assert torch.equal(logits(aligned(again)), logits(model))


def test_save_pretrained__of_peft_takes_tower_and_projector_along(tmp_path):
    model = with_lora()
    model.save_pretrained(tmp_path)
    assert_loads(tmp_path, model)


def test_save_pretrained__with_lora_in_the_tower_too(tmp_path):
    model = with_lora(["llm", "vision", "covft"], target_modules=r".*self_attn\.(q|v)_proj")
    assert any("vision_tower" in name and "lora_" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    assert_loads(tmp_path, model)


@pytest.mark.parametrize("given", [False, True], ids=["peft's own state dict", "state_dict="])
def test_save_pretrained__adapters_that_peft_does_not_find_are_refused(given, tmp_path):
    model = checkpointed(with_lora())
    save_with_adapters(model)
    options = {"state_dict": model.state_dict()} if given else {}
    with pytest.raises(CheckpointError, match=r"gradient_checkpointing_enable") as caught:
        model.save_pretrained(tmp_path, **options)
    assert "inside, such as base_model.model" in str(caught.value)
    assert files(tmp_path) <= {"README.md"}


def test_callback__adapters_that_peft_does_not_find_are_refused_before_training(rows, tmp_path):
    from transformers import Trainer

    model = checkpointed(with_lora())
    trainer = Trainer(model, arguments(tmp_path), collator(rows), train_dataset=rows, callbacks=[CoVFTCallback()])
    with pytest.raises(CheckpointError, match="gradient_checkpointing=True of the trainer"):
        trainer.train()


def test_save_pretrained__of_a_gathered_state_dict(tmp_path):
    """As the Trainer calls it where it shards the model: every tensor comes from the state dict."""
    model = with_lora()
    save_with_adapters(model)
    gathered, values = state(model), state(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path / "mine", state_dict=gathered)
    model.save_pretrained(tmp_path / "others", state_dict=gathered, is_main_process=False)
    model.load_state_dict(values)
    assert_loads(tmp_path / "mine", model)
    assert not files(tmp_path / "others")


def test_save_pretrained__inside_a_model_that_only_wraps_the_tower(tmp_path):
    model = build(attached=False).requires_grad_(False)
    encoder = covft.wrap(model.model.vision_tower, 16)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    encoder.unfreeze()
    perturb(encoder)
    wrapped.save_pretrained(tmp_path)
    assert files(tmp_path) >= ALL
    again = covft.load(tmp_path / "covft", build(attached=False).model.vision_tower, 16)
    assert same(again.vit.state_dict(), encoder.vit.state_dict())


def test_save_pretrained__of_peft_without_covft_is_peft_s_own(tmp_path):
    model = build()
    plain = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    save_with_adapters(plain)
    covft.detach(model)
    plain.save_pretrained(tmp_path / "a")
    plain.save_pretrained(tmp_path / "b", state_dict=plain.state_dict())
    assert files(tmp_path / "a") == files(tmp_path / "b") == {"README.md", *(n for n in ALL if "/" not in n)}


@pytest.mark.parametrize("kind", ["plain", pytest.param("ours", marks=pytest.mark.slow)])
def test_save_model__after_training_with_lora(kind, rows, tmp_path):
    from transformers import Trainer

    model = with_lora()
    args = arguments(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    if kind == "ours":
        trainer = MLLMTrainer(model, args, train_dataset=rows)
    else:
        trainer = Trainer(model, args, collator(rows), train_dataset=rows, callbacks=[CoVFTCallback()])
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # accelerate 1.6 leaves its autocast
    model.eval()
    assert_loads(tmp_path / "final", model)
    assert_loads(tmp_path / "run" / "checkpoint-2", model)
    first = covft.load_model(
        tmp_path / "run" / "checkpoint-1", base=build(attached=False), processor=BY_NAME["llava"].tokenizer
    )[0]
    assert not same(state(first), state(model))


@pytest.mark.slow
def test_save_model__of_the_best_checkpoint_with_lora(rows, tmp_path):
    from transformers import Trainer

    model = with_lora()
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    args = arguments(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1, **best)
    trainer = Trainer(model, args, collator(rows), train_dataset=rows, eval_dataset=rows, callbacks=[CoVFTCallback()])
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] > losses[1]  # the highest is called the best, so it is not the last
    trainer.save_model(str(tmp_path / "final"))
    model.eval()
    assert_loads(tmp_path / "final", model)
    assert_loads(tmp_path / "run" / "checkpoint-1", model)


def test_push_to_hub__of_peft_takes_the_tower_along(monkeypatch):
    from transformers.utils import hub

    seen: set[str] = set()
    monkeypatch.setattr(
        hub.PushToHubMixin, "_upload_modified_files", lambda self, folder, *args, **kwargs: seen.update(files(folder))
    )
    without_repositories(monkeypatch)
    with_lora().push_to_hub("me/mine")
    assert seen >= ALL

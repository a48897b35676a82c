"""Saves a trained model as a folder that `from_pretrained` loads."""

from __future__ import annotations

import contextlib
from typing import Any

from covft.errors import ConfigError
from covft.integrations.mllm.attachment import attachment_of
from covft.tuning.tuned import TunedViT
from covft.utils.arguments import check_kinds
from covft.utils.sharding import full, gathered, is_sharded


def merged(model: Any) -> Any:
    """Return the model inside a PeftModel, its adapters added to the weights; those that tune the tower stay.

    Args:
        model: A `PeftModel`, attached or not.
    """
    attachment = attachment_of(model)
    encoder = None if attachment is None else attachment.encoder
    with encoder.aside() if isinstance(encoder, TunedViT) else contextlib.nullcontext():
        return model.merge_and_unload()


@check_kinds
def save_trained(trainer: Any, *processors: Any) -> None:
    """Save the model of a trainer to its output folder, LoRA merged into the weights.

    Call it on every process, as the last step: sharded weights are gathered, and merging changes the model.

    Args:
        trainer: An `MLLMTrainer`, after training.
        *processors: Tokenizer, image processor or processor, to save next to the model.

    Raises:
        ConfigError: If it is not a trainer.
    """
    if not hasattr(trainer, "accelerator"):
        got = type(trainer).__name__
        raise ConfigError("save_trained() saves the model of a trainer.", expected="an MLLMTrainer", got=got)
    folder, writes = trainer.args.output_dir, trainer.is_world_process_zero()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        with gathered(list(model.parameters()), changed=True):
            model = merged(model)
        state = model.state_dict(keep_vars=True)
        sharded = any(is_sharded(tensor) for tensor in state.values())
        options = {"state_dict": {name: full(tensor).cpu() for name, tensor in state.items()}} if sharded else {}
        model.save_pretrained(folder, is_main_process=writes, **options)
    else:
        trainer.save_model()
    for processor in processors if writes else ():
        processor.save_pretrained(folder)

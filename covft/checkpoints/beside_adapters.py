"""What peft's `save_pretrained` leaves out of a model around a wrapped ViT.

peft writes its adapters. `covft/` beside them has the adapted ViT and all other trained tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from covft.checkpoints.folder import FOLDER
from covft.checkpoints.trained import trained_outside, write_trained
from covft.errors import CheckpointError
from covft.surgery.adapted import AdaptedViT
from covft.surgery.save_guard import RunningSave
from covft.surgery.wrapped import prefix_of
from covft.utils.peft import is_adapter
from covft.utils.sharding import is_main_process, is_sharded
from covft.utils.torch_internals import CHECKPOINTED


def check_adapters_are_found(model: nn.Module) -> None:
    """Raise if adapters lie inside torch's checkpoint wrapper, because peft would not save them.

    Args:
        model: A PeftModel, or any other.

    Raises:
        CheckpointError: If there are some.
    """
    lost = [name for name, part in model.named_modules() if CHECKPOINTED in name.split(".") and is_adapter(part)]
    if lost:
        raise CheckpointError(
            "peft does not find its adapters inside torch's checkpoint_wrapper, and would save a file without them.",
            expected="adapters in modules that are not wrapped",
            got=f"{len(lost)} inside, such as {lost[0]}",
            fix="gradient_checkpointing=True of the trainer, or model.gradient_checkpointing_enable(), instead of "
            "fsdp_activation_checkpointing or apply_activation_checkpointing",
        )


def save_beside_adapters(encoder: AdaptedViT, running: RunningSave) -> None:
    """Write `covft/` while peft collects the tensors of its adapters.

    Args:
        encoder: The wrapped ViT.
        running: The call of peft's `save_pretrained`, without a state dict.

    Raises:
        CheckpointError: If weights are sharded: then the call needs a gathered state dict. If peft does not find its
            adapters.
    """
    check_adapters_are_found(running.model)
    if missing := ungathered(encoder, running.model, {}):
        raise CheckpointError(
            "Weights are sharded, and peft's save_pretrained does not gather them.",
            expected="state_dict=",
            got=f"{len(missing)} sharded tensors, such as {missing[0]}",
            fix="a trainer with covft.CoVFTCallback, or model.save_pretrained(folder, state_dict=...) for the adapters "
            "and covft.get_encoder(model).save_pretrained(folder + '/covft') on every process",
        )
    if running.writes and is_main_process():
        write_beside_adapters(encoder, running.model, Path(running.directory), {})


def write_beside_adapters(encoder: AdaptedViT, model: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the adapted ViT, and the trained tensors outside it, to the sub-folder `covft/`.

    Args:
        encoder: The wrapped ViT.
        model: The PeftModel around it.
        folder: Where peft has put its adapters.
        state: Gathered tensors of the model by name, at least those that are sharded.
    """
    prefix = prefix_of(encoder.vit, model)
    vit = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    encoder.write(folder / FOLDER, gathered=vit, writes=True)
    write_trained(encoder, model, folder / FOLDER, gathered=state)


def ungathered(encoder: AdaptedViT, model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return the sharded tensors that `write_beside_adapters` needs and a state dict does not have.

    Args:
        encoder: The wrapped ViT.
        model: The PeftModel around it.
        state: Gathered tensors of the model by name.
    """
    prefix = prefix_of(encoder.vit, model)
    inside = encoder.vit.state_dict(keep_vars=True)
    needed = {**{prefix + name: tensor for name, tensor in inside.items()}, **trained_outside(encoder, model)}
    return [name for name, tensor in needed.items() if is_sharded(tensor) and name not in state]

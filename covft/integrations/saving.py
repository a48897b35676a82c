"""Saving an attached model: its weights as they were, and what covft added beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from covft import saving
from covft.errors import CheckpointError
from covft.integrations.attachment import Attachment
from covft.sharding import full, is_main_process, is_partitioned, is_sharded

FOLDER = "covft"


def save(attachment: Attachment, save_pretrained: Any, given: dict[str, Any]) -> None:
    """Save the model as one that `from_pretrained` loads, and the adapted tower in `covft/` beside it.

    What was trained outside the tower is saved as it is. `attach(..., pretrained=folder / "covft")` puts the
    adapted tower back. As for any model of transformers, the first process writes alone. Under FSDP2 every process
    calls this without a state dict, or one with a state dict that was gathered; under ZeRO-3 there has to be one.

    Args:
        attachment: What attach() left on the model.
        save_pretrained: The model's own method.
        given: Its arguments, by name.

    Raises:
        CheckpointError: If an option would write something else, or if weights are spread over processes.
    """
    for option, fix in {
        "push_to_hub": "model.push_to_hub(repo_id)",
        "distributed_checkpoint": "model.save_pretrained(folder)",
    }.items():
        if given.get(option):
            raise CheckpointError(
                f"save_pretrained({option}=True) would not save an attached model as a whole.",
                expected=f"{option}=False",
                got=f"{option}=True",
                fix=fix,
            )
    state, writes = given.get("state_dict"), given.get("is_main_process", True) and is_main_process()
    if state is None:
        state = _whole_state(attachment, writes=writes)
    if state or writes:  # those who only took part have nothing
        save_pretrained(**{**given, "state_dict": original_state(attachment, state)})
    prefix = _tower(attachment)
    tower = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if writes:
        attachment.saved_in = Path(given["save_directory"]) / FOLDER
        saving.save(attachment.encoder, attachment.saved_in, gathered=tower, writes=True)


def original_state(attachment: Attachment, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the attached model with the tower as it was before, and all else as it is.

    Args:
        attachment: What attach() left on the model.
        state: A state dict of the model, which another library may have gathered.
    """
    original, tower = attachment.encoder.original, _tower(attachment)
    ffns = {f"{tower}{path}.": ffn for path, ffn in original.ffns.items()}
    values = {f"{tower}{name}": value for name, value in original.values.items()}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in ffns if name.startswith(prefix)), None)
        if prefix is None:
            result[name] = values[name].to(tensor) if name in values else tensor
        elif f"{prefix}experts.0." in name:
            # In the place and of the type of the first expert, which is called as the FFN was.
            value = ffns[prefix].state_dict().get(name.removeprefix(f"{prefix}experts.0."))
            if value is not None:
                result[prefix + name.removeprefix(f"{prefix}experts.0.")] = value.to(tensor)
    return result


def _whole_state(attachment: Attachment, *, writes: bool) -> dict[str, Tensor]:
    """The state dict of the model, made whole tensor by tensor; empty on a process that only takes part."""
    state = attachment.model.state_dict(keep_vars=True)
    sharded = {name for name, tensor in state.items() if is_sharded(tensor)}
    partitioned = [name for name in sharded if is_partitioned(state[name])]
    if partitioned and writes:
        raise CheckpointError(
            "ZeRO-3 has partitioned the weights, so save_pretrained needs them gathered.",
            expected="state_dict=",
            got=f"{len(partitioned)} parameters that are elsewhere, such as {min(partitioned)}",
            fix="model.save_pretrained(folder, state_dict=accelerator.get_state_dict(engine), "
            "is_main_process=accelerator.is_main_process)",
        )
    if partitioned:
        return {}  # the state dict that DeepSpeed gathers is None here: the first process has it
    whole: dict[str, Tensor] = {}
    for name, tensor in state.items():
        value = full(tensor)
        if writes or not sharded:
            whole[name] = value.cpu() if name in sharded else value
    return whole


def _tower(attachment: Attachment) -> str:
    modules = attachment.model.named_modules()
    return next(f"{name}." for name, module in modules if module is attachment.encoder.vit)

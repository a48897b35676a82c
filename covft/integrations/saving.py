"""Saving an attached model: its weights as they were, and what covft added beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from covft.errors import CheckpointError
from covft.integrations.attachment import Attachment

FOLDER = "covft"


def save(attachment: Attachment, save_pretrained: Any, given: dict[str, Any]) -> None:
    """Save the model as one that `from_pretrained` loads, and the adapted tower in `covft/` beside it.

    What was trained outside the tower is saved as it is. `attach(..., pretrained=folder / "covft")` puts the
    adapted tower back.

    Args:
        attachment: What attach() left on the model.
        save_pretrained: The model's own method.
        given: Its arguments, by name.

    Raises:
        CheckpointError: If an option would write something else.
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
    state = given.get("state_dict")
    state = attachment.model.state_dict() if state is None else state
    save_pretrained(**{**given, "state_dict": original_state(attachment, state)})
    if given.get("is_main_process", True):
        attachment.encoder.save_pretrained(Path(given["save_directory"]) / FOLDER)


def original_state(attachment: Attachment, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the attached model with the tower as it was before, and all else as it is.

    Args:
        attachment: What attach() left on the model.
        state: A state dict of the model, which another library may have gathered.
    """
    encoder = attachment.encoder
    tower = next(name for name, module in attachment.model.named_modules() if module is encoder.vit)
    ffns = {f"{tower}.{path}.": ffn for path, ffn in encoder.original.ffns.items()}
    values = {f"{tower}.{name}": value for name, value in encoder.original.values.items()}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in ffns if name.startswith(prefix)), None)
        if prefix is None:
            result[name] = values[name].to(tensor) if name in values else tensor
        elif f"{prefix}experts.0." in name:
            # In the place and of the type of the first expert, which is called as the FFN was.
            original = ffns[prefix].state_dict().get(name.removeprefix(f"{prefix}experts.0."))
            if original is not None:
                result[prefix + name.removeprefix(f"{prefix}experts.0.")] = original.to(tensor)
    return result

"""Saving an attached model: its weights as they were, and what covft added beside them."""

from __future__ import annotations

from typing import Any

from covft import native
from covft.errors import CheckpointError
from covft.integrations.attachment import Attachment

FOLDER = native.FOLDER


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
    if given.get("push_to_hub"):
        raise CheckpointError(
            "save_pretrained(push_to_hub=True) would not save an attached model as a whole.",
            expected="push_to_hub=False",
            got="push_to_hub=True",
            fix="model.push_to_hub(repo_id)",
        )
    folder = native.save(attachment.encoder, attachment.model, save_pretrained, given)
    if folder is not None:
        attachment.saved_in = folder

"""Completes what peft saves of an attached model, where the trainer gives it a gathered state dict."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from covft.checkpoints.beside_adapters import check_adapters_are_found, ungathered, write_beside_adapters
from covft.checkpoints.folder import FOLDER
from covft.integrations.mllm.attachment import attachment_of
from covft.surgery.overrides import Override
from covft.utils.sharding import is_main_process

_METHOD = "save_pretrained"


class SaveWithAdapters(Override):
    """Overrides `save_pretrained` of a PeftModel: adds `covft/` to the adapters, also from a gathered state dict.

    Without a state dict peft collects the tensors itself. The tower notices that, and writes `covft/` without this.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Save the adapters and `covft/`; warn where the state dict has too little for that.

        Raises:
            CheckpointError: If peft does not find its adapters.
        """
        check_adapters_are_found(self.owner)
        given = self._named(self._own(args), kwargs)
        self.inner(**given)
        attachment, state = attachment_of(self.owner), given.get("state_dict")
        if attachment is None or state is None or not (given.get("is_main_process", True) and is_main_process()):
            return
        encoder, folder = attachment.encoder, Path(given["save_directory"])
        missing = ungathered(encoder, self.owner, state)
        if not missing:
            write_beside_adapters(encoder, self.owner, folder, state)
        elif not re.fullmatch(r"(tmp-)?checkpoint-\d+", folder.name):  # there, the callback gathers them afterwards
            warnings.warn(
                f"{folder} has the adapters of peft, but not the context-aware tower: {len(missing)} tensors are "
                f"sharded, such as {missing[0]}, and the trainer has not gathered them. covft/ of the last checkpoint "
                f"has them. Fix: covft.get_encoder(model).save_pretrained({str(folder / FOLDER)!r}) on every process.",
                UserWarning,
                stacklevel=2,
            )


def save_with_adapters(model: nn.Module) -> None:
    """Have `save_pretrained` of a PeftModel around an attached model write `covft/` in every case.

    Args:
        model: An attached model; one that is not a PeftModel stays as it is.
    """
    if hasattr(model, "peft_config") and not isinstance(model.__dict__.get(_METHOD), SaveWithAdapters):
        SaveWithAdapters(model, _METHOD).install()

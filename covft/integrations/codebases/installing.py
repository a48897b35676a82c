"""What attach() of LLaVA's and InternVL's own code shares: wrap the tower, and override methods of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Unpack

from covft.adapters.families import ViTFamily
from covft.adapters.registry import list_adapters
from covft.adapters.spec import Adapter
from covft.config import Settings
from covft.integrations.mllm.attach import plan_tower
from covft.integrations.mllm.attachment import KEY, Attachment
from covft.integrations.mllm.families import MLLMFamily
from covft.integrations.mllm.overrides import Call, SaveCall
from covft.integrations.mllm.prompt import PromptReader

# The text of placeholder images, whose features are thrown away.
NO_IMAGE = "no image"
_PREFIX_TOKENS = {"InternVisionModel": (1,), "SigLipVisionModel": (0,)}


@dataclass(eq=False)
class TowerAttachment(Attachment):
    """An attachment that reads the instruction row by row."""

    def read(self, row: int, given: Mapping[str, Any]) -> str:
        """Return the instruction of one row of `input_ids`.

        Args:
            row: The row.
            given: Arguments of the call, by name.

        Raises:
            MissingContextError: If there is none.
        """
        mask, labels = given.get("attention_mask"), given.get("labels")
        return self.reader.read(given["input_ids"], [row], attention_mask=mask, labels=labels)[0]

    @property
    def is_idle(self) -> bool:
        """Whether nothing has to be read: no text is needed, or one is open around the call."""
        conditioning = self.encoder.conditioning
        return not conditioning.needs_text or conditioning.scope() is not None


def install(
    model: nn.Module,
    tower: nn.Module,
    text_encoder: Any,
    reader: PromptReader,
    calls: Mapping[str, type[Call]],
    *,
    read: int | None = None,
    pretrained: str | Path | None = None,
    **settings: Unpack[Settings],
) -> None:
    """Wrap the tower in place and override methods of the model.

    Args:
        model: The whole model, not inside peft.
        tower: The ViT in it.
        text_encoder: As for `covft.wrap`.
        reader: Reads its prompts.
        calls: The overrides by method of the model; that of `save_pretrained` is added.
        read: The hidden state of the tower that the model reads; None for the last.
        pretrained: A saved tower to start from, instead of settings.
        **settings: As for `covft.wrap`.

    Raises:
        ConfigError: If a setting cannot work.
        UnsupportedViTError: If the tower cannot be wrapped.
        CheckpointError: If `pretrained` does not fit.
    """
    plan = plan_tower(tower, text_encoder, read, pretrained, None, _adapter_for(tower), settings)
    attachment = TowerAttachment(model, plan.install(), reader, MLLMFamily())
    model.__dict__[KEY] = attachment
    for name, kind in {**calls, "save_pretrained": SaveCall}.items():
        if hasattr(type(model), name):
            kind(attachment, name).install()


def _adapter_for(tower: nn.Module) -> Adapter | None:
    """Return an adapter for a ViT class that only this codebase has, its blocks found by structure; None for others."""
    if any(adapter.matches(tower) for adapter in list_adapters()):
        return None
    cls = type(tower)
    name = f"{cls.__module__}.{cls.__qualname__}"
    prefix = _PREFIX_TOKENS.get(cls.__name__, ())
    return ViTFamily(name=name, classes=(name,), library=cls.__module__.partition(".")[0], prefix_tokens=prefix)

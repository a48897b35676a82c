"""What attach() of every codebase does: make the tower context-aware, and stand in for methods of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from covft.adapters.families import ViTFamily
from covft.adapters.registry import list_adapters, register_adapter
from covft.checkpoint import load
from covft.encoder import ContextEncoder
from covft.errors import ConfigError, MissingContextError, UnsupportedViTError
from covft.integrations.attaching import KEY, attachment_of, check_all_read_runs, without_peft
from covft.integrations.attachment import Attachment
from covft.integrations.calls import Call, SaveCall
from covft.integrations.models import MLLMFamily
from covft.integrations.prompt import PromptReader
from covft.wrapping import wrap

# The text of images that stand for none: their features are thrown away.
NO_IMAGE = "no image"
_PREFIX_TOKENS = {"InternVisionModel": (1,), "SigLipVisionModel": (0,)}


@dataclass(eq=False)
class TowerAttachment(Attachment):
    """An attachment that may have an instruction for rows that have none of their own.

    Attributes:
        default_text: That instruction; None where such a row is an error.
    """

    default_text: str | None = None

    def read(self, row: int, given: Mapping[str, Any]) -> str:
        """The instruction of one row of `input_ids`.

        Args:
            row: The row.
            given: Arguments of the call, by name.

        Raises:
            MissingContextError: If there is none, and no default.
        """
        try:
            return self.reader.read(
                given["input_ids"], [row], attention_mask=given.get("attention_mask"), labels=given.get("labels")
            )[0]
        except MissingContextError:
            if self.default_text is None:
                raise
            return self.default_text

    @property
    def is_idle(self) -> bool:
        """Whether nothing has to be read: no text is needed, or one is open around the call."""
        conditioning = self.encoder.conditioning
        return not conditioning.needs_text or conditioning.scope() is not None


def unattached(model: nn.Module) -> Any:
    """The model itself, without a PeftModel around it.

    Args:
        model: What is to be attached.

    Raises:
        UnsupportedViTError: If it is attached already.
    """
    if attachment_of(model) is not None:
        raise UnsupportedViTError("This model is attached already.", expected=f"a {type(model).__name__} as it was")
    return without_peft(model)


def install(
    model: nn.Module,
    tower: nn.Module,
    text_encoder: Any,
    reader: PromptReader,
    calls: Mapping[str, type[Call]],
    *,
    read: int | None = None,
    default_text: str | None = None,
    pretrained: str | Path | None = None,
    **settings: Any,
) -> None:
    """Wrap the tower in place and stand in for methods of the model.

    Args:
        model: The whole model, not inside peft.
        tower: The ViT in it.
        text_encoder: As for `covft.wrap`.
        reader: Reads its prompts.
        calls: What stands for which method of the model; `save_pretrained` is added.
        read: The hidden state of the tower that it reads; None for the last.
        default_text: For rows without an instruction.
        pretrained: A saved tower to start from, instead of settings.
        **settings: As for `covft.wrap`.

    Raises:
        ConfigError: If a setting cannot work.
        UnsupportedViTError: If the tower cannot be wrapped.
        CheckpointError: If `pretrained` does not fit.
    """
    if pretrained is not None and settings:
        raise ConfigError(
            "A saved tower has its settings with it.",
            expected="pretrained, or settings",
            got=f"pretrained and {', '.join(settings)}",
        )
    _make_known(tower)
    encoder: ContextEncoder
    if pretrained is None:
        encoder = wrap(tower, text_encoder, **settings)
    else:
        encoder = load(pretrained, tower, text_encoder)
    check_all_read_runs(encoder, read)
    # From here on nothing can fail.
    attachment = TowerAttachment(model, encoder, reader, MLLMFamily(), default_text=default_text)
    model.__dict__[KEY] = attachment
    for name, kind in {**calls, "save_pretrained": SaveCall}.items():
        if hasattr(type(model), name):
            kind(attachment, name).stand_in()


def _make_known(tower: nn.Module) -> None:
    """Tell the registry of a class of ViTs that only this codebase has; its blocks are found by structure."""
    if any(adapter.matches(tower) for adapter in list_adapters()):
        return
    cls = type(tower)
    name = f"{cls.__module__}.{cls.__qualname__}"
    prefix = _PREFIX_TOKENS.get(cls.__name__, ())
    library = cls.__module__.partition(".")[0]
    register_adapter(ViTFamily(name=name, classes=(name,), library=library, prefix_tokens=prefix))

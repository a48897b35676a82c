"""Attaches models that a codebase brings along: the part that LLaVA's and InternVL's own code share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from covft.adapters.families import ViTFamily
from covft.adapters.registry import list_adapters
from covft.adapters.spec import Adapter
from covft.checkpoints.pretrained import prefix_of
from covft.errors import ConfigError
from covft.integrations.codebases.conversations import prompt_reader
from covft.integrations.codebases.launch import Flags, launch
from covft.integrations.mllm.attach import plan_tower, unattached
from covft.integrations.mllm.attachment import KEY, Attachment
from covft.integrations.mllm.balance import LossOverride
from covft.integrations.mllm.families import MLLMFamily
from covft.integrations.mllm.overrides import MethodOverride, SaveOverride
from covft.surgery.packed import naming_tower
from covft.tuning.api import COVFT

Model = TypeVar("Model", bound=nn.Module)
_PREFIX_TOKENS = {"InternVisionModel": (1,), "SigLipVisionModel": (0,)}


class Codebase(ABC):
    """Makes the towers of one codebase context-aware.

    Attributes:
        program: The launcher's module, for `python -m`.
        loader: Dotted name of the function with which evaluation scripts load a model and its tokenizer.
        overrides: Overrides by method of the model; `save_pretrained` is added to them.
        unread_fix: What to do if the conversation has no user turns to read.
    """

    program: ClassVar[str]
    loader: ClassVar[str]
    overrides: ClassVar[Mapping[str, type[MethodOverride] | type[LossOverride]]]
    unread_fix: ClassVar[str]

    def attach(
        self,
        model: Model,
        text_encoder: Any = None,
        *,
        tokenizer: Any,
        conversation: Any = None,
        turns: str = "all",
        system: str | None = None,
        empty_instruction: str | None = None,
        pretrained: str | Path | None = None,
        method: str = COVFT,
        **settings: Any,
    ) -> Model:
        """Make the tower of a model context-aware, or tune it by another method, in place.

        The model is called as before, and each image is conditioned on the instruction of its row. Dummy images of
        rows without one are encoded with a fixed text. Inside an open `covft.get_encoder(model).condition(...)`
        prompts are not read.

        Args:
            model: A model of this codebase, with its tower loaded.
            text_encoder: As for `covft.wrap`.
            tokenizer: The model's tokenizer.
            conversation: The template of the prompts: a conversation object of the codebase, a name in
                `covft.data.CHAT_TEMPLATES` or a Jinja chat template; None takes the codebase's default.
            turns: User turns that make the instruction: `"all"`, `"first"` or `"last"`.
            system: As for `covft.attach`.
            empty_instruction: Instruction of rows whose user says nothing; None makes such a row an error.
            pretrained: A saved tower to start from, instead of settings.
            method: How the tower is tuned, as for `covft.tune`; those without text read no prompts.
            **settings: As for `covft.wrap`: `layers`, `experts`, `routing`, ...; or the options of the method.

        Returns:
            The model itself.

        Raises:
            ConfigError: If a setting cannot work, or the conversation has no user turns to read.
            UnsupportedViTError: If the model is of another kind, or its tower cannot be wrapped.
            CheckpointError: If `pretrained` does not fit.

        Example:
            >>> attach(model, tokenizer=tokenizer, pretrained=folder + "/covft")  # doctest: +SKIP
        """
        target = unattached(model)
        tower, read = self.find_tower(target)
        if conversation is None:
            conversation = self.default_conversation(target)
        reading: Any = {"turns": turns, "system": system, "empty_instruction": empty_instruction}
        reader = prompt_reader(tokenizer, conversation, self.image_ids(tokenizer), **reading)
        with naming_tower(prefix_of(tower, target).rstrip(".")):
            plan = plan_tower(tower, text_encoder, read, pretrained, None, _adapter_for(tower), settings, method=method)
        if reader.marks is None and empty_instruction is None and plan.needs_text:
            raise ConfigError(
                f"The instruction cannot be read from these prompts. {reader.problem}",
                expected="a conversation with user turns",
                got=self.describe(conversation),
                fix=self.unread_fix,
            )
        reader.has_null_text = plan.null_text
        attachment = TowerAttachment(target, plan.install(), reader, MLLMFamily())
        target.__dict__[KEY] = attachment
        overrides = {**self.overrides, "save_pretrained": SaveOverride}
        attachment.override({name: override for name, override in overrides.items() if hasattr(type(target), name)})
        self.finish(target)
        return model

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run a training or evaluation script of the codebase with a context-aware tower.

        Args:
            arguments: Command-line arguments; None takes those of the process.
        """

        def attach(model: nn.Module, tokenizer: Any, flags: Flags, pretrained: str | Path | None) -> None:
            self.attach(
                model,
                flags.text_encoder_for(pretrained),
                tokenizer=tokenizer,
                conversation=self.named_conversation(flags),
                pretrained=pretrained,
                method=flags.method,
                **flags.reading,
                **flags.settings,
            )

        launch(self.program, attach, loader=self.loader, arguments=arguments, check=self.check_flags)

    @abstractmethod
    def find_tower(self, model: Any) -> tuple[nn.Module, int | None]:
        """Return the tower of a model, and the hidden state that the model reads; None means the last.

        Raises:
            UnsupportedViTError: If the model is of another kind, or its tower cannot be wrapped.
        """

    @abstractmethod
    def default_conversation(self, model: Any) -> Any:
        """Return the conversation that wrote the prompts, if the caller names none."""

    def describe(self, conversation: Any) -> str:
        """Name a conversation for an error, by the flag that chooses it where there is one."""
        return str(getattr(conversation, "name", conversation))

    def named_conversation(self, flags: Flags) -> Any:
        """Return the conversation that the command line names, or None."""
        return flags.chat_template

    def image_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the ids of image placeholders; negative ones need not be named."""
        return ()

    def check_flags(self, flags: Flags) -> None:
        """Refuse command lines that cannot work, before anything is loaded."""
        return

    def finish(self, model: Any) -> None:
        """Make further changes to the model, after all checks."""
        return


@dataclass(eq=False)
class TowerAttachment(Attachment):
    """An attachment that reads instructions row by row."""

    def read(self, row: int, given: Mapping[str, Any]) -> str:
        """Return the instruction of one row of `input_ids`.

        Raises:
            MissingContextError: If the row has none.
        """
        mask, labels = given.get("attention_mask"), given.get("labels")
        return self.reader.read(given["input_ids"], [row], attention_mask=mask, labels=labels)[0]

    @property
    def is_idle(self) -> bool:
        """Whether no prompt has to be read: no text is needed, or one is open around the call."""
        conditioning = self.encoder.conditioning
        return not conditioning.needs_text or conditioning.scope() is not None


def _adapter_for(tower: nn.Module) -> Adapter | None:
    """Return an adapter for a ViT class that only this codebase has, its blocks found by structure; None for others."""
    if any(adapter.matches(tower) for adapter in list_adapters()):
        return None
    cls = type(tower)
    name = f"{cls.__module__}.{cls.__qualname__}"
    prefix = _PREFIX_TOKENS.get(cls.__name__, ())
    return ViTFamily(name=name, classes=(name,), library=cls.__module__.partition(".")[0], prefix_tokens=prefix)

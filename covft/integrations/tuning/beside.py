"""What is tuned beside the tower of a multimodal LLM: its language model and its projector."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations.mllm.attachment import Attachment, without_peft
from covft.integrations.training.parts import parts_of
from covft.tuning.method import check_choice
from covft.tuning.tuned import TunedViT
from covft.utils.arguments import check_kinds, check_sizes
from covft.utils.extras import import_library

METHODS = ("frozen", "full", "last_layers", "top_layer", "lora", "dora")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class LanguageTuning:
    r"""How the language model of a multimodal LLM is tuned.

    Attributes:
        method: `"frozen"`, `"full"`, `"last_layers"`, `"top_layer"` (the last block), `"lora"` or `"dora"` (by peft, on
            every linear layer of the blocks).
        n: Number of blocks of `"last_layers"`.
        r: Rank of `"lora"` and `"dora"`.
        alpha: Scale of their updates; they are multiplied by alpha / r.
        dropout: Dropout before the update, in training.
    """

    method: str = "full"
    n: int = 4
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choice("language", self.method, *METHODS)
        check_sizes(n=self.n, r=self.r)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} is not a share.", expected="0 <= dropout < 1", got=self.dropout)

    @classmethod
    def of(cls, language: str | Mapping[str, Any]) -> LanguageTuning:
        """Return the choice that a name stands for, or a mapping with `method` and its options.

        Raises:
            ConfigError: If the method or an option is not known.
        """
        options: dict[str, Any] = {"method": language} if isinstance(language, str) else dict(language)
        known = tuple(cls.__dataclass_fields__)
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(
                f"language has no option {', '.join(map(str, unknown))}.",
                expected=", ".join(known),
                got=", ".join(map(str, unknown)),
                fix='language={"method": "lora", "r": 8}',
            )
        return cls(**options)


@dataclass(frozen=True)
class Beside:
    """A checked plan of what is tuned outside the tower.

    Attributes:
        model: The multimodal LLM, attached or not, without a PeftModel around it.
        language: How its language model is tuned; None leaves that as it is.
        projector: Whether its projector is trained; None leaves that as it is.
        trained: Names of the language model's parameters that are trained.
        linears: Paths of its linear layers that peft adapts.
    """

    model: nn.Module
    language: LanguageTuning | None
    projector: bool | None
    trained: frozenset[str] = frozenset()
    linears: tuple[str, ...] = ()

    def install(self, model: nn.Module, attachment: Attachment) -> Any:
        """Apply the plan to a model whose tower is tuned.

        Args:
            model: What `tune` was given.
            attachment: Of the model; notes what has changed.

        Returns:
            The model; a `PeftModel` around it if its language model has adapters.
        """
        parts = parts_of(self.model)
        own = {name: p for name, p in self.model.named_parameters() if parts[name] in ("llm", "projector")}
        if isinstance(attachment.encoder, TunedViT):  # its method decides on these
            change = attachment.encoder.change
            decided = {id(p) for p in (*(p for _, p in change.new_parameters()), *change.idle_parameters())}
            own = {name: parameter for name, parameter in own.items() if id(parameter) not in decided}
        before = {name: parameter.requires_grad for name, parameter in own.items()}
        tower = {id(parameter) for parameter in attachment.encoder.vit.parameters()}  # which may hold the projector
        attachment.outside = {name: trained for name, trained in before.items() if id(own[name]) not in tower}
        if self.linears:
            model = self._with_adapters()
            attachment.linears = self.linears
            attachment.encoder.unfreeze()  # peft has frozen all that it did not add
            for name, trained in before.items():
                own[name].requires_grad_(trained)
        for name, parameter in own.items():
            if parts[name] == "projector" and self.projector is not None:
                parameter.requires_grad_(self.projector and parameter.is_floating_point())
            if parts[name] == "llm" and self.language is not None:
                parameter.requires_grad_(name in self.trained)
        return model

    def _with_adapters(self) -> Any:
        assert self.language is not None
        peft: Any = import_library("peft", "train", needed_by="language='lora'")
        names = "|".join(map(re.escape, self.linears))
        config = peft.LoraConfig(
            r=self.language.r,
            lora_alpha=self.language.alpha,
            lora_dropout=self.language.dropout,
            use_dora=self.language.method == "dora",
            target_modules=rf"({names})",
        )
        with warnings.catch_warnings():  # the first time is the tower's own LoRA
            warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
            return peft.get_peft_model(self.model, config)


def plan_beside(model: nn.Module, language: str | Mapping[str, Any] | None, projector: bool | None) -> Beside:
    """Check what is going to be tuned outside the tower; nothing is changed.

    Args:
        model: A multimodal LLM.
        language: How its language model is tuned: a method, or a mapping with `method` and its options.
        projector: Whether its projector is trained.

    Raises:
        ConfigError: If the method or an option is not known.
        UnsupportedViTError: If the model has no such part, or adapters of peft already.
    """
    target, chosen = without_peft(model), None if language is None else LanguageTuning.of(language)
    parts = parts_of(target)
    if projector is not None and "projector" not in parts.values():
        raise UnsupportedViTError(
            f"{type(target).__name__} has no projector that covft knows.", expected="projector=None", got=projector
        )
    if chosen is None or chosen.method == "frozen":
        return Beside(target, chosen, projector)
    if chosen.method in ("lora", "dora"):
        import_library("peft", "train", needed_by=f"language={chosen.method!r}")
        if hasattr(target, "peft_config") or target is not model:
            raise UnsupportedViTError(
                "This model has adapters of peft already.",
                expected="a model without adapters, or language=None",
                got=f"language={chosen.method!r}",
                fix="peft_model.unload() first",
            )
        inside = tuple(f"{path}." for path in _blocks(target, parts))
        linears = tuple(
            path
            for path, module in target.named_modules()
            if path.startswith(inside) and type(module).__name__ in ("Linear", "Linear4bit", "Linear8bitLt", "Conv1D")
        )
        return Beside(target, chosen, projector, linears=linears)
    everything = [name for name, p in target.named_parameters() if parts[name] == "llm" and p.is_floating_point()]
    if chosen.method == "full":
        return Beside(target, chosen, projector, frozenset(everything))
    blocks = _blocks(target, parts)
    n = 1 if chosen.method == "top_layer" else chosen.n
    if n > len(blocks):
        raise UnsupportedViTError(
            f"n={n} asks for more blocks than the language model has.", expected=f"n in [1, {len(blocks)}]", got=n
        )
    last = tuple(f"{path}." for path in blocks[-n:])
    return Beside(target, chosen, projector, frozenset(name for name in everything if name.startswith(last)))


def restore_outside(attachment: Attachment) -> None:
    """Undo `Beside.install`: adapters are gone, and what was trainable is; trained values stay.

    Args:
        attachment: Of the model.
    """
    model: Any = attachment.model
    for path in attachment.linears:
        model.set_submodule(path, model.get_submodule(path).get_base_layer())
    if attachment.linears:
        model.__dict__.pop("peft_config", None)
    own = dict(model.named_parameters())
    for name, trained in attachment.outside.items():
        own[name].requires_grad_(trained)


def _blocks(model: Any, parts: Mapping[str, str]) -> list[str]:
    """Return the paths of the blocks of the language model, in order.

    Raises:
        UnsupportedViTError: If they are not found.
    """
    config: Any = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", None)
    in_llm = [name for name, part in parts.items() if part == "llm"]
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            if any(name.startswith(f"{path}.") for name in in_llm):
                return [f"{path}.{index}" for index in range(len(module))]
    raise UnsupportedViTError(
        f"The blocks of the language model of {type(model).__name__} were not found.",
        expected=f"a list of {depth} blocks",
        got=", ".join(name for name, _ in model.named_children()),
    )

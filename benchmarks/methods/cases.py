"""The methods that are measured, with their options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.sizes import Size


@dataclass(frozen=True)
class Case:
    """A method with options.

    Attributes:
        method: Its name.
        options: Those that differ from the defaults, as JSON values.
        of: What the options are for, if it is not plain.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    of: str = ""

    @property
    def name(self) -> str:
        """The method and its options in a few words."""
        options = ", ".join(f"{name}={_short(value)}" for name, value in self.options.items())
        return f"{self.method}, {options}" if options else self.method


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]} to {value[-1]}"
    return str(value)


def cases(size: Size) -> tuple[Case, ...]:
    """Return all of them, `frozen` and `full` first, to which the others are compared.

    Args:
        size: Sizes of the tower; the options are scaled down for a toy.
    """
    four = list(range(max(size.depth - 5, 0), size.depth - 1))
    return (
        Case("frozen"),
        Case("full"),
        Case("bitfit"),
        Case("layernorm"),
        Case("top_layer"),
        Case("last_layers", {"n": 4}),
        Case("ffn"),
        Case("lora", {"r": 8}),
        Case("lora", {"r": min(512, size.embed_dim // 2), "targets": "attention"}, "the paper's Table 7"),
        Case("dora", {"r": 8}),
        Case("vpt", {"prompts": 10}),
        Case("vpt", {"prompts": 10, "deep": False}),
        Case("svpt", {"prompts": 10}),
        Case("qa_vit"),
        Case("adaln"),
        Case("cross_attention"),
        Case("covft"),
        Case("covft", {"layers": four}, "the paper's Table 7"),
        Case("covft", {"expert_rank": min(64, size.embed_dim // 4)}),
    )

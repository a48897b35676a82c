"""A value of every kind to put into arguments, and what calls take."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn as torch_nn

import covft
from covft import testing, text

VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "one": 1,
    "negative": -7,
    "huge": 10**30,
    "fraction": 2.5,
    "nan": float("nan"),
    "word": "nonsense",
    "nothing": "",
    "nul": "a\0b",
    "bytes": b"bytes",
    "list": [1, None],
    "empty": [],
    "dict": {"a": 1},
    "set": {"a"},
    "object": object(),
    "class": dict,
    "function": lambda *args, **kwargs: None,
    "tensor": torch.ones(2),
    "module": torch_nn.Linear(2, 2),
}
# By a word in an annotation: the values above that are of its kind. A value of its kind may still be refused.
_NUMBERS = {"one", "negative", "huge"}
_KINDS: dict[str, set[str]] = {
    "None": {"none"},
    "bool": {"true"},
    "int": _NUMBERS,
    "float": _NUMBERS | {"fraction"},
    "str": {"word", "nothing", "nul"},
    "Path": {"word"},
    "Sequence": {"empty"},
    "Iterable": {"empty", "set", "dict"},
    "Collection": {"empty", "set", "dict"},
    "list": {"empty"},
    "Mapping": {"dict"},
    "dict": {"dict"},
    "Callable": {"class", "function", "module"},
    "Module": {"module"},
    "Tensor": {"tensor"},
}


def of_kind(annotation: str) -> set[str]:
    """Names of the values that an annotation lets in."""
    return set().union(*(_KINDS.get(word, set()) for word in re.findall(r"\w+", annotation)))


class World:
    """What calls take, built on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def vit(self) -> torch_nn.Module:
        return testing.ToyViT()

    @functools.cached_property
    def encoder(self) -> covft.ContextEncoder:
        encoder = covft.wrap(testing.ToyViT(), testing.HashTextEncoder(8), layers=[1, 2], experts=3)
        encoder(self.images, ["a cup", "a dog"])
        return encoder

    @functools.cached_property
    def tuned(self) -> torch_nn.Module:
        return covft.tune(testing.ToyViT(), "bitfit")

    @functools.cached_property
    def images(self) -> torch.Tensor:
        return torch.rand(2, 3, 16, 16)

    @functools.cached_property
    def entries(self) -> list[tuple[torch.Tensor, str, str]]:
        return [(torch.rand(3, 16, 16), "what is it?", "ab"[number % 2]) for number in range(16)]

    @functools.cached_property
    def saved(self) -> Path:
        self.encoder.save_pretrained(self.folder / "saved")
        return self.folder / "saved"

    @functools.cached_property
    def tiny(self) -> testing.TinyMLLM:
        return testing.tiny_llava(depth=3)

    @functools.cached_property
    def attached(self) -> testing.TinyMLLM:
        tiny = testing.tiny_llava(depth=3)
        covft.attach(tiny.model, testing.HashTextEncoder(8), tokenizer=tiny.tokenizer, layers=[1], experts=2)
        return tiny

    @functools.cached_property
    def rows(self) -> Path:
        turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cup"}]
        return self._write("rows.json", [{"id": "0", "image": "cup.png", "conversations": turns}])

    @functools.cached_property
    def meta(self) -> Path:
        entry = {"root": str(self.folder), "annotation": str(self.rows), "data_augment": False, "repeat_time": 1}
        return self._write("meta.json", {"cups": {**entry, "length": 1}})

    @functools.cached_property
    def picture(self) -> Any:
        from PIL import Image

        return Image.new("RGB", (20, 10))

    @functools.cached_property
    def table(self) -> Path:
        text.FeatureTable.precompute(testing.HashTextEncoder(8), ["a cup"], self.folder / "table.safetensors")
        return self.folder / "table.safetensors"

    def built(self) -> list[torch_nn.Module]:
        """The models that are built by now."""
        found = [self.__dict__[name] for name in ("vit", "encoder") if name in self.__dict__]
        return found + [self.__dict__[name].model for name in ("tiny", "attached") if name in self.__dict__]

    def _write(self, name: str, values: Any) -> Path:
        (self.folder / name).write_text(json.dumps(values))
        return self.folder / name


@dataclass(frozen=True)
class Call:
    """A call that works.

    Attributes:
        name: As users write it.
        function: Makes the function of the world.
        needed: Makes the arguments that have no default, or whose default does not work.
        takes: By argument, the names of values that it takes although its annotation does not say so.
    """

    name: str
    function: Callable[[World], Callable[..., Any]]
    needed: Callable[[World], dict[str, Any]]
    takes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def arguments(self, world: World) -> dict[str, str]:
        """Names of the arguments, with their annotations."""
        parameters = inspect.signature(self.function(world)).parameters.values()
        return {p.name: str(p.annotation) for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    def accepted(self, argument: str, annotation: str) -> set[str]:
        """Names of the values that an argument may take without an error."""
        return of_kind(annotation) | set(self.takes.get(argument, "").split())

"""Small multimodal LLMs, and batches for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.helpers import mllm_configs as configs
from tests.helpers.mllm_configs import PATCH, SIZE, TEXT
from tests.helpers.prompts import IMAGE, tokenizer_of
from tests.helpers.releases import found
from tests.helpers.towers import GRIDS

# (height, width) of the images, one after another; they are cut into 1 + 2, 1 + 4 and 1 + 2 tiles.
SIZES = [(30, 60), (64, 60), (60, 20)]


@dataclass(frozen=True)
class Row:
    """One sample: how many images, and what is asked about them."""

    images: int
    question: str


@dataclass(frozen=True)
class Batch:
    """What a model takes, and what the test knows about it: which row each tile (or segment) belongs to."""

    inputs: dict[str, Any]
    row_of_tile: list[int]


@dataclass(frozen=True)
class MLLM:
    """One entry of the table.

    Attributes:
        name: Its model type.
        config: Makes the config from the text config's fields and the id of the placeholder.
        model: Name of the class.
        template: Chat template.
        layout: `"plain"`, `"anyres"`, `"padded"`, `"rows"`, or of packed towers `"grid"` or `"sizes"`.
        merged: Sides of the squares of patches that have one placeholder, where the tower is packed.
    """

    name: str
    model: str
    config: Callable[[dict[str, Any], int], Any]
    template: str = "chatml"
    layout: str = "plain"
    extras: dict[str, Any] = field(default_factory=dict)
    merged: int = 2

    def __str__(self) -> str:
        return self.name

    @property
    def tokenizer(self):
        return tokenizer_of(self.template)

    def build(self) -> Any:
        kind = found(self.model)
        tokenizer = self.tokenizer
        text = {
            **TEXT,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        config = self.config(text, tokenizer.convert_tokens_to_ids(IMAGE))
        model = kind(config).eval()
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        configs.enliven(model)
        return model

    def prompt(self, row: Row, lengths: list[int]) -> str:
        images = "\n".join(f"<img>{IMAGE * length}</img>" for length in lengths)
        content = f"{images}\n{row.question}" if lengths else row.question
        messages = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def batch(self, model: Any, rows: list[Row], dtype: torch.dtype = torch.float32) -> Batch:
        counts = [row.images for row in rows]
        images, tiles = self.images(counts, dtype)
        lengths = self.lengths(model, images, sum(counts))
        texts, position = [], 0
        for row in rows:
            texts.append(self.prompt(row, lengths[position : position + row.images]))
            position += row.images
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        owners = [row for row, count in enumerate(counts) for _ in range(count)]
        row_of_tile = [row for row, count in zip(owners, tiles, strict=True) for _ in range(count)]
        if self.layout == "grid":
            placeholder = self.tokenizer.convert_tokens_to_ids(IMAGE)
            inputs |= kinds_of(self, (inputs["input_ids"] == placeholder).int())
        return Batch({**inputs, **images, **self.extras}, row_of_tile)

    def images(self, counts: list[int], dtype: torch.dtype) -> tuple[dict[str, Any], list[int]]:
        """Arguments for images, and how many tiles each has."""
        total = sum(counts)
        if self.layout == "plain":
            return {"pixel_values": torch.randn(total, 3, SIZE, SIZE, dtype=dtype)}, [1] * total
        if self.layout == "padded":
            pixels = torch.zeros(len(counts), max(counts), 3, SIZE, SIZE, dtype=dtype)
            for row, count in enumerate(counts):
                pixels[row, :count] = torch.randn(count, 3, SIZE, SIZE, dtype=dtype)
            return {"pixel_values": pixels}, [1] * total
        if self.layout == "rows":
            return _mllama_images(counts, dtype)
        grids = torch.tensor([GRIDS[i % len(GRIDS)] for i in range(total)])
        if self.layout == "grid":
            patches = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * PATCH * PATCH, dtype=dtype)
            return {"pixel_values": patches, "image_grid_thw": nn.functional.pad(grids, (1, 0), value=1)}, [1] * total
        if self.layout == "sizes":
            height, width = (grids.max(dim=0).values * PATCH).tolist()
            pixels = torch.randn(total, 3, height, width, dtype=dtype)
            return {"pixel_values": pixels, "image_sizes": grids * PATCH}, [1] * total
        tiles = [(3, 5, 3)[i % 3] for i in range(total)]
        pixels = torch.zeros(total, max(tiles), 3, SIZE, SIZE, dtype=dtype)
        for image, count in enumerate(tiles):
            pixels[image, :count] = torch.randn(count, 3, SIZE, SIZE, dtype=dtype)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([SIZES[i % 3] for i in range(total)])}, tiles

    def lengths(self, model: Any, images: dict[str, Any], total: int) -> list[int]:
        """How many placeholders each image needs, by asking a plain model for its features."""
        if self.layout == "anyres":
            return [len(feature) for feature in features_of(model, **images)]
        if self.layout in ("grid", "sizes"):
            cells = [(height // self.merged) * (width // self.merged) for height, width in GRIDS]
            return [cells[i % len(cells)] for i in range(total)]
        if self.layout == "rows":
            return [1] * total  # images come by cross-attention
        one = images["pixel_values"].flatten(0, -4)[:1]
        one = one[None] if self.layout == "padded" else one
        return [len(features_of(model, pixel_values=one + 1)[0])] * total


def kinds_of(mllm: MLLM, kinds: torch.Tensor) -> dict[str, torch.Tensor]:
    """Say what each token stands for, where the installed release of transformers takes it."""
    import transformers

    parameters = inspect.signature(getattr(transformers, mllm.model).forward).parameters
    return {"mm_token_type_ids": kinds} if "mm_token_type_ids" in parameters else {}


def features_of(model: Any, **images: Any) -> Any:
    """Features of each image; before release 5 of transformers `get_image_features` returned no more than those."""
    with torch.no_grad():
        features = model.get_image_features(**images)
    return getattr(features, "pooler_output", features)


def _mllama_images(counts: list[int], dtype: torch.dtype) -> tuple[dict[str, Any], list[int]]:
    """Rows of images of one, two and four tiles, padded to equally many images and tiles."""
    shape = (len(counts), max(counts), 4)
    pixels = torch.zeros(*shape, 3, SIZE, SIZE, dtype=dtype)
    ratios, mask = torch.zeros(shape[:2], dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask[..., 0] = 1  # as the processor has it, also where there is no image
    places = [(row, image) for row, count in enumerate(counts) for image in range(count)]
    for number, place in enumerate(places):
        tiles, ratio = [(2, 2), (1, 1), (4, 6)][number % 3]
        pixels[place][:tiles] = torch.randn(tiles, 3, SIZE, SIZE, dtype=dtype)
        ratios[place], mask[place][:tiles] = ratio, 1
    return {"pixel_values": pixels, "aspect_ratio_ids": ratios, "aspect_ratio_mask": mask}, [1] * len(places)


MLLMS = [
    MLLM("llava", "LlavaForConditionalGeneration", configs.llava, "vicuna"),
    MLLM("llava_next", "LlavaNextForConditionalGeneration", configs.llava_next, "mistral", "anyres"),
    MLLM("llava_onevision", "LlavaOnevisionForConditionalGeneration", configs.llava_onevision, "chatml", "anyres"),
    MLLM("internvl", "InternVLForConditionalGeneration", configs.internvl, "internlm-2"),
    MLLM("paligemma", "PaliGemmaForConditionalGeneration", configs.paligemma, "gemma"),
    MLLM("gemma3", "Gemma3ForConditionalGeneration", configs.gemma3, "gemma-3"),
    MLLM("idefics3", "Idefics3ForConditionalGeneration", configs.idefics3, "llama-3", "padded"),
    MLLM("smolvlm", "SmolVLMForConditionalGeneration", configs.smolvlm, "phi-3", "padded"),
    MLLM("vipllava", "VipLlavaForConditionalGeneration", configs.vipllava, "llama-2"),  # found by its structure
    MLLM("qwen2_vl", "Qwen2VLForConditionalGeneration", configs.qwen2_vl, "chatml", "grid"),
    MLLM("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", configs.qwen2_5_vl, "chatml", "grid"),
    MLLM("qwen3_vl", "Qwen3VLForConditionalGeneration", configs.qwen3_vl, "chatml", "grid"),
    MLLM("glm4v", "Glm4vForConditionalGeneration", configs.glm4v, "chatml", "grid"),
    MLLM("pixtral", "LlavaForConditionalGeneration", configs.pixtral, "mistral", "sizes", merged=1),
    MLLM("mistral3", "Mistral3ForConditionalGeneration", configs.mistral3, "mistral", "sizes"),
    MLLM("mllama", "MllamaForConditionalGeneration", configs.mllama, "llama-3", "rows"),
]
# Built like others of the table.
ALIKE = [
    MLLM("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", configs.qwen3_vl_moe, "chatml", "grid"),
    MLLM("qwen3_5", "Qwen3_5ForConditionalGeneration", configs.qwen3_5, "chatml", "grid"),
]
BY_NAME = {mllm.name: mllm for mllm in (*MLLMS, *ALIKE)}

"""Multimodal LLMs from their real config classes, small, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.integrations.prompts import IMAGE, tokenizer_of

SIZE, PATCH, WIDTH, DEPTH = 32, 8, 32, 4
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
# (height, width) of the images, one after another; they are cut into 1 + 2, 1 + 4 and 1 + 2 tiles.
SIZES = [(30, 60), (64, 60), (60, 20)]


@dataclass(frozen=True)
class Row:
    """One sample: how many images, and what is asked about them."""

    images: int
    question: str


@dataclass(frozen=True)
class Batch:
    """What a model takes, and what the test knows about it: which row each tile belongs to."""

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
        layout: `"plain"`, `"anyres"` or `"padded"`.
    """

    name: str
    model: str
    config: Callable[[dict[str, Any], int], Any]
    template: str = "chatml"
    layout: str = "plain"
    extras: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def tokenizer(self):
        return tokenizer_of(self.template)

    def build(self) -> Any:
        import transformers

        tokenizer = self.tokenizer
        text = {
            **TEXT,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        config = self.config(text, tokenizer.convert_tokens_to_ids(IMAGE))
        model = getattr(transformers, self.model)(config).eval()
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        with torch.no_grad():  # new projectors are so small, or zero, that no image would matter
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3) if parameter.any() else parameter.normal_()
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
        tiles = [(3, 5, 3)[i % 3] for i in range(total)]
        pixels = torch.zeros(total, max(tiles), 3, SIZE, SIZE, dtype=dtype)
        for image, count in enumerate(tiles):
            pixels[image, :count] = torch.randn(count, 3, SIZE, SIZE, dtype=dtype)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([SIZES[i % 3] for i in range(total)])}, tiles

    def lengths(self, model: Any, images: dict[str, Any], total: int) -> list[int]:
        """How many placeholders each image needs, by asking a plain model for its features."""
        if self.layout == "anyres":
            with torch.no_grad():
                features = model.get_image_features(**images, return_dict=True).pooler_output
            return [len(feature) for feature in features]
        one = images["pixel_values"].flatten(0, -4)[:1]
        one = one[None] if self.layout == "padded" else one
        with torch.no_grad():
            features = model.get_image_features(pixel_values=one + 1, return_dict=True).pooler_output
        return [len(features[0])] * total


class Run(NamedTuple):
    """One run of a tower: the images that it saw, and what it made of them."""

    images: Tensor
    features: Tensor


def watch(tower: nn.Module, call: Callable[[], Any]) -> tuple[Any, list[Run]]:
    """What a call returns, and the tower's runs during it."""
    runs: list[Run] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        images = args[0] if args else kwargs["pixel_values"]
        runs.append(Run(images, output.last_hidden_state.detach().clone()))

    handle = tower.register_forward_hook(note, with_kwargs=True)
    try:
        return call(), runs
    finally:
        handle.remove()


def _llava(text: dict[str, Any], image: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**text), image_token_index=image
    )


def _llava_next(text: dict[str, Any], image: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text),
        image_token_index=image,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_onevision(text: dict[str, Any], image: int) -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**text),
        image_token_index=image,
        video_token_index=text["vocab_size"] - 1,
        image_grid_pinpoints=PINPOINTS,
    )


def _internvl(text: dict[str, Any], image: int) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    vision = {**VISION, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}
    return InternVLConfig(
        vision_config=InternVLVisionConfig(**vision),
        text_config=Qwen2Config(**text),
        image_token_id=image,
        image_seq_length=4,
    )


def _paligemma(text: dict[str, Any], image: int) -> Any:
    from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
        text_config=GemmaConfig(**text, head_dim=8),
        image_token_index=image,
        projection_dim=32,
    )


def _gemma3(text: dict[str, Any], image: int) -> Any:
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    return Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Gemma3TextConfig(**text, head_dim=8, sliding_window=64),
        image_token_index=image,
        boi_token_index=text["vocab_size"] - 2,
        eoi_token_index=text["vocab_size"] - 3,
        mm_tokens_per_image=4,
    )


def _idefics3(text: dict[str, Any], image: int) -> Any:
    from transformers import Idefics3Config, Idefics3VisionConfig, LlamaConfig

    return Idefics3Config(
        vision_config=Idefics3VisionConfig(**VISION),
        text_config=LlamaConfig(**text),
        image_token_id=image,
        scale_factor=2,
        pad_token_id=text["pad_token_id"],
    )


def _smolvlm(text: dict[str, Any], image: int) -> Any:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMVisionConfig

    return SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(**VISION),
        text_config=LlamaConfig(**text),
        image_token_id=image,
        scale_factor=2,
        pad_token_id=text["pad_token_id"],
    )


def _vipllava(text: dict[str, Any], image: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig

    return VipLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text),
        image_token_index=image,
        vision_feature_layers=[-2, -3],
    )


MLLMS = [
    MLLM("llava", "LlavaForConditionalGeneration", _llava, "vicuna"),
    MLLM("llava_next", "LlavaNextForConditionalGeneration", _llava_next, "mistral", "anyres"),
    MLLM("llava_onevision", "LlavaOnevisionForConditionalGeneration", _llava_onevision, "chatml", "anyres"),
    MLLM("internvl", "InternVLForConditionalGeneration", _internvl, "internlm-2"),
    MLLM("paligemma", "PaliGemmaForConditionalGeneration", _paligemma, "gemma"),
    MLLM("gemma3", "Gemma3ForConditionalGeneration", _gemma3, "gemma-3"),
    MLLM("idefics3", "Idefics3ForConditionalGeneration", _idefics3, "llama-3", "padded"),
    MLLM("smolvlm", "SmolVLMForConditionalGeneration", _smolvlm, "phi-3", "padded"),
    MLLM("vipllava", "VipLlavaForConditionalGeneration", _vipllava, "llama-2"),  # found by its structure
]
BY_NAME = {mllm.name: mllm for mllm in MLLMS}

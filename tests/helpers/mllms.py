"""Multimodal LLMs from their real config classes, small, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.helpers.prompts import IMAGE, tokenizer_of
from tests.helpers.towers import GRIDS

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
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3) if parameter.any() else parameter.normal_()
                elif name.endswith("gate"):
                    parameter.fill_(1)
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
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == placeholder).int()
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
            with torch.no_grad():
                features = model.get_image_features(**images, return_dict=True).pooler_output
            return [len(feature) for feature in features]
        if self.layout in ("grid", "sizes"):
            cells = [(height // self.merged) * (width // self.merged) for height, width in GRIDS]
            return [cells[i % len(cells)] for i in range(total)]
        if self.layout == "rows":
            return [1] * total  # images come by cross-attention
        one = images["pixel_values"].flatten(0, -4)[:1]
        one = one[None] if self.layout == "padded" else one
        with torch.no_grad():
            features = model.get_image_features(pixel_values=one + 1, return_dict=True).pooler_output
        return [len(features[0])] * total


class Run(NamedTuple):
    """One run of a tower: the images that it saw, each as arguments for it alone, and what it made of them."""

    images: list[dict[str, Tensor]]
    features: list[Tensor]

    def same_images(self, other: Run) -> bool:
        """Whether two runs saw the same."""
        pairs = zip(self.images, other.images, strict=True)
        return all(torch.equal(one[name], two[name]) for one, two in pairs for name in one)


def seen(images: Tensor, kwargs: dict[str, Any], features: Tensor) -> Run:
    """Take a tower's batch apart."""
    if (grid := kwargs.get("grid_thw")) is not None:
        lengths = grid.prod(-1)
        patches = images.split(lengths.tolist())
        rows = (lengths * len(features) // lengths.sum()).tolist()  # some towers merge squares of tokens
        alone = [{"hidden_states": x, "grid_thw": row[None]} for x, row in zip(patches, grid, strict=True)]
        return Run(alone, list(features.split(rows)))
    if (sizes := kwargs.get("image_sizes")) is not None:
        alone = [{"pixel_values": x[None], "image_sizes": row[None]} for x, row in zip(images, sizes, strict=True)]
        return Run(alone, list(features[0].split((sizes // PATCH).prod(-1).tolist())))
    if (ratios := kwargs.get("aspect_ratio_ids")) is not None:
        masks = kwargs["aspect_ratio_mask"].flatten(0, 1)
        alone = [
            {"pixel_values": x[None, None], "aspect_ratio_ids": ratio.view(1, 1), "aspect_ratio_mask": mask[None, None]}
            for x, ratio, mask in zip(images.flatten(0, 1), ratios.flatten(), masks, strict=True)
            if ratio
        ]
        return Run(alone, list(features.flatten(0, 1)[ratios.flatten().bool()]))
    return Run([{"pixel_values": image[None]} for image in images], list(features))


def watch(tower: nn.Module, call: Callable[[], Any]) -> tuple[Any, list[Run]]:
    """What a call returns, and the tower's runs during it."""
    runs: list[Run] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        images = args[0] if args else kwargs["pixel_values"]
        runs.append(seen(images, kwargs, output.last_hidden_state.detach().clone()))

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


def _mrope(text: dict[str, Any]) -> dict[str, Any]:
    return {**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}


def _tokens(text: dict[str, Any], image: int) -> dict[str, int]:
    """Ids of marks; the template never writes the token that begins a text, so it may stand for videos."""
    start, end = text["vocab_size"] - 2, text["vocab_size"] - 3
    marks = {"image_start_token_id": start, "image_end_token_id": end}
    video = {"video_token_id": text["bos_token_id"], "vision_start_token_id": start, "vision_end_token_id": end}
    return {"image_token_id": image, **video, **marks}


PACKED_VISION = {"depth": DEPTH, "num_heads": 4, "patch_size": PATCH, "hidden_size": WIDTH}


def _qwen2_vl(text: dict[str, Any], image: int) -> Any:
    from transformers import Qwen2VLConfig

    vision = {**PACKED_VISION, "embed_dim": WIDTH, "mlp_ratio": 2}
    return Qwen2VLConfig(vision_config=vision, text_config=_mrope(text), **_tokens(text, image))


def _qwen2_5_vl(text: dict[str, Any], image: int) -> Any:
    from transformers import Qwen2_5_VLConfig

    windows = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3]}
    vision = {**PACKED_VISION, **windows, "intermediate_size": 2 * WIDTH, "out_hidden_size": 32}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=_mrope(text), **_tokens(text, image))


def _qwen3_vl(text: dict[str, Any], image: int) -> Any:
    from transformers import Qwen3VLConfig

    vision = {**PACKED_VISION, "intermediate_size": 2 * WIDTH, "out_hidden_size": 32, "num_position_embeddings": 16}
    vision["deepstack_visual_indexes"] = [1, 2]
    return Qwen3VLConfig(vision_config=vision, text_config={**_mrope(text), "head_dim": 8}, **_tokens(text, image))


def _qwen3_vl_moe(text: dict[str, Any], image: int) -> Any:
    from transformers import Qwen3VLMoeConfig

    plain = _qwen3_vl(text, image)
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    vision = plain.vision_config.to_dict()
    return Qwen3VLMoeConfig(
        vision_config=vision, text_config={**_mrope(text), "head_dim": 8, **moe}, **_tokens(text, image)
    )


def _qwen3_5(text: dict[str, Any], image: int) -> Any:
    from transformers import Qwen3_5Config

    heads = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
    widths = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    layers = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    vision = {**PACKED_VISION, "intermediate_size": 2 * WIDTH, "out_hidden_size": 32, "num_position_embeddings": 16}
    return Qwen3_5Config(
        vision_config=vision, text_config={**_mrope(text), **heads, **widths, **layers}, **_tokens(text, image)
    )


def _glm4v(text: dict[str, Any], image: int) -> Any:
    from transformers import Glm4vConfig

    vision = {**PACKED_VISION, "intermediate_size": 2 * WIDTH, "out_hidden_size": 32, "image_size": SIZE}
    return Glm4vConfig(vision_config=vision, text_config=_mrope(text), **_tokens(text, image))


def _pixtral_vision() -> Any:
    from transformers import PixtralVisionConfig

    return PixtralVisionConfig(**{**VISION, "image_size": 6 * PATCH})


def _pixtral(text: dict[str, Any], image: int) -> Any:
    from transformers import LlavaConfig, MistralConfig

    return LlavaConfig(
        vision_config=_pixtral_vision(),
        text_config=MistralConfig(**text),
        image_token_index=image,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )


def _mistral3(text: dict[str, Any], image: int) -> Any:
    from transformers import Mistral3Config, MistralConfig

    return Mistral3Config(
        vision_config=_pixtral_vision(),
        text_config=MistralConfig(**text),
        image_token_index=image,
        spatial_merge_size=2,
    )


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


def _mllama(text: dict[str, Any], image: int) -> Any:
    from transformers import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

    vision = {**VISION, "num_hidden_layers": 3, "num_global_layers": 2, "intermediate_layers_indices": [0, 2]}
    return MllamaConfig(
        vision_config=MllamaVisionConfig(**vision, vision_output_dim=3 * WIDTH),
        text_config=MllamaTextConfig(**text, cross_attention_layers=[1]),
        image_token_index=image,
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
    MLLM("qwen2_vl", "Qwen2VLForConditionalGeneration", _qwen2_vl, "chatml", "grid"),
    MLLM("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, "chatml", "grid"),
    MLLM("qwen3_vl", "Qwen3VLForConditionalGeneration", _qwen3_vl, "chatml", "grid"),
    MLLM("glm4v", "Glm4vForConditionalGeneration", _glm4v, "chatml", "grid"),
    MLLM("pixtral", "LlavaForConditionalGeneration", _pixtral, "mistral", "sizes", merged=1),
    MLLM("mistral3", "Mistral3ForConditionalGeneration", _mistral3, "mistral", "sizes"),
    MLLM("mllama", "MllamaForConditionalGeneration", _mllama, "llama-3", "rows"),
]
# Built like others of the table.
ALIKE = [
    MLLM("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", _qwen3_vl_moe, "chatml", "grid"),
    MLLM("qwen3_5", "Qwen3_5ForConditionalGeneration", _qwen3_5, "chatml", "grid"),
]
BY_NAME = {mllm.name: mllm for mllm in (*MLLMS, *ALIKE)}

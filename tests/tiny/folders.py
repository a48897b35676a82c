"""Writes a small model of a family with its processor, and data for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.helpers import mllm_configs as configs
from tests.tiny import processors

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "black": (0, 0, 0)}
QUESTION = "What colour is it?"


class Tiny(NamedTuple):
    """How a small model of a family is made.

    Attributes:
        model: Name of its class.
        config: Makes its config from the text config's fields and the id of the placeholder.
        processor: Makes its processor.
        image: The token that stands for what the model sees of an image.
    """

    model: str
    config: Callable[[dict[str, Any], int], Any]
    processor: Callable[[], Any]
    image: str = "<image>"


def _qwen(kind: str, config: Callable[[dict[str, Any], int], Any], **more: Any) -> Tiny:
    def processor() -> Any:
        return processors.qwen(kind.replace("Moe", "").replace("3_5", "3VL"), **more)

    return Tiny(f"{kind}ForConditionalGeneration", config, processor, "<|image_pad|>")


TINY = {
    "llava": Tiny("LlavaForConditionalGeneration", configs.llava, processors.llava),
    "llava_next": Tiny("LlavaNextForConditionalGeneration", configs.llava_next, processors.llava_next),
    "llava_onevision": Tiny(
        "LlavaOnevisionForConditionalGeneration", configs.llava_onevision, processors.llava_onevision
    ),
    "internvl": Tiny("InternVLForConditionalGeneration", configs.internvl, processors.internvl, "<IMG_CONTEXT>"),
    "qwen2_vl": _qwen("Qwen2VL", configs.qwen2_vl),
    "qwen2_5_vl": _qwen("Qwen2_5_VL", configs.qwen2_5_vl),
    "qwen3_vl": _qwen("Qwen3VL", configs.qwen3_vl),
    "qwen3_5": _qwen("Qwen3_5", configs.qwen3_5),
    "gemma3": Tiny("Gemma3ForConditionalGeneration", configs.gemma3, processors.gemma3, "<image_soft_token>"),
    "paligemma": Tiny("PaliGemmaForConditionalGeneration", configs.paligemma, processors.paligemma),
    "idefics3": Tiny("Idefics3ForConditionalGeneration", configs.idefics3, processors.idefics3),
    "smolvlm": Tiny("SmolVLMForConditionalGeneration", configs.smolvlm, processors.smolvlm),
    "glm4v": Tiny("Glm4vForConditionalGeneration", configs.glm4v, processors.glm4v, "<|image|>"),
    "pixtral": Tiny("LlavaForConditionalGeneration", configs.pixtral, processors.pixtral, "[IMG]"),
    "mistral3": Tiny(
        "Mistral3ForConditionalGeneration", configs.mistral3, lambda: processors.pixtral(merge=2), "[IMG]"
    ),
    "mllama": Tiny("MllamaForConditionalGeneration", configs.mllama, processors.mllama, "<|image|>"),
}
# Ids that configs name in their own ways, and the tokens that have them.
_IDS = {
    "video_token_id": ("<|video_pad|>", "<|video|>", "<video>"),
    "vision_start_token_id": ("<|vision_start|>",),
    "vision_end_token_id": ("<|vision_end|>",),
    "image_start_token_id": ("<|begin_of_image|>",),
    "image_end_token_id": ("<|end_of_image|>",),
    "boi_token_index": ("<start_of_image>",),
    "eoi_token_index": ("<end_of_image>",),
}


def build(family: str) -> tuple[Any, Any]:
    """Return a small model with random weights, and its processor.

    Args:
        family: A key of `TINY`.
    """
    import transformers

    torch.manual_seed(0)
    tiny = TINY[family]
    processor = tiny.processor()
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = {**configs.TEXT, "vocab_size": len(tokenizer), **ids}
    config = tiny.config(text, tokenizer.convert_tokens_to_ids(tiny.image))
    known = tokenizer.get_vocab()
    for name, tokens in _IDS.items():
        found = [known[token] for token in tokens if token in known]
        if found and hasattr(config, name):
            setattr(config, name, found[0])
    model = getattr(transformers, tiny.model)(config).eval()
    configs.enliven(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, processor


def write(family: str, folder: Path) -> None:
    """Write `model/`, `data/` for TRL and `image.png` below a folder.

    Args:
        family: A key of `TINY`.
        folder: Where to.
    """
    model, processor = build(family)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_data(folder / "data")
    picture("red").save(folder / "image.png")


def picture(colour: str) -> Any:
    """Return a picture of one colour, wider than high."""
    from PIL import Image

    return Image.new("RGB", (40, 30), COLOURS[colour])


def write_data(folder: Path) -> None:
    """Write eight conversations about pictures, in TRL's format."""
    import datasets

    rows = []
    for colour in COLOURS:
        for question in (QUESTION, f"Is it {colour}?"):
            asked = [{"type": "image", "text": None}, {"type": "text", "text": question}]
            said = [{"type": "text", "text": f"{colour}."}]
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            rows.append({"images": [picture(colour)], "messages": messages})
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    message = {"role": datasets.Value("string"), "content": [part]}
    features = datasets.Features({"images": [datasets.Image()], "messages": [message]})
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "train.parquet"))

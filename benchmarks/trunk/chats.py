"""A second question about a picture in a chat, by each policy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import covft
from benchmarks.speed.sizes import Record
from covft.integrations import attach, llava_processor
from covft.testing import HashTextEncoder, tiny_llava

QUESTIONS = ("What is left of the cup?", "How many people are in the room?")
POLICIES = ("reencode", "keep", "append")


@dataclass(frozen=True)
class ChatSize:
    """Sizes of a LLaVA: width and depth of both parts, side of an image and of a patch, adapted blocks."""

    width: int = 768
    depth: int = 12
    image: int = 224
    patch: int = 16
    layers: tuple[int, ...] = tuple(range(5, 11))


VIT_B = ChatSize()
SMALL = ChatSize(32, 4, 32, 16, (1, 2))


def llava(size: ChatSize) -> tuple[Any, Any]:
    """Build an attached LLaVA with random weights, and its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    torch.manual_seed(0)
    tokenizer = tiny_llava().tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    heads = max(size.width // 64, 4)
    parts = {"hidden_size": size.width, "num_hidden_layers": size.depth, "num_attention_heads": heads}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **parts, intermediate_size=4 * size.width, image_size=size.image, patch_size=size.patch
        ),
        text_config=LlamaConfig(**parts, intermediate_size=4 * size.width, vocab_size=len(tokenizer), **ids),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Llava(config).eval()
    crop = {"height": size.image, "width": size.image}
    images = CLIPImageProcessor(size={"shortest_edge": size.image}, crop_size=crop)
    processor = llava_processor(model, tokenizer, images)
    attach(model, HashTextEncoder(768), tokenizer=processor, layers=list(size.layers))
    return model, processor


class _Rows:
    """Sums up the rows, or the tokens of one row, that a module gets; a forward pre-hook."""

    def __init__(self, module: nn.Module, axis: int) -> None:
        self.axis, self.sum = axis, 0
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = args[0] if args else kwargs["inputs_embeds"]
        self.sum += tokens.shape[self.axis]


def second_question(size: ChatSize, runs: int = 3) -> list[Record]:
    """Measure the second question of a chat by each policy: CPU seconds, and what ran.

    Args:
        size: Sizes of the model.
        runs: Chats of each policy, in turns; the fastest counts.
    """
    from PIL import Image

    model, processor = llava(size)
    encoder = covft.get_encoder(model)
    ffns = [encoder.vit.get_submodule(encoder.spec.blocks[layer].mlp_path) for layer in (0, size.layers[0])]
    trunk, upper, language = _Rows(ffns[0], 0), _Rows(ffns[1], 0), _Rows(model.model.language_model, 1)
    picture = Image.effect_noise((size.image, size.image), 90).convert("RGB")
    found: dict[str, Record] = {policy: {"policy": policy, "seconds": float("inf")} for policy in POLICIES}
    for _ in range(runs):
        for policy, record in found.items():
            chat = covft.Chat(model, processor, policy, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            chat.ask(QUESTIONS[0], picture)
            before = (trunk.sum, upper.sum, language.sum)
            start = time.process_time()
            chat.ask(QUESTIONS[1])
            record["seconds"] = min(record["seconds"], time.process_time() - start)
            ran = [now - then for now, then in zip((trunk.sum, upper.sum, language.sum), before, strict=True)]
            record.update(zip(("trunk", "upper", "tokens"), ran, strict=True))
    return list(found.values())

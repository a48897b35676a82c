"""LLaVA-1.5 with a context-aware CLIP-L/14-336, on the meta device: its parameters and its activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import covft
from benchmarks.memory.activations import kept, use_flash_like
from benchmarks.memory.states import FULL, HALF, Counts

# Width, inner width, layers and heads of Vicuna's language models.
SIZES = {"LLaVA-7B": (4096, 11008, 32, 32), "LLaVA-13B": (5120, 13824, 40, 40)}
VOCABULARY = 32064
TEXT_DIM = 768  # of BERT
LAYERS = range(11, 23)
RANK = 128


@dataclass(frozen=True)
class Model:
    """One of `SIZES`, all in bfloat16.

    Attributes:
        name: Its name.
        lora: Whether the language model trains low-rank adapters; in full otherwise.
    """

    name: str
    lora: bool

    @cached_property
    def plain(self) -> Any:
        """The model before covft."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        hidden, inner, layers, heads = SIZES[self.name]
        vision = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14,
        )  # fmt: skip
        text = LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            vocab_size=VOCABULARY, max_position_embeddings=4096,
        )  # fmt: skip
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
        use_flash_like(config)
        with torch.device("meta"):
            return LlavaForConditionalGeneration(config)

    @cached_property
    def model(self) -> Any:
        """The model with covft; what trains is marked."""
        model = self.plain.to(torch.bfloat16)
        covft.attach(model, TEXT_DIM, tokenizer=None, layers=LAYERS)
        language = model.model.language_model
        if self.lora:
            from peft import LoraConfig, inject_adapter_in_model

            names = r".*(q|k|v|o|gate|up|down)_proj"
            for parameter in [*language.parameters(), *model.lm_head.parameters()]:
                parameter.requires_grad_(False)
            with torch.device("meta"):
                wanted = [p for p in model.parameters() if p.requires_grad]
                inject_adapter_in_model(LoraConfig(r=RANK, target_modules=names), language)
            for parameter in wanted:
                parameter.requires_grad_(True)
        return model.train()

    @cached_property
    def counts(self) -> Counts:
        """Parameters by what becomes of them."""
        model = self.model
        blocks = [*covft.get_encoder(model).vit.encoder.layers, *model.model.language_model.layers]
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        return Counts(trained, total - trained, max(sizes), total - sum(sizes))

    @cached_property
    def of_image(self) -> int:
        """Bytes that the tower keeps of one image, with `recompute="all"` and no checkpointing."""
        encoder = covft.get_encoder(self.model)
        images = torch.empty(1, 3, 336, 336, device="meta", dtype=torch.bfloat16)
        text = torch.empty(1, TEXT_DIM, device="meta", dtype=torch.bfloat16)
        return kept(lambda: encoder(images, text, output_hidden_states=True).hidden_states[-2], encoder)

    def of_row(self, length: int) -> tuple[int, int]:
        """Return bytes that the language model keeps of a row of so many tokens, without and with checkpointing.

        With checkpointing it keeps the input of every layer and, at its peak, one layer or the logits: those in
        bfloat16, in float32, their log-softmax and its gradient.
        """
        hidden, _, layers, _ = SIZES[self.name]
        language = self.model.model.language_model
        x = torch.empty(1, length, hidden, device="meta", dtype=torch.bfloat16, requires_grad=True)
        positions = torch.arange(length, device="meta")[None]
        rotary = language.rotary_emb(x, positions)
        layer = language.layers[0]
        of_layer = kept(lambda: layer(x, position_embeddings=rotary), layer)
        logits = length * VOCABULARY * (HALF + 3 * FULL)
        inputs = HALF * length * hidden * layers
        return layers * of_layer + logits, inputs + max(of_layer, logits)

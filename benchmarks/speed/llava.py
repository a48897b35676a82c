"""One step of a model of LLaVA-1.5-7B's shape with random weights: what the paper's Table 8 compares, on one device.

The language model trains low-rank adapters, as LLaVA's recipe for one GPU does, with activation checkpointing of its
layers; the projector trains in full. All weights are bfloat16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import covft
from benchmarks.speed.baseline import ObviousMoE, ObviousSlot
from benchmarks.speed.measure import interleaved, peak_allocated
from benchmarks.speed.sizes import CLIP_L, TINY, Record, Size
from covft.surgery.activation_checkpointing import set_activation_checkpointing


@dataclass(frozen=True)
class LlavaSize:
    """Sizes of the model and its batch.

    Attributes:
        tower: Of the ViT.
        hidden: Width of the language model.
        inner: Inner width of its FFNs.
        layers: Its layers.
        heads: Its attention heads.
        vocabulary: Its tokens.
        batch: Rows of a batch, one image each.
        words: Tokens of a row that are text.
        rank: Of the adapters.
    """

    tower: Size
    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    words: int
    rank: int


# Vicuna-7B; 16 rows per device, 128 tokens of text, adapters of rank 128: LLaVA-1.5's recipe.
LLAVA_7B = LlavaSize(CLIP_L, 4096, 11008, 32, 32, 32064, 16, 128, 128)
TOY = LlavaSize(TINY, 32, 64, 2, 4, 64, 2, 4, 2)

# By name: how the tower is trained.
METHODS = (
    "freeze",
    "full",
    "covft, recompute=none",
    "covft, recompute=activation",
    "covft, recompute=all",
    "obvious",
)  # fmt: skip


class Llava:
    """The model and a batch."""

    def __init__(self, size: LlavaSize, device: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        torch.manual_seed(0)
        tower = size.tower
        vision = CLIPVisionConfig(
            hidden_size=tower.embed_dim, intermediate_size=tower.ffn_dim, num_hidden_layers=tower.depth,
            num_attention_heads=tower.num_heads, image_size=tower.image_size, patch_size=tower.patch_size,
        )  # fmt: skip
        text = LlamaConfig(
            hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, vocab_size=size.vocabulary, max_position_embeddings=4096,
        )  # fmt: skip
        image_token = size.vocabulary - 1
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
        with _default_dtype(torch.bfloat16), torch.device(device):
            model: Any = LlavaForConditionalGeneration(config)
            adapters = LoraConfig(
                r=size.rank, lora_alpha=2 * size.rank, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
            )
            model = inject_adapter_in_model(adapters, model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        set_activation_checkpointing(model.model.language_model, on=True)
        self.model, self.size, self.device, self.attached = model, size, device, False
        self.tower = model.model.vision_tower
        self.projector = list(model.model.multi_modal_projector.parameters())
        self.adapters = [p for name, p in model.named_parameters() if "lora_" in name]
        images = tower.tokens - 1
        ids = torch.randint(3, image_token, (size.batch, images + size.words), device=device)
        ids[:, 1 : 1 + images] = image_token
        self.batch: dict[str, Tensor] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.masked_fill(ids == image_token, -100),
            "pixel_values": torch.randn(
                size.batch, 3, tower.image_size, tower.image_size, device=device, dtype=torch.bfloat16
            ),
        }
        self.text = torch.randn(size.batch, tower.text_dim, device=device, dtype=torch.bfloat16)

    @contextmanager
    def tuned(self, method: str) -> Iterator[None]:
        """Train the tower by a method."""
        if method in ("freeze", "full"):
            self.tower.requires_grad_(method == "full")
            try:
                yield
            finally:
                self.tower.requires_grad_(False)
            return
        covft.attach(self.model, self.size.tower.text_dim, tokenizer=None, layers=self.size.tower.layers)
        self.attached = True
        encoder = covft.get_encoder(self.model)
        encoder.set_recompute(method.partition("recompute=")[2] or "all")
        slots = encoder.slots() if method == "obvious" else {}
        places = {layer: encoder.spec.blocks[layer].mlp_path.rpartition(".") for layer in slots}
        for layer, slot in slots.items():
            parent, _, name = places[layer]
            obvious = ObviousSlot(ObviousMoE.like(slot), encoder.conditioning)
            setattr(encoder.vit.get_submodule(parent), name, obvious)
        try:
            yield
        finally:
            for layer, slot in slots.items():
                parent, _, name = places[layer]
                setattr(encoder.vit.get_submodule(parent), name, slot)
            covft.detach(self.model)
            self.attached = False
            self.tower.requires_grad_(False)

    def step(self, trained: list[Tensor]) -> Callable[[], None]:
        """Return a step of training; the optimizer keeps its state from one to the next."""
        own = {id(parameter) for parameter in trained}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in own)
        self.model.train()
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=self.device.startswith("cuda"))

        def run() -> None:
            self.model(**self.batch, **self._context(self.text), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def answer(self) -> Callable[[], None]:
        """Return a forward of one row, up to its first new token."""
        one = {name: value[:1] for name, value in self.batch.items() if name != "labels"}
        self.model.eval()

        @torch.no_grad()
        def run() -> None:
            self.model(**one, **self._context(self.text[:1]), use_cache=False, logits_to_keep=1)

        return run

    def trained_of_tower(self) -> list[Tensor]:
        """The parameters of the tower that train now."""
        return [parameter for parameter in self.tower.parameters() if parameter.requires_grad]

    def _context(self, text: Tensor) -> dict[str, Tensor]:
        return {"context_text": text} if self.attached else {}


def measure_llava(size: LlavaSize, *, runs: int = 5, device: str = "cpu") -> Iterator[Record]:
    """Measure steps of pre-training and of instruction tuning, and an answer, by how the tower is trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        llava = Llava(size, device)
    pretraining: dict[str, Any] = {}
    for method in METHODS:
        with llava.tuned(method):
            trained = [*llava.trained_of_tower(), *llava.adapters, *llava.projector]
            if not pretraining:  # every method freezes the tower in pre-training
                pretraining = _measured(llava.step(llava.projector), runs, device)
            step = _measured(llava.step(trained), runs, device)
            answer = interleaved({"answer": llava.answer()}, runs, device=device)["answer"]
            yield {
                "kind": "llava",
                "name": method,
                "device": device,
                "dtype": "bfloat16",
                "batch": size.batch,
                "tokens": llava.batch["input_ids"].shape[1],
                "trained": sum(parameter.numel() for parameter in trained),
                "pretraining": pretraining,
                "step": step,
                "inference": answer.to_dict(),
            }
            llava.model.zero_grad(set_to_none=True)
            del trained, step


def _measured(step: Callable[[], None], runs: int, device: str) -> dict[str, Any]:
    timing = interleaved({"step": step}, runs, device=device)["step"]
    return {**timing.to_dict(), "peak": peak_allocated(step, device)}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

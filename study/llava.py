"""transformers' own LLaVA in miniature: a tower, a two-layer projector and a small Llama."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from study.data.tokenizer import build_tokenizer
from study.weights import ASSETS, load_weights

if TYPE_CHECKING:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

FEATURE_LAYER = -2  # the penultimate block, as in LLaVA


def language_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return four Llama blocks of width 128."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.08,  # about 1 / sqrt(128); the usual 0.02 suits wider models and learns slowly here
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def new_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a small Llama with random weights."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(language_config(tokenizer))


def build_llava(tower: torch.nn.Module, folder: Path | None = ASSETS, seed: int = 0) -> LlavaForConditionalGeneration:
    """Build LLaVA around a tower, with a random projector.

    Args:
        tower: A vision model of transformers with one prefix token.
        folder: Folder of the pretrained language model; None leaves it random.
        seed: Seed of the projector and of a random language model.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = build_tokenizer()
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=language_config(tokenizer).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    if folder is not None:
        weights = load_weights(folder, "language_model")
        model.model.language_model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model

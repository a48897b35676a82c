"""Folders that the stand-ins load their models from, and the modules that they leave behind."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch

import covft
from tests.helpers.prompts import tokenizer_of

STANDINS = Path(__file__).parents[1] / "integrations" / "codebases" / "standins"
SIZE, PATCH, WIDTH, DEPTH = 32, 16, 32, 4
TEMPLATE_OF = {
    "v1": "vicuna",
    "vicuna_v1": "vicuna",
    "v0": "vicuna",
    "plain": "vicuna",
    "llava_llama_2": "llama-2",
    "mpt": "chatml",
    "qwen_1_5": "chatml",
}


def forget(package):
    """Let a package be imported anew."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


def tokenizer_for(version):
    tokenizer = copy.deepcopy(tokenizer_of(TEMPLATE_OF[version], "byte-level"))
    tokenizer.chat_template = None  # these codebases have none
    return tokenizer


def save_clip(folder):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 4}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=DEPTH, image_size=SIZE, patch_size=PATCH))
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    clip.save_pretrained(folder)
    return folder


def save_llm(folder, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(*questions, image=True):
    """Rows of training data; a question without a picture begins with a tilde."""
    made = []
    for number, question in enumerate(questions):
        text_only = question.startswith("~")
        turn = question[1:] if text_only else f"<image>\n{question}"
        answer = {"from": "gpt", "value": "a red ball"}
        row = {"id": str(number), "conversations": [{"from": "human", "value": turn}, answer]}
        made.append(row if text_only else {**row, "image": f"{number}.jpg"})
    return made


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def stir(encoder):
    """Experts that differ, so that the text shows."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in encoder.vit.named_parameters():
            if ".experts." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def texts_seen(model, monkeypatch):
    """A list of what `encode_text` is asked, and of the text of each row of the tower's batch."""
    encoder = covft.get_encoder(model)
    seen = []
    condition = type(encoder).condition

    def spy(self, text, index=None):
        seen.append([text[i] for i in index.tolist()])
        return condition(self, text, index)

    monkeypatch.setattr(type(encoder), "condition", spy)
    return seen

"""One good call of every public function."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn as torch_nn

import covft
from covft import adapters, checkpoints, data, integrations, metrics, nn, testing, text
from covft.adapters.sources import load_vit
from tests.helpers.worlds import VALUES, Call, World
from tests.tiny import processors

TURNS = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a cup"}]
RECORD = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}]}
FFN = torch_nn.Sequential(torch_nn.Linear(8, 16), torch_nn.GELU(), torch_nn.Linear(16, 8))
ANY = " ".join(VALUES)
EVERYTHING: list[Call] = []


def call(
    name: str, function: Callable[[World], Any], needed: Callable[[World], dict[str, Any]] | None = None, **takes: str
) -> None:
    """Add a call to the table."""
    EVERYTHING.append(Call(name, function, needed or (lambda world: {}), takes))


def public(module: Any, name: str, needed: Callable[[World], dict[str, Any]] | None = None, **takes: str) -> None:
    """Add a function or class of a module's public face to the table."""
    call(name, lambda world: functools.reduce(getattr, name.split("."), module), needed, **takes)


ints = "one negative huge"


def diagnosed(
    model: torch_nn.Module,
    data: Iterable[Any],
    text_encoder: Any = None,
    weights: str = "ffn",
    samples: int = 16,
    steps: int = 1,
    batch: int = 1,
    rate: float | None = 1e-4,
    permutations: int = 9,
    level: float = 0.95,
    seed: int = 0,
) -> Any:
    """`covft.diagnose` without the user's functions, whose errors are the user's."""
    given = {name: value for name, value in locals().items() if name not in ("model", "data")}
    return covft.diagnose(model, data, loss=lambda vit, samples: vit(samples[0][0][None]).square().mean(), **given)


public(covft, "wrap", lambda w: {"vit": w.vit, "text_encoder": 8, "layers": [1]}, text_encoder="one")
public(covft, "unwrap", lambda w: {"encoder": w.encoder})
public(covft, "load", lambda w: {"folder_or_repo_id": w.saved, "vit": w.vit, "text_encoder": 8})
public(covft, "tune", lambda w: {"model": w.vit, "method": "bitfit"}, text_encoder=ANY, images=ANY, tokenizer="none")
public(covft, "merge", lambda w: {"tuned": w.tuned})
call(
    "method_options",
    lambda w: integrations.method_options,
    lambda w: {"method": "lora", "settings": {}, "given": ["r=2"]},
)
public(covft, "untune", lambda w: {"tuned": w.tuned})
public(covft, "budget", lambda w: {"model": w.vit, "method": "bitfit"})
public(covft, "match", lambda w: {"vit": w.vit, "parameters": 1, "methods": ["last_layers"]})
public(covft, "describe", lambda w: {"vit": w.vit})
public(covft, "compress", lambda w: {"encoder": w.encoder, "rank": 2}, images="none", text=ANY)
public(covft, "skip_experts", lambda w: {"encoder": w.encoder, "below": 0.1})
public(
    covft,
    "attach",
    lambda w: {"model": w.tiny.model, "text_encoder": 8, "tokenizer": w.tiny.tokenizer, "layers": [1]},
    text_encoder="one",
    tokenizer="none",
)
call("diagnose", lambda w: diagnosed, lambda w: {"model": w.vit, "data": w.entries}, text_encoder=ANY)
public(covft, "detach", lambda w: {"model": w.attached.model})
public(covft, "get_encoder", lambda w: {"model": w.attached.model})
public(covft, "TrunkCache")
public(covft, "Chat", lambda w: {"model": w.attached.model, "processor": processors.llava()})
public(covft, "load_model", lambda w: {"folder_or_repo_id": w.folder / "nothing"})
public(covft, "lora_exclude", lambda w: {"model": w.attached.model})
public(covft, "CoVFTConfig")
public(covft, "CoVFTConfig.from_dict", lambda w: {"values": {"experts": 2}})
public(covft, "CoVFTConfig.from_json", lambda w: {"text": "{}"})
public(covft, "CoVFTConfig.choices", lambda w: {"name": "routing"})
call("CoVFTConfig.is_same_model", lambda w: covft.CoVFTConfig().is_same_model, lambda w: {"other": covft.CoVFTConfig()})
public(covft, "CoVFTCallback", text_encoder=ANY, tokenizer=ANY)

call("encoder", lambda w: w.encoder, lambda w: {"images": w.images, "text": ["a cup", "a dog"]}, images="none tensor")
call("encoder.trunk", lambda w: w.encoder.trunk, lambda w: {"images": w.images}, images="tensor")
call(
    "encoder.condition",
    lambda w: lambda text, index=None: w.encoder.condition(text, index).__enter__(),
    lambda w: {"text": "a cup"},
    text="none word nul empty",
    index="none",
)
call("encoder.encode_text", lambda w: w.encoder.encode_text, lambda w: {"text": "a cup"})
call("encoder.set_text_encoder", lambda w: w.encoder.set_text_encoder, lambda w: {"text_encoder": None})
call("encoder.param_groups", lambda w: w.encoder.param_groups, lambda w: {"lr": 1e-3})
call("encoder.gradient_checkpointing_enable", lambda w: w.encoder.gradient_checkpointing_enable)
call("encoder.set_recompute", lambda w: w.encoder.set_recompute, lambda w: {"recompute": "all"})
call("encoder.set_kernels", lambda w: w.encoder.set_kernels, lambda w: {"kernels": "eager"})
call("encoder.save_pretrained", lambda w: w.encoder.save_pretrained, lambda w: {"folder": w.folder / "out"})

public(text, "as_text_encoder", lambda w: {"obj": 8}, obj="one")
public(text, "CallableTextEncoder", lambda w: {"function": lambda texts: torch.ones(1, 8), "text_dim": 8})
public(text, "FeatureCache")
public(text, "PrecomputedFeatures", lambda w: {"text_dim": 8})
public(testing, "HashTextEncoder", lambda w: {"text_dim": 8})
call("HashTextEncoder.encode", lambda w: testing.HashTextEncoder(8).encode, lambda w: {"texts": ["a cup"]})
public(text, "HFTextEncoder", lambda w: {"model": str(w.folder / "nothing")})
public(text, "OpenCLIPTextEncoder", lambda w: {"model": "ViT-B-32/none"})
public(text, "SentenceTransformersEncoder", lambda w: {"model": str(w.folder / "nothing")})
public(text, "FeatureTable.precompute", lambda w: {"text_encoder": testing.HashTextEncoder(8), "texts": ["a cup"]})
public(text, "FeatureTable.load", lambda w: {"path": w.table})
call(
    "FeatureTable.save", lambda w: text.FeatureTable.load(w.table).save, lambda w: {"path": w.folder / "b.safetensors"}
)

public(
    adapters, "register_adapter", lambda w: {"adapter": adapters.ViTFamily(name="toy", classes=("a.B",), library="c")}
)
public(adapters, "ViTFamily", lambda w: {"name": "toy", "classes": ("a.B",), "library": "c"})
public(adapters, "InputFormat")
call("load_vit", lambda w: load_vit, lambda w: {"source": "timm:test_vit", "pretrained": False})
public(checkpoints, "import_reference", lambda w: {"encoder": w.encoder, "path_or_state_dict": {}})

public(integrations, "train_only", lambda w: {"model": w.attached.model, "parts": ["covft"]})
public(integrations, "parts_of", lambda w: {"model": w.attached.model})
public(integrations, "watch_movement", lambda w: {"module": w.attached.model})
public(integrations, "freeze_unread", lambda w: {"model": w.tiny.model})
public(
    integrations,
    "build_llava",
    lambda w: {
        "vision": w.tiny.model.model.vision_tower,
        "language": w.tiny.model.model.language_model,
        "tokenizer": w.tiny.tokenizer,
    },
)
public(
    integrations,
    "build_internvl",
    lambda w: {
        "vision": w.tiny.model.model.vision_tower,
        "language": w.tiny.model.model.language_model,
        "tokenizer": w.tiny.tokenizer,
    },
)
public(integrations, "image_text_of", lambda w: {"model": w.tiny.model, "tokenizer": w.tiny.tokenizer})
public(
    integrations,
    "llava_processor",
    lambda w: {"model": w.tiny.model, "tokenizer": w.tiny.tokenizer, "image_processor": None},
)
public(integrations, "load_image_processor", lambda w: {"source": w.folder / "nothing"})
public(integrations, "save_projector", lambda w: {"model": w.tiny.model, "folder": w.folder / "projector"})
public(integrations, "load_projector", lambda w: {"model": w.tiny.model, "folder": w.folder / "nothing"})
public(integrations, "save_trained", lambda w: {"trainer": None})
public(integrations, "check_checkpoint", lambda w: {"checkpoint": w.folder / "nothing"})
public(integrations, "last_checkpoint", lambda w: {"output_dir": w.folder / "nothing"})
public(integrations, "vit_tower", lambda w: {"source": "timm:test_vit?num_classes=0", "vit": None}, source="none")
public(integrations, "MLLMTrainer", lambda w: {"model": w.attached.model}, data_collator="none function class module")
public(integrations, "add_options", lambda w: {"parser": argparse.ArgumentParser()})

public(data, "LlavaRows", lambda w: {"annotation": w.rows, "images": w.folder})
public(data, "QuestionRows", lambda w: {"annotation": w.rows, "images": w.folder})
public(data, "InternVLRows", lambda w: {"meta": w.meta})
public(data, "JsonRecords", lambda w: {"path": w.rows})
public(data, "DatasetsRows", lambda w: {"dataset": None})
public(data, "ImageFolder", lambda w: {"root": w.folder})
call("ImageFolder.open", lambda w: data.ImageFolder(w.folder).open, lambda w: {"name": "cup.png"})
public(data, "TarImages", lambda w: {"shards": w.folder / "a.tar"})
public(
    data,
    "ConversationDataset",
    lambda w: {"source": data.LlavaRows(w.rows, w.folder), "tokenizer": w.tiny.tokenizer},
    tiling="function module",
)
public(data, "Collator", lambda w: {"pad_token_id": 0})
public(data, "ModalityGroupedSampler", lambda w: {"lengths": [3, -4], "batch_size": 1})
public(data, "clean_instruction", lambda w: {"text": "what is it?"})
public(data, "ImageDecoder")
public(data, "NoTiling")
public(data, "DynamicTiling")
public(data, "PadToSquare")
public(data, "JpegAugment")
public(data, "MetaEntry", lambda w: {"name": "cups", "annotation": "a.json"})
public(data, "ImageText")
public(data, "answer_spans", lambda w: {"tokenizer": w.tiny.tokenizer, "messages": TURNS})
public(data, "encode_conversation", lambda w: {"tokenizer": w.tiny.tokenizer, "messages": TURNS})
public(data, "instruction_text", lambda w: {"row": TURNS})
call(
    "instructions_of",
    lambda w: functools.wraps(data.instructions_of)(lambda **given: list(data.instructions_of(**given))),
    lambda w: {"source": data.LlavaRows(w.rows)},
)
public(data, "open_rows", lambda w: {"path": w.rows})
public(data, "read_meta", lambda w: {"path": w.meta})
public(data, "parse_row", lambda w: {"record": RECORD})
public(data, "to_messages", lambda w: {"row": TURNS})
public(data, "pad_to_square", lambda w: {"image": w.picture})
public(data, "tile_grid", lambda w: {"width": 20, "height": 10})
public(data, "tile_image", lambda w: {"image": w.picture})
public(data, "drop_dummies", lambda w: {"features": torch.ones(2, 3), "image_flags": torch.tensor([1, 0])})

public(nn, "ContextualMoE", lambda w: {"ffn": FFN, "embed_dim": 8, "text_dim": 8}, plans=ANY)
public(nn, "CrossAttentionContext", lambda w: {"embed_dim": 8, "text_dim": 8})
public(nn, "SingleQueryAttention", lambda w: {"embed_dim": 8, "text_dim": 8})
public(nn, "ConcatContext", lambda w: {"embed_dim": 8, "text_dim": 8})
public(nn, "ImageContext", lambda w: {"embed_dim": 8})
public(nn, "TextContext", lambda w: {"text_dim": 8})
public(nn, "ResidualRefinement", lambda w: {"dim": 8})
public(nn, "DenseRouter", lambda w: {"context_dim": 8, "num_experts": 2})
public(nn, "SparseRouter", lambda w: {"context_dim": 8, "num_experts": 3, "top_k": 2})
public(nn, "RandomRouter", lambda w: {"num_experts": 3, "top_k": 2})
public(nn, "UniformRouter", lambda w: {"num_experts": 2})
public(nn, "Segments", lambda w: {"lengths": [2, 3]})
public(nn, "load_balance_loss", lambda w: {"logits_BE": torch.rand(2, 3), "expert_ids_BK": torch.tensor([[0], [1]])})
public(nn, "router_z_loss", lambda w: {"logits_BE": torch.rand(2, 3)})

public(testing, "FixedRouter", lambda w: {"weights": torch.tensor([0.5, 0.5])})
public(testing, "ToyViT")
public(testing, "tiny_llava")
public(testing, "tiny_internvl")

public(metrics, "exact_match", lambda w: {"answer": "a cup", "expected": "cup"})
public(metrics, "option_letter", lambda w: {"answer": "A", "options": ["cup", "dog"]})
public(metrics, "pair_hits", lambda w: {"hits": [True, False]}, hits="tensor", pairs="none")
public(metrics, "paired_accuracy", lambda w: {"hits": [True, False]}, hits="tensor", pairs="none")
public(metrics, "iou", lambda w: {"box": (0, 0, 2, 2), "other": (1, 0, 3, 2)})
public(metrics, "cider", lambda w: {"captions": ["a cup", "a dog"], "references": [["cup"], ["dog"]]})
public(metrics, "averages", lambda w: {"scores": {"GQA": 60}, "groups": {"general": ["GQA"]}})
SETS = {"downstream": ["IconQA"], "upstream": ["GQA"]}
HITS = {0: {"count": [0, 1]}}
ZERO_SHOT = {"IconQA": 20, "GQA": 60}
public(metrics, "forgetting", lambda w: {"before": ZERO_SHOT, "after": ZERO_SHOT, **SETS})
public(metrics, "improvement", lambda w: {"before": ZERO_SHOT, "after": ZERO_SHOT})
public(metrics, "forgotten", lambda w: {"before": ZERO_SHOT, "after": ZERO_SHOT})
public(metrics, "overall", lambda w: {"downstream": ZERO_SHOT, "upstream": ZERO_SHOT})
public(metrics, "bootstrap", lambda w: {"scores": HITS, "resamples": 10})
public(metrics, "paired_bootstrap", lambda w: {"a": HITS, "b": HITS, "resamples": 10})
public(metrics, "sign_test", lambda w: {"wins": 3, "losses": 1})
public(metrics, "holm", lambda w: {"p_values": [0.01, 0.04]})

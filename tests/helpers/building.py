"""Small pretrained towers and language models, and InternViT in its published layout."""

import json
import math

import torch
from safetensors.torch import save_file
from torch import nn

SIZE, PATCH, WIDTH, DEPTH = 32, 8, 32, 4
GRID = SIZE // PATCH
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
LANGUAGE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 300,
}


def _clip(folder):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(**VISION)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 30}, vision_config=vision.to_dict()))
    return model, lambda: model.vision_model


def _siglip(folder):
    from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig

    text = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**VISION).to_dict()
    model = SiglipModel(SiglipConfig(text_config={**text, "vocab_size": 30}, vision_config=vision))
    return model, lambda: model.vision_model


def _dinov2(folder):
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"}, mlp_ratio=2))
    return model, lambda: model


def _dinov3(folder):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    model = DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=4))
    return model, lambda: model


def _internvit(folder):
    from transformers import InternVLVisionConfig, InternVLVisionModel

    square = {"image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}
    model = InternVLVisionModel(InternVLVisionConfig(**{**VISION, **square}, attention_bias=True))
    return model, lambda: model


TOWERS = {"clip": _clip, "siglip": _siglip, "dinov2": _dinov2, "dinov3": _dinov3, "internvit": _internvit}
# Tokens before the patches, and how many of them the language model sees.
PREFIX = {"clip": (1, 0), "siglip": (0, 0), "dinov2": (1, 0), "dinov3": (5, 4), "internvit": (1, 0)}
LLMS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "smollm2": ("LlamaConfig", {"tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {"tie_word_embeddings": False, "pad_token_id": 0}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
}


def shaken(model):
    """Every weight random: zeros and ones of new norms and biases would hide a wrong place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def prompt(model, tokenizer, rows=2):
    """Token ids with an image in each row, and pictures."""
    image = torch.full((rows, model.config.image_seq_length), model.config.image_token_id)
    words = torch.randint(10, 200, (rows, 5))
    return {"input_ids": torch.cat([words[:, :2], image, words[:, 2:]], 1), "pixel_values": torch.rand(rows, 3, 32, 32)}


def published(qk_norm=False, norm="layer_norm"):
    """Tensors and config as OpenGVLab names them."""
    width, inner = WIDTH, VISION["intermediate_size"]
    tensors = {
        "embeddings.class_embedding": torch.randn(1, 1, width),
        "embeddings.position_embedding": torch.randn(1, GRID**2 + 1, width),
        "embeddings.patch_embedding.weight": torch.randn(width, 3, PATCH, PATCH) / 8,
        "embeddings.patch_embedding.bias": torch.randn(width),
    }
    for i in range(DEPTH):
        shapes = {
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "mlp.fc1.weight": (inner, width),
            "mlp.fc1.bias": (inner,),
            "mlp.fc2.weight": (width, inner),
            "mlp.fc2.bias": (width,),
            "norm1.weight": (width,),
            "norm2.weight": (width,),
            "ls1": (width,),
            "ls2": (width,),
        }
        if norm == "layer_norm":
            shapes |= {"norm1.bias": (width,), "norm2.bias": (width,)}
        if qk_norm:
            shapes |= {"attn.q_norm.weight": (width,), "attn.k_norm.weight": (width,)}
        tensors |= {f"encoder.layers.{i}.{name}": torch.randn(shape) / 3 for name, shape in shapes.items()}
    config = {**VISION, "model_type": "intern_vit_6b", "qkv_bias": True, "qk_normalization": qk_norm}
    config |= {"norm_type": norm, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "architectures": ["InternVisionModel"]}
    return tensors, {**config, "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"}}


def published_forward(tensors, images, qk_norm=False, norm="layer_norm"):
    """The published forward, written out."""
    at = {name: tensor.double() for name, tensor in tensors.items()}
    x = nn.functional.conv2d(
        images, at["embeddings.patch_embedding.weight"], at["embeddings.patch_embedding.bias"], stride=PATCH
    )
    x = torch.cat([at["embeddings.class_embedding"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + at["embeddings.position_embedding"]

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def normed(x, name):
        if norm == "rms_norm":
            return rms(x, at[f"{name}.weight"])
        return nn.functional.layer_norm(x, (WIDTH,), at[f"{name}.weight"], at[f"{name}.bias"], 1e-6)

    for i in range(DEPTH):
        block = f"encoder.layers.{i}"
        q, k, v = (
            normed(x, f"{block}.norm1") @ at[f"{block}.attn.qkv.weight"].T + at[f"{block}.attn.qkv.bias"]
        ).split(WIDTH, -1)  # fmt: skip
        if qk_norm:
            q, k = rms(q, at[f"{block}.attn.q_norm.weight"]), rms(k, at[f"{block}.attn.k_norm.weight"])
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // 4)).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2) @ at[f"{block}.attn.proj.weight"].T + at[f"{block}.attn.proj.bias"]
        x = x + mixed * at[f"{block}.ls1"]
        inner = normed(x, f"{block}.norm2") @ at[f"{block}.mlp.fc1.weight"].T + at[f"{block}.mlp.fc1.bias"]
        inner = nn.functional.gelu(inner) @ at[f"{block}.mlp.fc2.weight"].T + at[f"{block}.mlp.fc2.bias"]
        x = x + inner * at[f"{block}.ls2"]
    return x


def save_published(folder, tensors, config, files=1):
    """Write a published InternViT, its weights in one or several files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    for number in range(files):
        part = {name: tensors[name] for name in names[number::files]}
        save_file(part, folder / f"model-0000{number + 1}-of-0000{files}.safetensors")

import copy
import json
import math
import os
import sys
import types
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from covft.errors import CheckpointError, ConfigError, UnknownViTError, UnsupportedViTError
from covft.integrations import (
    build_internvl,
    build_llava,
    freeze_unread,
    image_text_of,
    llava_processor,
    load_image_processor,
    load_projector,
    save_projector,
    whole_weights,
)
from covft.integrations.building.internvit import convert
from tests.helpers.prompts import tokenizer_of

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


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of pretrained towers and language models."""
    import transformers

    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    for name, make in TOWERS.items():
        shaken(make(root)[0]).save_pretrained(root / name)
    for name, (config, options) in LLMS.items():
        made = getattr(transformers, config)(**LANGUAGE, **options)
        shaken(transformers.AutoModelForCausalLM.from_config(made)).save_pretrained(root / name)
    return root


@pytest.fixture
def tokenizer():
    tokenizer = copy.deepcopy(tokenizer_of("vicuna"))
    assert len(tokenizer) > LANGUAGE["vocab_size"], "the embeddings have to grow"
    return tokenizer


def prompt(model, tokenizer, rows=2):
    """Token ids with an image in each row, and pictures."""
    image = torch.full((rows, model.config.image_seq_length), model.config.image_token_id)
    words = torch.randint(10, 200, (rows, 5))
    return {"input_ids": torch.cat([words[:, :2], image, words[:, 2:]], 1), "pixel_values": torch.rand(rows, 3, 32, 32)}


def naive_logits(model, tower, llm, batch, *, dropped, layer, projector):
    """LLaVA written out: a hidden state of the tower, through the projector, in the places of the image tokens."""
    states = tower(batch["pixel_values"], output_hidden_states=True)
    state = states.last_hidden_state if layer == -1 else states.hidden_states[layer]
    features = projector(state[:, dropped:])
    embeddings = llm.get_input_embeddings()(batch["input_ids"]).clone()
    for row in range(len(embeddings)):
        places = (batch["input_ids"][row] == model.config.image_token_id).nonzero()[:, 0]
        for number, place in enumerate(places.tolist()):
            embeddings[row, place] = features[row, number]
    return llm(inputs_embeds=embeddings).logits


def two_layers(model):
    projector = model.model.multi_modal_projector

    def apply(x):
        inner = nn.functional.gelu(x @ projector.linear_1.weight.T + projector.linear_1.bias)
        return inner @ projector.linear_2.weight.T + projector.linear_2.bias

    return apply


@pytest.mark.parametrize(
    ("vision", "language"), [*((tower, "llama") for tower in TOWERS), *(("clip", llm) for llm in LLMS)]
)
def test_llava_is_its_parts(parts, tokenizer, tmp_path, vision, language):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    model = build_llava(parts / vision, parts / language, tokenizer)
    loaded = TOWERS[vision](None)[0]
    whole = type(loaded).from_pretrained(parts / vision)
    tower = getattr(whole, "vision_model", whole)
    llm = AutoModelForCausalLM.from_pretrained(parts / language)
    for saved, ours in ((tower, model.model.vision_tower), (llm.base_model, model.model.language_model)):
        ours = ours.state_dict()
        for name, tensor in saved.state_dict().items():
            if "embed_tokens" not in name:
                torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)
    rows = LANGUAGE["vocab_size"]
    for saved, ours in (
        (llm.get_input_embeddings(), model.get_input_embeddings()),
        (llm.lm_head, model.lm_head),
    ):
        torch.testing.assert_close(ours.weight[:rows], saved.weight, rtol=0, atol=0)
        assert len(ours.weight) % 64 == 0
        assert len(ours.weight) >= len(tokenizer)
        for row in ours.weight[rows:]:
            torch.testing.assert_close(row, saved.weight.mean(0))
    tied = LLMS[language][1]["tie_word_embeddings"]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied

    prefix, kept = PREFIX[vision]
    assert model.config.image_seq_length == GRID**2 + kept
    assert model.config.vision_feature_select_strategy == ("default" if prefix else "full")
    batch = prompt(model, tokenizer)
    logits = model(**batch).logits
    llm.resize_token_embeddings(len(model.lm_head.weight), mean_resizing=False)
    llm.get_input_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    llm.lm_head.weight.data.copy_(model.lm_head.weight)
    naive = naive_logits(
        model, tower, llm, batch, dropped=prefix - kept, layer=-2, projector=two_layers(model)
    )  # fmt: skip
    torch.testing.assert_close(logits, naive, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model)
    assert {key: value for key, value in info.items() if value} == {}
    torch.testing.assert_close(again(**batch).logits, logits)
    answer = again.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > batch["input_ids"].shape[1]
    assert again.generation_config.pad_token_id == tokenizer.pad_token_id


def test_internvl_is_its_parts(parts, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, InternVLVisionModel

    model = build_internvl(parts / "internvit", parts / "phi3", tokenizer)
    assert model.config.image_seq_length == GRID**2 // 4
    tower = InternVLVisionModel.from_pretrained(parts / "internvit")
    llm = AutoModelForCausalLM.from_pretrained(parts / "phi3")
    llm.resize_token_embeddings(len(model.lm_head.weight), mean_resizing=False)
    llm.get_input_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    llm.lm_head.weight.data.copy_(model.lm_head.weight)
    projector = model.model.multi_modal_projector

    def project(x):  # four neighbours side by side, column after column of a square
        grid = x.reshape(len(x), GRID, GRID, WIDTH)
        squares = [grid[:, i::2, j::2] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))]
        return projector.linear_2(
            nn.functional.gelu(projector.linear_1(projector.layer_norm(torch.cat(squares, -1).flatten(1, 2))))
        )

    batch = prompt(model, tokenizer)
    logits = model(**batch).logits
    naive = naive_logits(model, tower, llm, batch, dropped=1, layer=-1, projector=project)
    torch.testing.assert_close(logits, naive, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    torch.testing.assert_close(again(**batch).logits, logits)
    text = image_text_of(again, tokenizer)
    assert text(2) == "<img>" + "<IMG_CONTEXT>" * 8 + "</img>"
    assert text.token_id(tokenizer) == model.config.image_token_id


# ------------------------------------------------------------------------ InternViT as published


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


@pytest.mark.parametrize(("qk_norm", "norm"), [(False, "layer_norm"), (True, "rms_norm")], ids=["300M", "6B"])
def test_internvit_as_published_is_read(parts, tokenizer, tmp_path, qk_norm, norm):
    tensors, config = published(qk_norm, norm)
    half = len(tensors) // 2  # in two files, as those of the large ones
    save_file(dict(list(tensors.items())[:half]), tmp_path / "model-00001-of-00002.safetensors")
    save_file(dict(list(tensors.items())[half:]), tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build_internvl(tmp_path, parts / "llama", tokenizer, dtype=torch.float64)
    images = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    expected = published_forward(tensors, images, qk_norm, norm)
    # transformers' RMSNorm computes in float32
    torch.testing.assert_close(model.model.vision_tower(images).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.model.vision_tower.parameters())
    assert all(p.requires_grad for p in model.parameters())
    model(**{**prompt(model, tokenizer), "pixel_values": images}).logits.sum().backward()


def test_internvit_with_other_tensors_is_refused(parts, tokenizer, tmp_path):
    tensors, config = published()
    del tensors["encoder.layers.1.ls2"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.lambda_2"):
        build_internvl(tmp_path, parts / "llama", tokenizer)


def test_conversion_keeps_every_tensor():
    tensors, _ = published(qk_norm=True)
    state = convert(tensors)
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in tensors.values())
    q, k, v = tensors["encoder.layers.0.attn.qkv.bias"].split(WIDTH)
    for part, tensor in (("q", q), ("k", k), ("v", v)):
        torch.testing.assert_close(state[f"encoder.layer.0.attention.{part}_proj.bias"], tensor)


# ------------------------------------------------------------------------------------- settings


def test_loaded_parts_serve_too_and_are_not_copied(parts, tokenizer):
    from transformers import AutoModelForCausalLM, Dinov2Model

    tower = Dinov2Model.from_pretrained(parts / "dinov2")
    llm = AutoModelForCausalLM.from_pretrained(parts / "qwen2")
    model = build_llava(tower, llm, tokenizer, image_size=64)
    assert model.model.vision_tower is tower
    assert model.model.language_model is llm.model
    assert model.config.image_seq_length == 64
    batch = prompt(model, tokenizer)
    model(**{**batch, "pixel_values": torch.rand(2, 3, 64, 64)})


def test_dtype_and_attention_reach_both_parts(parts, tokenizer):
    model = build_llava(
        parts / "clip", parts / "llama", tokenizer, dtype=torch.bfloat16, attn_implementation="eager"
    )  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "eager"
    sdpa = build_llava(parts / "clip", parts / "llama", tokenizer, attn_implementation="sdpa")
    assert sdpa.model.vision_tower.config._attn_implementation == "sdpa"
    assert {p.dtype for p in sdpa.parameters()} == {torch.float32}


def test_parts_of_two_dtypes_meet_in_that_of_the_language_model(parts, tokenizer):
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(parts / "llama", dtype=torch.bfloat16)
    model = build_llava(parts / "clip", llm, tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = prompt(model, tokenizer)
    assert model(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}).logits.isfinite().all()


def test_a_tokenizer_without_padding_gets_one(parts, tokenizer):
    tokenizer.pad_token = None
    model = build_llava(parts / "clip", parts / "llama", tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id


def test_embeddings_that_have_room_stay(parts, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = LlamaForCausalLM(LlamaConfig(**{**LANGUAGE, "vocab_size": 500}))
    before = llm.get_input_embeddings().weight.detach().clone()
    model = build_llava(parts / "clip", llm, tokenizer)
    torch.testing.assert_close(model.get_input_embeddings().weight, before, rtol=0, atol=0)
    assert model.config.text_config.vocab_size == 500


def test_the_processor_writes_as_many_placeholders_as_there_are_features(parts, tmp_path, tokenizer):
    from PIL import Image
    from transformers import AutoProcessor, CLIPImageProcessor

    for vision in ("clip", "dinov3", "siglip"):
        CLIPImageProcessor().save_pretrained(parts / vision)  # of 224 pixels, which these towers are not for
        model = build_llava(parts / vision, parts / "llama", tokenizer)
        processor = llava_processor(model, tokenizer, load_image_processor(parts / vision, SIZE))
        processor.save_pretrained(tmp_path / vision)
        processor = AutoProcessor.from_pretrained(tmp_path / vision)
        inputs = processor(images=Image.new("RGB", (50, 40)), text="<image> what is left?", return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == model.config.image_seq_length
        assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE)
        model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")})
        assert processor.chat_template == tokenizer.chat_template


def test_the_image_processor_makes_what_the_tower_takes(parts, tmp_path):
    from PIL import Image
    from transformers import BitImageProcessor, SiglipImageProcessor

    picture = Image.new("RGB", (50, 40))
    BitImageProcessor().save_pretrained(parts / "dinov2")  # 256, cropped to 224
    SiglipImageProcessor().save_pretrained(parts / "internvit")  # 224, not cropped
    (tmp_path / "config.json").write_text(json.dumps(published()[1]))
    BitImageProcessor().save_pretrained(tmp_path)
    for source in (parts / "dinov2", parts / "internvit", tmp_path):
        assert load_image_processor(source)(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, SIZE, SIZE)
    assert load_image_processor(parts / "dinov2", 48)(picture)["pixel_values"][0].shape == (3, 48, 48)


def test_covft_goes_into_an_assembled_model(parts, tokenizer):
    import covft
    from covft.testing import HashTextEncoder

    for model in (
        build_llava(parts / "dinov3", parts / "phi3", copy.deepcopy(tokenizer)),
        build_internvl(parts / "internvit", parts / "qwen2", tokenizer),
    ):
        batch = prompt(model, tokenizer)
        before = model(**batch).logits
        covft.attach(model, HashTextEncoder(16), tokenizer=tokenizer, layers=[1, 2])
        after = model(**batch, context_text=["what is left?", "how many?"]).logits
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
        covft.get_encoder(model).train()
        model(**batch, context_text=["what is left?", "how many?"]).logits.square().mean().backward()
        assert all(p.grad is not None for p in covft.get_encoder(model).trainable_parameters())


@pytest.mark.parametrize("layer", [-2, 2, -1])
@pytest.mark.parametrize("vision", TOWERS)
def test_what_no_loss_depends_on_is_frozen(parts, tokenizer, vision, layer):
    model = build_llava(parts / vision, parts / "llama", tokenizer, feature_layer=layer)
    frozen = freeze_unread(model)
    model(**prompt(model, tokenizer)).logits.square().mean().backward()
    without = [name for name, p in model.model.vision_tower.named_parameters() if p.grad is None]
    if layer == -1:  # whether a last norm is behind the last state is the tower's own affair
        assert set(frozen) <= set(without)
        assert not any("encoder" in name for name in frozen)
    else:
        assert frozen == without
        assert any("layer.3." in name or "layers.3." in name for name in frozen)


# --------------------------------------------------------------------------------------- errors


def test_what_cannot_be_loaded_says_so(parts, tokenizer):
    with pytest.raises(UnknownViTError, match=r"vision tower .*nowhere"):
        build_llava(parts / "nowhere", parts / "llama", tokenizer)
    with pytest.raises(ConfigError, match=r"language model .*nowhere"):
        build_llava(parts / "clip", parts / "nowhere", tokenizer)
    with pytest.raises(UnknownViTError, match="no vision model"):
        build_llava(parts / "llama", parts / "llama", tokenizer)
    with pytest.raises(ConfigError, match="language model"):
        build_llava(parts / "clip", parts / "clip", tokenizer)
    with pytest.raises(ConfigError, match="no language model with a head"):
        build_llava(parts / "clip", nn.Linear(2, 2), tokenizer)
    with pytest.raises(ConfigError, match="image processor"):
        load_image_processor(parts / "llama")


def test_missing_weights_are_an_error(parts, tokenizer, tmp_path):
    from safetensors.torch import load_file

    for name, key, error in (
        ("dinov2", "encoder.layer.1.mlp.fc1.weight", UnsupportedViTError),
        ("llama", "model.layers.1.mlp.up_proj.weight", CheckpointError),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text((parts / name / "config.json").read_text())
        tensors = load_file(parts / name / "model.safetensors")
        del tensors[key]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        vision, language = (folder, parts / "llama") if name == "dinov2" else (parts / "clip", folder)
        with pytest.raises(error, match=key.replace(".", r"\.").replace("encoder", ".*")):
            build_llava(vision, language, tokenizer)


def test_settings_that_cannot_work_are_refused_before_anything_changes(parts, tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    words = len(tokenizer)
    small = {key: value for key, value in LANGUAGE.items() if key != "max_position_embeddings"}
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, head_dim=8))
    empty = LlamaForCausalLM(LlamaConfig(**LANGUAGE)).to("meta")
    tokenizer.add_tokens(["<new>"])
    for options, match in (
        ({"feature_layer": -6}, r"feature_layer=-6.*"),
        ({"image_size": 48}, "takes no pictures of 48 x 48"),
        ({"language": gemma}, "final_logit_softcapping"),
        ({"language": empty}, "not all on this process"),
    ):
        with pytest.raises(ConfigError, match=match):
            build_llava(**{"vision": parts / "clip", "language": parts / "llama", "tokenizer": tokenizer, **options})
    with pytest.raises(ConfigError, match="takes no pictures of 60 x 60"):
        build_llava(parts / "dinov3", parts / "llama", tokenizer, image_size=60)
    with pytest.raises(UnsupportedViTError, match="made for InternViT"):
        build_internvl(parts / "clip", parts / "llama", tokenizer)
    for ratio in (0.3, 1 / 3, 2):
        with pytest.raises(ConfigError, match="does not divide a grid of 4 x 4"):
            build_internvl(parts / "internvit", parts / "llama", tokenizer, downsample_ratio=ratio)
    assert len(tokenizer) == words + 1


def test_a_part_of_another_class_is_refused(parts, tokenizer):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    with pytest.raises(UnsupportedViTError, match="CLIPVisionModelWithProjection as its vision part"):
        build_llava(tower, parts / "llama", tokenizer)


def test_weights_are_whole_while_they_are_loaded(monkeypatch):
    from transformers.integrations import deepspeed

    class Config:
        def is_zero3(self):
            return True

    held = Config()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", weakref.ref(held))
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert deepspeed.is_deepspeed_zero3_enabled()

    def load_and_fail():
        with whole_weights():
            assert not deepspeed.is_deepspeed_zero3_enabled()
            assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
            raise KeyError

    with pytest.raises(KeyError):
        load_and_fail()
    assert deepspeed.is_deepspeed_zero3_enabled()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


# ------------------------------------------------------------------------------------ projector


def test_a_projector_goes_from_one_model_to_another(parts, tokenizer, tmp_path):
    first = build_llava(parts / "clip", parts / "llama", tokenizer)
    second = build_llava(parts / "clip", parts / "llama", tokenizer, dtype=torch.bfloat16)
    path = save_projector(first, tmp_path / "stage1")
    assert path == tmp_path / "stage1" / "projector.safetensors"
    assert [file.name for file in path.parent.iterdir()] == ["projector.safetensors"]
    load_projector(second, tmp_path / "stage1")
    for ours, theirs in zip(
        second.model.multi_modal_projector.parameters(), first.model.multi_modal_projector.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs.bfloat16(), rtol=0, atol=0)
        assert ours.requires_grad
    load_projector(second, path)  # the file itself does, too


def test_another_projector_is_refused_and_nothing_changes(parts, tokenizer, tmp_path):
    model = build_llava(parts / "clip", parts / "llama", tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_projector(build_internvl(parts / "internvit", parts / "llama", tokenizer), tmp_path / "internvl")
    with pytest.raises(CheckpointError, match=r"not a projector of this model[\s\S]*layer_norm"):
        load_projector(model, tmp_path / "internvl")
    with pytest.raises(CheckpointError, match="There is no projector"):
        load_projector(model, tmp_path)
    whole = save_projector(model, tmp_path / "cut")
    data = whole.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        whole.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut short"):
            load_projector(model, tmp_path / "cut")
    with pytest.raises(UnsupportedViTError, match="0 projectors"):
        save_projector(nn.Linear(2, 2), tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_save_that_fails_leaves_the_old_projector(parts, tokenizer, tmp_path, monkeypatch):
    model = build_llava(parts / "clip", parts / "llama", tokenizer)
    path = save_projector(model, tmp_path)
    before = path.read_bytes()

    def full_disk(state, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("covft.utils.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_projector(model, tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_shared_out_weights_are_gathered(parts, tokenizer, tmp_path, monkeypatch):
    """ZeRO-3 leaves empty tensors behind, and gives them their values for as long as they are gathered."""
    model = build_llava(parts / "clip", parts / "llama", tokenizer)
    whole = {name: tensor.clone() for name, tensor in model.model.multi_modal_projector.state_dict().items()}
    values = {}
    for number, parameter in enumerate(model.model.multi_modal_projector.parameters()):
        parameter.ds_id, values[number] = number, parameter.data
        parameter.ds_shape, parameter.ds_status = parameter.shape, types.SimpleNamespace(name="NOT_AVAILABLE")
        parameter.data = torch.empty(0)

    class GatheredParameters:
        def __init__(self, parameters, modifier_rank):
            self.parameters = parameters

        def __enter__(self):
            for parameter in self.parameters:
                parameter.data = values[parameter.ds_id]

        def __exit__(self, *error):
            for parameter in self.parameters:
                parameter.data = torch.empty(0)

    fake = types.ModuleType("deepspeed")
    fake.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    save_projector(model, tmp_path)
    again = build_llava(parts / "clip", parts / "llama", tokenizer)
    load_projector(again, tmp_path)
    for name, tensor in again.model.multi_modal_projector.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=0)

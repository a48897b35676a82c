"""Saving, loading, and importing released checkpoints: the numbers that come back are those that left."""

import argparse
import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import covft
from covft import CoVFTConfig
from covft.checkpoints import import_reference
from covft.checkpoints.folder import read_folder, write_folder
from covft.errors import CheckpointError, UnsupportedViTError
from covft.testing import HashTextEncoder

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

WIDTH = 8
GOLDEN = Path(__file__).parent / "golden"


def timm_vit():
    return timm.create_model("test_vit", img_size=32, num_classes=5)


def clip_config(**overrides):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    return transformers.CLIPVisionConfig(**{**sizes, "image_size": 32, "patch_size": 8, **overrides})


def clip_vit(**overrides):
    return transformers.CLIPVisionModel(clip_config(**overrides))


TOWERS = {"timm": timm_vit, "clip": clip_vit}
VARIANTS = [
    {},
    {"context": "image"},
    {"context": "text", "train_norms": "none"},
    {"context": "concat", "routing": "sparse", "experts": 3, "top_k": 2, "train_norms": "adapted"},
    {"routing": "sparse", "experts": 3, "top_k": 1},
    {"routing": "uniform"},
    {"routing": "random", "experts": 3, "top_k": 2},
]


def tensor_of(output):
    return getattr(output, "last_hidden_state", output)


def inputs(dtype=torch.float32):
    return torch.randn(3, 3, 32, 32, dtype=dtype), torch.randn(3, WIDTH, dtype=dtype)


def wrapped(vit, **settings):
    return covft.wrap(vit, WIDTH, **{"layers": (1, 2), "experts": 2, **settings})


def perturb(encoder):
    with torch.no_grad():
        for parameter in encoder.trainable_parameters():
            parameter += torch.randn_like(parameter) * 0.1


def trained(encoder, steps=3):
    optimizer = torch.optim.AdamW(encoder.param_groups(lr=0.02))
    perturb(encoder)
    for _ in range(steps):
        images, text = inputs()
        tensor_of(encoder(images, text)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return encoder


@pytest.fixture
def saved(tmp_path):
    """A trained encoder, the base it was made from, and the folder it was saved in."""
    base = clip_vit().eval()
    encoder = trained(wrapped(copy.deepcopy(base)).train()).eval()
    encoder.save_pretrained(tmp_path / "run")
    return encoder, base, tmp_path / "run"


def hooks_of(module):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(name, table, len(getattr(m, table))) for name, m in module.named_modules() for table in tables]


def snapshot(vit):
    """Everything that a refused load might have left behind."""
    return {
        "values": {name: tensor.clone() for name, tensor in vit.state_dict().items()},
        "classes": {name: type(module) for name, module in vit.named_modules()},
        "modules": [id(module) for module in vit.modules()],
        "parameters": [id(parameter) for parameter in vit.parameters()],
        "trainable": [parameter.requires_grad for parameter in vit.parameters()],
        "training": [module.training for module in vit.modules()],
        "hooks": hooks_of(vit),
        "attributes": sorted(vars(vit)),
    }


def assert_unchanged(vit, before):
    after = snapshot(vit)
    values, wanted = after.pop("values"), before["values"]
    assert values.keys() == wanted.keys()
    assert all(torch.equal(values[name], tensor) for name, tensor in wanted.items())
    assert after == {name: value for name, value in before.items() if name != "values"}


# Save and load


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(map(str, s.values())) or "default")
def test_a_loaded_encoder_gives_the_outputs_of_the_saved_one(tower, settings, tmp_path):
    base = TOWERS[tower]()
    encoder = trained(wrapped(copy.deepcopy(base).train(), **settings)).eval()
    norms = list(encoder.original.values)
    assert bool(norms) == (settings.get("train_norms") != "none")
    encoder.save_pretrained(tmp_path)

    fresh = copy.deepcopy(base).eval()
    loaded = covft.load(tmp_path, fresh, WIDTH)

    assert loaded.vit is fresh
    assert loaded.covft_config == encoder.covft_config
    assert loaded.layers == (1, 2)
    images, text = inputs()
    with torch.no_grad():
        output, again = tensor_of(encoder(images, text)), tensor_of(loaded(images, text))
        start = tensor_of(base.eval()(images))
    assert torch.equal(output, again)
    assert not torch.allclose(output, start, atol=1e-2)
    before, after = encoder.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in norms:  # they have moved, so that loading them has been tested
        assert not torch.equal(after[f"vit.{name}"], base.state_dict()[name])
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in encoder.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("tower", TOWERS)
def test_only_what_was_added_or_trained_is_saved(tower, tmp_path):
    base = TOWERS[tower]()
    encoder = trained(wrapped(copy.deepcopy(base).train()))
    encoder.save_pretrained(tmp_path)
    tensors, _ = read_folder(tmp_path)
    trainable = {name for name, p in encoder.vit.named_parameters() if p.requires_grad}
    assert set(tensors) == trainable
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "covft_config.json",
        "model.safetensors",
    ]


GOLDENS = {
    "timm_cve_dense": ("timm", {}),
    "timm_image_dense": ("timm", {"context": "image", "train_norms": "none"}),
    "timm_uniform": ("timm", {"routing": "uniform", "train_norms": "adapted"}),
    "clip_cve_dense": ("clip", {}),
    "clip_text_dense": ("clip", {"context": "text", "train_norms": "none"}),
    "clip_concat_sparse": ("clip", {"context": "concat", "routing": "sparse", "train_norms": "adapted"}),
}


@pytest.mark.parametrize("golden", GOLDENS)
def test_names_and_shapes_in_the_file_are_those_that_folders_out_there_have(golden, tmp_path):
    """A renamed parameter makes every saved folder unreadable: if this fails, load() needs a migration."""
    tower, settings = GOLDENS[golden]
    wrapped(TOWERS[tower](), **settings).save_pretrained(tmp_path)
    found = {name: list(tensor.shape) for name, tensor in read_folder(tmp_path)[0].items()}
    assert found == json.loads((GOLDEN / f"keys_{golden}.json").read_text(encoding="utf-8"))


def test_settings_in_the_folder_say_what_it_belongs_to(saved):
    encoder, base, folder = saved
    config = json.loads((folder / "covft_config.json").read_text(encoding="utf-8"))
    assert CoVFTConfig.from_dict(config["covft"]) == encoder.covft_config
    assert config["library_version"] == covft.__version__
    assert config["base"]["library"] == "transformers"
    assert config["base"]["class_name"] == "CLIPVisionModel"
    assert config["base"]["source"] is None  # built from a config, so no name leads back to it
    assert config["base"]["fingerprint"]["num_tensors"] == len(base.state_dict())
    assert config["text"]["text_dim"] == WIDTH
    assert config["extra"] == []


class Words(nn.Module):
    """A text encoder with weights of its own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)

    def forward(self, texts):
        return torch.stack([self.table(torch.tensor(list(t.encode()))).mean(0) for t in texts])


def test_the_text_encoder_is_never_saved(tmp_path):
    words, base = Words(), timm_vit()
    encoder = covft.wrap(copy.deepcopy(base), words, layers=(1, 2), experts=2)
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    tensors, config = read_folder(tmp_path)
    table = words.table.weight.detach()
    assert not [name for name in [*tensors, *encoder.state_dict()] if "table" in name or "text_encoder" in name]
    assert not any(t.shape == table.shape and torch.equal(t, table) for t in tensors.values())
    assert config["text"]["text_dim"] == WIDTH
    images, texts = torch.randn(2, 3, 32, 32), ["left?", "right?"]
    loaded = covft.load(tmp_path, copy.deepcopy(base), words)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images, texts), encoder.eval()(images, texts))
        assert not torch.equal(loaded(images, texts), loaded(images, texts[::-1]))


@pytest.mark.parametrize(("kept", "given"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_base_may_have_another_floating_point_type(kept, given, tmp_path):
    kept, given = getattr(torch, kept), getattr(torch, given)
    base = clip_vit().eval()
    encoder = wrapped(copy.deepcopy(base).to(kept))
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    loaded = covft.load(tmp_path, copy.deepcopy(base).to(given), WIDTH)
    for name, tensor in encoder.adapted_state_dict().items():
        here = loaded.vit.state_dict()[name]
        assert here.dtype == given
        assert torch.equal(here, tensor.to(given))
    images, text = inputs(given)
    assert tensor_of(loaded(images, text)).isfinite().all()


@pytest.mark.parametrize("change", ["one value", "other weights", "other width", "other weights, other type"])
def test_other_base_weights_are_refused_and_the_vit_stays_as_it_was(saved, change):
    _, base, folder = saved
    vit = copy.deepcopy(base)
    if change == "one value":
        with torch.no_grad():
            vit.get_parameter(next(n for n, _ in vit.named_parameters() if "layers.3.mlp.fc1.weight" in n))[0, 0] += (
                1e-3
            )
    else:
        vit = clip_vit(hidden_size=32) if "width" in change else clip_vit()
        vit = vit.to(torch.bfloat16) if "type" in change else vit
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match="made for other base weights") as caught:
        covft.load(folder, vit, WIDTH)
    assert "CLIPVisionModel" in str(caught.value)
    assert_unchanged(vit, before)


def test_the_original_ffns_and_norms_are_part_of_the_fingerprint(saved):
    """Of the adapted blocks too, whose own FFN is gone from the wrapped ViT, and of norms that have moved."""
    _, base, folder = saved
    for part in ("layers.1.mlp.fc2.bias", "layers.0.layer_norm1.weight"):
        vit = copy.deepcopy(base)
        with torch.no_grad():
            vit.get_parameter(next(n for n, _ in vit.named_parameters() if part in n))[0] += 1e-3
        with pytest.raises(CheckpointError, match="made for other base weights"):
            covft.load(folder, vit, WIDTH)


def rewritten(folder, change):
    """The same folder with other tensors, whole in every other way."""
    tensors, config = read_folder(folder)
    for part in ("format", "weights"):
        config.pop(part)
    change(tensors, config)
    write_folder(folder, tensors, config, "")


def test_every_missing_and_unexpected_tensor_is_named_and_the_vit_stays_as_it_was(saved):
    _, base, folder = saved
    names = sorted(read_folder(folder)[0])
    gone, renamed, reshaped = names[::5], names[1], names[2]

    def change(tensors, config):
        for name in gone:
            del tensors[name]
        tensors["somewhere.else"] = tensors.pop(renamed)
        tensors["blocks.99.mlp"] = torch.zeros(1)
        tensors[reshaped] = tensors[reshaped][None]

    rewritten(folder, change)
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match="not those of this encoder") as caught:
        covft.load(folder, vit, WIDTH)
    missing, unexpected, shapes = re.fullmatch(
        r"missing: (.*); unexpected: (.*); other shapes: (.*)", caught.value.got
    ).groups()
    assert missing.split(", ") == sorted([*gone, renamed])
    assert unexpected.split(", ") == ["blocks.99.mlp", "somewhere.else"]
    assert shapes.startswith(f"{reshaped} (1, ")
    assert_unchanged(vit, before)


def test_text_features_of_another_width_are_refused_and_the_vit_stays_as_it_was(saved):
    _, base, folder = saved
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match="other shapes"):
        covft.load(folder, vit, WIDTH * 2)
    assert_unchanged(vit, before)


def test_a_damaged_folder_leaves_the_vit_as_it_was(saved):
    _, base, folder = saved
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match="cut short"):
        covft.load(folder, vit, WIDTH)
    assert_unchanged(vit, before)


def test_a_wrapped_vit_is_refused(saved):
    encoder, _, folder = saved
    with pytest.raises(UnsupportedViTError, match="wrapped already"):
        covft.load(folder, encoder.vit, WIDTH)


@pytest.mark.parametrize("tower", TOWERS)
def test_unwrap_after_load_gives_the_base_back_bit_for_bit(tower, tmp_path):
    base = TOWERS[tower]().eval()
    trained(wrapped(copy.deepcopy(base).train())).save_pretrained(tmp_path)
    vit = copy.deepcopy(base)
    images, _ = inputs()
    before = snapshot(vit)
    assert covft.unwrap(covft.load(tmp_path, vit, WIDTH)) is vit
    after = snapshot(vit)
    assert all(torch.equal(after["values"][n], t) for n, t in base.state_dict().items())
    assert after["values"].keys() == before["values"].keys()
    for part in ("classes", "trainable", "hooks", "training"):
        assert after[part] == before[part]
    with torch.no_grad():
        assert torch.equal(tensor_of(vit(images)), tensor_of(base(images)))


def test_a_parameter_that_the_caller_trained_beside_is_saved_and_restored(tmp_path):
    base = timm_vit()
    encoder = wrapped(copy.deepcopy(base))
    encoder.vit.head.weight.requires_grad_(True)
    encoder.vit.cls_token.requires_grad_(True)
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    tensors, config = read_folder(tmp_path)
    assert config["extra"] == ["cls_token", "head.weight"]
    assert torch.equal(tensors["head.weight"], encoder.vit.head.weight)
    loaded = covft.load(tmp_path, copy.deepcopy(base), WIDTH)
    assert torch.equal(loaded.vit.head.weight, encoder.vit.head.weight)
    assert torch.equal(loaded.vit.cls_token, encoder.vit.cls_token)
    assert loaded.vit.head.weight.requires_grad
    assert not loaded.vit.head.bias.requires_grad
    images, text = inputs()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images, text), encoder.eval()(images, text))


def test_a_loaded_encoder_can_be_saved_and_loaded_again(tmp_path):
    base = timm_vit()
    encoder = wrapped(copy.deepcopy(base))
    encoder.vit.head.weight.requires_grad_(True)
    perturb(encoder)
    encoder.save_pretrained(tmp_path / "one")
    covft.load(tmp_path / "one", copy.deepcopy(base), WIDTH).save_pretrained(tmp_path / "two")
    (one, first), (two, second) = read_folder(tmp_path / "one"), read_folder(tmp_path / "two")
    assert first == second
    assert one.keys() == two.keys()
    loaded = covft.load(tmp_path / "two", copy.deepcopy(base), WIDTH)
    assert torch.equal(loaded.vit.head.weight, encoder.vit.head.weight)


def test_a_second_save_writes_the_same_folder(saved, tmp_path):
    _, base, folder = saved
    covft.load(folder, copy.deepcopy(base), WIDTH).save_pretrained(tmp_path / "again")
    for name in ("covft_config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_weights_without_values_are_not_saved(tmp_path):
    with torch.device("meta"):
        vit = timm_vit()
    with pytest.raises(CheckpointError, match="meta device"):
        wrapped(vit).save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Load without the parts


def test_the_base_is_built_again_from_where_it_came(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_vit().save_pretrained(tmp_path / "base")
        vit = transformers.CLIPVisionModel.from_pretrained(tmp_path / "base")
    encoder = covft.wrap(vit, HashTextEncoder(WIDTH), layers=(1, 2), experts=2)
    perturb(encoder)
    encoder.save_pretrained(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "covft_config.json").read_text(encoding="utf-8"))
    assert config["base"]["source"] == f"hf:{tmp_path / 'base'}"
    assert config["text"]["source"] == f"hash:{WIDTH}"
    loaded = covft.load(tmp_path / "run", text_encoder=HashTextEncoder(WIDTH))
    assert type(loaded.vit) is transformers.CLIPVisionModel
    images, texts = torch.randn(2, 3, 32, 32), ["left?", "right?"]
    with torch.no_grad():
        output = encoder.eval()(images, texts).last_hidden_state
        assert torch.equal(loaded.eval()(images, texts).last_hidden_state, output)


def test_a_base_that_changed_at_its_source_is_refused(tmp_path):
    clip_vit().save_pretrained(tmp_path / "base")
    wrapped(transformers.CLIPVisionModel.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "run")
    clip_vit().save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="made for other base weights"):
        covft.load(tmp_path / "run", text_encoder=WIDTH)


def test_a_base_without_a_source_has_to_be_given(saved):
    with pytest.raises(
        CheckpointError, match=r"does not name the source of its base ViT \(transformers CLIPVisionModel\)"
    ):
        covft.load(saved[2], text_encoder=WIDTH)


def test_a_text_encoder_without_a_source_has_to_be_given(tmp_path):
    base = clip_vit()
    encoder = covft.wrap(copy.deepcopy(base), Words(), layers=(1, 2), experts=2)
    encoder.save_pretrained(tmp_path)
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    with pytest.raises(CheckpointError, match="cannot be built from its name") as caught:
        covft.load(tmp_path, vit)
    assert caught.value.fix == f"covft.load(folder, text_encoder={WIDTH})"
    assert_unchanged(vit, before)


def test_where_the_caller_brings_features_no_text_encoder_is_needed(saved):
    encoder, base, folder = saved
    loaded = covft.load(folder, copy.deepcopy(base))
    assert loaded.text_dim == WIDTH
    images, text = inputs()
    with torch.no_grad():
        assert torch.equal(tensor_of(loaded(images, text)), tensor_of(encoder(images, text)))


def test_where_the_text_is_not_looked_at_no_text_encoder_is_needed(tmp_path):
    base = timm_vit().eval()
    encoder = covft.wrap(copy.deepcopy(base), None, layers=(1, 2), experts=2, context="image")
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    images, _ = inputs()
    loaded = covft.load(tmp_path, copy.deepcopy(base))
    with torch.no_grad():
        assert torch.equal(loaded(images), encoder(images))


def test_a_repository_that_cannot_be_reached_is_said_so():
    with pytest.raises(CheckpointError, match="not a folder here, and cannot be fetched") as caught:
        covft.load("someone/no-such-encoder", timm_vit(), WIDTH)
    assert "hf download someone/no-such-encoder" in str(caught.value)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        covft.load(tmp_path / "nowhere", timm_vit(), WIDTH)


# The released checkpoints

D, F, E, HEADS, LAYERS = 16, 24, 4, 4, (1, 2)
PREFIX = "model.vision_tower.vision_tower.vision_model.encoder.layers"


def released_state(dtype=torch.float64, norms=True):
    """Names and shapes of the released checkpoints at small size, every number random."""
    shapes = {}
    for i in LAYERS:
        mlp = f"{PREFIX}.{i}.mlp"
        for e in range(E):
            shapes[f"{mlp}.experts.{e}.0.weight"], shapes[f"{mlp}.experts.{e}.0.bias"] = (F, D), (F,)
            shapes[f"{mlp}.experts.{e}.2.weight"], shapes[f"{mlp}.experts.{e}.2.bias"] = (D, F), (D,)
        for name, dim in (("image_resblock", D), ("text_resblock", WIDTH)):
            shapes[f"{mlp}.{name}.fc1.weight"], shapes[f"{mlp}.{name}.fc1.bias"] = (2 * dim, dim), (2 * dim,)
            shapes[f"{mlp}.{name}.fc2.weight"], shapes[f"{mlp}.{name}.fc2.bias"] = (dim, 2 * dim), (dim,)
            shapes[f"{mlp}.{name}.ln.weight"], shapes[f"{mlp}.{name}.ln.bias"] = (dim,), (dim,)
        shapes[f"{mlp}.cross_attn.q_proj_weight"] = (WIDTH, WIDTH)
        shapes[f"{mlp}.cross_attn.k_proj_weight"] = (WIDTH, D + WIDTH)
        shapes[f"{mlp}.cross_attn.v_proj_weight"] = (WIDTH, D + WIDTH)
        shapes[f"{mlp}.cross_attn.in_proj_bias"] = (3 * WIDTH,)
        shapes[f"{mlp}.cross_attn.out_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{mlp}.cross_attn.out_proj.bias"] = (WIDTH,)
        shapes[f"{mlp}.gate.weight"], shapes[f"{mlp}.gate.bias"] = (E, WIDTH), (E,)
    if norms:
        for i in range(max(LAYERS) + 1):
            for norm in ("layer_norm1", "layer_norm2"):
                shapes[f"{PREFIX}.{i}.{norm}.weight"] = shapes[f"{PREFIX}.{i}.{norm}.bias"] = (D,)
    return {name: torch.randn(shape, dtype=dtype) * 0.5 for name, shape in shapes.items()}


def other_parts(dtype=torch.float64):
    """What such a checkpoint holds beside: the language model, whose layers must not be taken for ours."""
    return {
        "model.layers.1.mlp.gate_proj.weight": torch.randn(3, 3, dtype=dtype),
        "model.layers.1.mlp.gate.weight": torch.randn(7, 7, dtype=dtype),
        "model.layers.0.input_layernorm.weight": torch.randn(3, dtype=dtype),
        "model.mm_projector.0.weight": torch.randn(3, 3, dtype=dtype),
        "lm_head.weight": torch.randn(3, 3, dtype=dtype),
    }


class ReleasedFFN(nn.Module):
    """The released arithmetic, from its tensors: every parameter of the attention, dead ones included."""

    def __init__(self, state, prefix, text):
        super().__init__()
        self.state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        self.text = text
        self.cross_attn = nn.MultiheadAttention(
            WIDTH, HEADS, kdim=D + WIDTH, vdim=D + WIDTH, batch_first=True, dtype=torch.float64
        )
        mark = "cross_attn."
        self.cross_attn.load_state_dict(
            {name.removeprefix(mark): t for name, t in self.state.items() if name.startswith(mark)}
        )

    def linear(self, name, v):
        return v @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def resblock(self, name, v):
        inner = self.linear(f"{name}.fc1", v)
        v = v + self.linear(f"{name}.fc2", inner / (1 + torch.exp(-1.702 * inner)))
        spread = (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return spread * self.state[f"{name}.ln.weight"] + self.state[f"{name}.ln.bias"]

    def forward(self, x):
        image, text = self.resblock("image_resblock", x), self.resblock("text_resblock", self.text)
        joint = torch.cat([image, text[:, None].expand(-1, x.shape[1], -1)], dim=-1)
        context = self.cross_attn(text[:, None], joint, joint)[0][:, 0]
        weights = torch.softmax(self.linear("gate", context), dim=-1)
        output = torch.zeros_like(x)
        for e in range(E):
            inner = self.linear(f"experts.{e}.0", x)
            inner = inner * torch.sigmoid(1.702 * inner)  # CLIP's own activation
            output += weights[:, e, None, None] * self.linear(f"experts.{e}.2", inner)
        return output


def reference_encoder(base=None, **overrides):
    vit = clip_vit().double().eval() if base is None else copy.deepcopy(base)
    return covft.wrap(vit, WIDTH, **{"layers": LAYERS, "config": CoVFTConfig.reference(), **overrides})


def layers_of(vit):
    return next(module for name, module in vit.named_modules() if name.endswith("encoder.layers"))


def released_outputs(base, state, images, text):
    vit = copy.deepcopy(base)
    with torch.no_grad():
        for i, block in enumerate(layers_of(vit)):
            for norm in ("layer_norm1", "layer_norm2"):
                for kind in ("weight", "bias"):
                    value = state.get(f"{PREFIX}.{i}.{norm}.{kind}")
                    if value is not None:
                        getattr(getattr(block, norm), kind).copy_(value)
            if i in LAYERS:
                block.mlp = ReleasedFFN(state, f"{PREFIX}.{i}.mlp.", text)
        return vit(images).last_hidden_state


@pytest.mark.parametrize("norms", [True, False])
def test_a_released_checkpoint_gives_the_released_arithmetic(norms):
    base = clip_vit().double().eval()
    encoder = reference_encoder(base)
    state = released_state(norms=norms)
    images, text = inputs(torch.float64)
    import_reference(encoder, {**state, **other_parts()})
    with torch.no_grad():
        found = encoder(images, text).last_hidden_state
    wanted = released_outputs(base, state, images, text)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert (wanted - base(images).last_hidden_state).abs().max() > 0.1


def test_norms_of_the_checkpoint_are_imported():
    encoder, state = reference_encoder(), released_state()
    import_reference(encoder, state)
    for i, block in enumerate(layers_of(encoder.vit)):
        for norm in ("layer_norm1", "layer_norm2"):
            imported = torch.equal(
                getattr(block, norm).weight, state.get(f"{PREFIX}.{i}.{norm}.weight", torch.zeros(1))
            )
            assert imported == (i <= max(LAYERS))


def test_an_imported_encoder_is_saved_and_unwrapped_like_any_other(tmp_path):
    base = clip_vit().double().eval()
    encoder = reference_encoder(base)
    import_reference(encoder, released_state())
    encoder.save_pretrained(tmp_path)
    images, text = inputs(torch.float64)
    with torch.no_grad():
        output = encoder(images, text).last_hidden_state
        loaded = covft.load(tmp_path, copy.deepcopy(base), WIDTH)
        assert torch.equal(loaded(images, text).last_hidden_state, output)
        restored = covft.unwrap(encoder)(images).last_hidden_state
        assert torch.equal(restored, base(images).last_hidden_state)


def halves(state):
    names = sorted(state)
    return {name: state[name] for name in names[::2]}, {name: state[name] for name in names[1::2]}


def write_shards(folder, state, suffix):
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    files = [f"{stem}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
    weight_map = {}
    for file, part in zip(files, halves(state), strict=True):
        write_one(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_one(path, state):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


LAYOUTS = ["file.safetensors", "file.bin", "file.pt", "nested.pt", "folder.safetensors", "folder.bin"]
LAYOUTS += ["shards.safetensors", "shards.bin", "index.safetensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_checkpoints_are_read_from_every_usual_kind_of_file(layout, tmp_path):
    base, state = clip_vit().double().eval(), released_state()
    everything = {**state, **other_parts()}
    kind, suffix = layout.split(".")
    path = tmp_path / f"weights.{suffix}"
    if kind == "file":
        write_one(path, everything)
    elif kind == "nested":
        write_one(path, {"state_dict": everything, "step": 3})
    elif kind == "folder":
        write_one(path, everything)
        path = tmp_path
    else:
        write_shards(tmp_path, everything, suffix)
        path = tmp_path / f"model.{suffix}.index.json" if kind == "index" else tmp_path
    encoder, wanted = reference_encoder(base), reference_encoder(base)
    import_reference(encoder, str(path))
    import_reference(wanted, state)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)


def test_files_that_are_not_there_are_named(tmp_path):
    encoder = reference_encoder()
    with pytest.raises(CheckpointError, match="does not exist"):
        import_reference(encoder, tmp_path / "nowhere.bin")
    with pytest.raises(CheckpointError, match="has no weights"):
        import_reference(encoder, tmp_path)
    write_shards(tmp_path, released_state(), "safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is incomplete") as caught:
        import_reference(encoder, tmp_path)
    assert "model-00002-of-00002.safetensors" in caught.value.got


def test_what_trainer_leaves_beside_the_weights_is_no_obstacle(tmp_path):
    base, state = clip_vit().double().eval(), released_state()
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.save(argparse.Namespace(learning_rate=2e-5), tmp_path / "training_args.bin")
    encoder, wanted = reference_encoder(base), reference_encoder(base)
    import_reference(encoder, tmp_path)
    import_reference(wanted, state)
    assert all(torch.equal(encoder.state_dict()[n], t) for n, t in wanted.state_dict().items())


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no tensors", "half"])
def test_damaged_files_are_refused_by_name(name, content, tmp_path):
    path = tmp_path / name
    write_one(path, released_state())
    path.write_bytes(path.read_bytes()[:3000] if content == "half" else content)
    encoder = reference_encoder()
    before = snapshot(encoder)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        import_reference(encoder, path)
    assert_unchanged(encoder, before)


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        import_reference(reference_encoder(), tmp_path / "weights.pt")


def drop(part):
    return lambda state: {name: t for name, t in state.items() if part not in name}


def reshape(part):
    return lambda state: {name: t[..., :-1] if part in name else t for name, t in state.items()}


def rename(part, other):
    return lambda state: {name.replace(part, other): t for name, t in state.items()}


DAMAGES = {
    "one layer missing": (drop("layers.2.mlp."), "missing: layers.2.mlp.cross_attn.in_proj_bias"),
    "one tensor missing": (drop("layers.1.mlp.gate.bias"), "missing: layers.1.mlp.gate.bias$"),
    "one expert missing": (drop("mlp.experts.3."), "missing: layers.1.mlp.experts.3.0.bias"),
    "nothing of ours": (lambda state: other_parts(), "missing: layers.1.mlp.cross_attn"),
    "an expert too many": (
        lambda state: {**state, f"{PREFIX}.1.mlp.experts.4.0.bias": torch.zeros(F)},
        "unexpected: layers.1.mlp.experts.4.0.bias$",
    ),
    "another layer": (rename("layers.2.", "layers.3."), "layers.3.mlp.experts.0.0.bias|layers.3.mlp"),
    "other shapes": (
        reshape("layers.2.mlp.gate.weight"),
        r"other shapes: layers.2.mlp.gate.weight \(4, 7\) instead of \(4, 8\)$",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_released_checkpoint_that_does_not_fit_changes_nothing(damage):
    change, message = DAMAGES[damage]
    encoder = reference_encoder()
    before = snapshot(encoder)
    with pytest.raises(CheckpointError) as caught:
        import_reference(encoder, change(released_state()))
    assert re.search(message, str(caught.value.got))
    assert_unchanged(encoder, before)


def test_norms_of_another_shape_change_nothing():
    encoder = reference_encoder()
    before = snapshot(encoder)
    with pytest.raises(CheckpointError, match="layer_norm1"):
        import_reference(encoder, reshape("layers.0.layer_norm1.weight")(released_state()))
    assert_unchanged(encoder, before)


@pytest.mark.parametrize("train_norms", ["adapted", "none"])
def test_trained_norms_that_the_encoder_leaves_frozen_are_refused(train_norms):
    """They could not be imported without changing the base; without them every output would be wrong."""
    encoder = reference_encoder(train_norms=train_norms)
    before = snapshot(encoder)
    with pytest.raises(CheckpointError, match="trained norms that this encoder leaves frozen") as caught:
        import_reference(encoder, released_state())
    assert "layers.0.layer_norm1.weight" in caught.value.got
    assert_unchanged(encoder, before)


def test_norms_that_were_not_trained_may_be_in_the_checkpoint():
    """A checkpoint that holds the whole tower, in half precision, has those of the last blocks too."""
    base = clip_vit().double().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    encoder, state = reference_encoder(base), released_state()
    last = layers_of(base)[3].layer_norm1
    before = last.weight.detach().clone()
    import_reference(encoder, {**state, f"{PREFIX}.3.layer_norm1.weight": before.to(torch.bfloat16)})
    assert torch.equal(layers_of(encoder.vit)[3].layer_norm1.weight, before)
    images, text = inputs(torch.float64)
    with torch.no_grad():
        found = encoder(images, text).last_hidden_state
    torch.testing.assert_close(found, released_outputs(base, state, images, text), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "settings", [{"activation": "gelu"}, {"routing": "sparse"}, {"context": "concat"}, {"routing": "uniform"}]
)
def test_an_encoder_of_other_arithmetic_is_refused(settings):
    encoder = reference_encoder(**settings)
    before = snapshot(encoder)
    with pytest.raises(CheckpointError, match="does not compute what the released implementation does") as caught:
        import_reference(encoder, released_state())
    assert f"{next(iter(settings))}={next(iter(settings.values()))!r}" in caught.value.got
    assert_unchanged(encoder, before)


def test_an_encoder_of_other_sizes_is_refused():
    for overrides in ({"layers": (1,)}, {"layers": (1, 2, 3)}, {"experts": 3}):
        encoder = reference_encoder(**overrides)
        before = snapshot(encoder)
        with pytest.raises(CheckpointError):
            import_reference(encoder, released_state())
        assert_unchanged(encoder, before)


def test_another_text_encoder_of_the_same_width_is_told(tmp_path):
    class Other(HashTextEncoder):
        def __init__(self) -> None:
            super().__init__(WIDTH)
            self.name = "other"

    base = timm_vit()
    covft.wrap(copy.deepcopy(base), HashTextEncoder(WIDTH)).save_pretrained(tmp_path)
    covft.load(tmp_path, copy.deepcopy(base), HashTextEncoder(WIDTH))
    covft.load(tmp_path, copy.deepcopy(base), WIDTH)
    with pytest.warns(UserWarning, match=r"trained with the text encoder .* loaded with 'other'"):
        covft.load(tmp_path, copy.deepcopy(base), Other())

"""Released checkpoints are imported exactly, or refused before anything has changed."""

import argparse
import copy
import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import covft
from covft import CoVFTConfig
from covft.checkpoints import import_reference
from covft.errors import CheckpointError
from tests.helpers.checkpoints import WIDTH, clip_vit, inputs
from tests.helpers.snapshots import assert_unchanged, snapshot

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
    """The language model of such a checkpoint, whose layers must not be taken for the tower's."""
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


@pytest.mark.sampled(2)
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


def test_missing_files_are_named(tmp_path):
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


def test_training_arguments_beside_the_weights_are_ignored(tmp_path):
    base, state = clip_vit().double().eval(), released_state()
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.save(argparse.Namespace(learning_rate=2e-5), tmp_path / "training_args.bin")
    encoder, wanted = reference_encoder(base), reference_encoder(base)
    import_reference(encoder, tmp_path)
    import_reference(wanted, state)
    assert all(torch.equal(encoder.state_dict()[n], t) for n, t in wanted.state_dict().items())


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not tensors", "half"])
def test_damaged_files_are_refused_by_name(name, content, tmp_path):
    path = tmp_path / name
    write_one(path, released_state())
    path.write_bytes(path.read_bytes()[:3000] if content == "half" else content)
    encoder = reference_encoder()
    before = snapshot(encoder)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        import_reference(encoder, path)
    assert_unchanged(encoder, before)


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="does not hold weights"):
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
    "no adapted layers": (lambda state: other_parts(), "missing: layers.1.mlp.cross_attn"),
    "one expert too many": (
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


@pytest.mark.parametrize("change", [lambda t: t.fill_(torch.nan), lambda t: t.int()], ids=["nan", "int32"])
def test_weights_that_no_training_has_written_change_nothing(change):
    encoder, state = reference_encoder(), released_state()
    before = snapshot(encoder)
    name = next(name for name in sorted(state) if ".mlp.gate." in name)
    with pytest.raises(CheckpointError, match=r"not finite|not floating-point"):
        import_reference(encoder, {**state, name: change(state[name].clone())})
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
    with pytest.raises(CheckpointError, match="trained norms that this encoder freezes") as caught:
        import_reference(encoder, released_state())
    assert "layers.0.layer_norm1.weight" in caught.value.got
    assert_unchanged(encoder, before)


def test_norms_that_were_not_trained_may_be_in_the_checkpoint():
    """A checkpoint of the complete tower, in half precision, also has those of the last blocks."""
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
    with pytest.raises(CheckpointError, match="does not compute what the released implementation computes") as caught:
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


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        None,
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": "../secret.bin"}},
        {"weight_map": {"a": "/secret.bin"}},
        {"weight_map": {"a": "sub\\secret.bin"}},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "model.bin.index.json"}},
    ],
)
def test_an_index_names_files_next_to_it_alone(index, tmp_path):
    (tmp_path / "inside").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "secret.bin")
    (tmp_path / "inside" / "model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"cannot be read|does not name files of weights next to it"):
        import_reference(reference_encoder(), tmp_path / "inside")

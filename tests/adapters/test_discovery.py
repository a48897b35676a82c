"""Finding blocks, FFNs and norms by structure: what is found, and what is never taken for one."""

import pytest
import torch
from torch import nn

import covft
from covft.adapters import ViTFamily, describe
from covft.adapters.discovery import find_blocks
from covft.errors import UnknownViTError, UnsupportedViTError
from tests.helpers.releases import found

D, F = 8, 24


def ffn():
    return nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))


def block(**children):
    module = nn.Module()
    for name, child in {"norm1": nn.LayerNorm(D), "attn": nn.Linear(D, D), **children}.items():
        module.add_module(name, child)
    return module


def model(*blocks, **children):
    root = nn.Module()
    root.layers = nn.ModuleList(blocks)
    for name, child in children.items():
        root.add_module(name, child)
    return root


class AttentionPool(nn.Module):
    """A pooling head: attention and an MLP, as in a block, but of no list."""

    def __init__(self):
        super().__init__()
        self.attn, self.norm, self.mlp = nn.MultiheadAttention(D, 2), nn.LayerNorm(D), ffn()


# By structure


@pytest.mark.parametrize("name", ["mlp", "ffn", "feed_forward"])
def test_an_ffn_is_found_by_its_name(name):
    found = find_blocks(model(block(**{name: ffn()}), block(**{name: ffn()})))
    assert [(b.index, b.path, b.mlp_path) for b in found] == [
        (0, "layers.0", f"layers.0.{name}"),
        (1, "layers.1", f"layers.1.{name}"),
    ]
    assert (found[0].embed_dim, found[0].ffn_dim, found[0].mlp_class) == (D, F, "Sequential")
    assert found[0].ffn_parameters == D * F + F + F * D + D


@pytest.mark.parametrize("class_name", ["FeedForward", "SwiGLUFFN", "TinyMlp", "GEGLU"])
def test_an_ffn_is_found_by_its_class(class_name):
    part = type(class_name, (nn.Sequential,), {})(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
    assert [b.mlp for b in find_blocks(model(block(fc=part)))] == ["fc"]


LOOK_ALIKES = {
    "pooling head": model(AttentionPool()).layers[0],
    "an MLP without attention": model(nn.ModuleDict({"mlp": ffn(), "norm": nn.LayerNorm(D)})),
    "attention without an MLP": model(block()),
    "two MLPs in one block": model(block(mlp=ffn(), ffn=ffn())),
    "a bag of MLPs": model(block(mlp=nn.ModuleList([ffn(), ffn()]))),
    "one linear layer": model(block(mlp=nn.Sequential(nn.Linear(D, D)))),
    "an attention named mlp": model(block(mlp=type("MlpAttention", (nn.Sequential,), {})(*ffn()))),
    "a position network": model(nn.ModuleDict({"rel_pos": ffn(), "attn": nn.Linear(D, D)})),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_not_found(name):
    assert find_blocks(LOOK_ALIKES[name]) == ()


def test_look_alikes_beside_blocks_are_not_found():
    vit = model(block(mlp=ffn()), block(mlp=ffn()), attn_pool=AttentionPool(), head=AttentionPool())
    assert [b.mlp_path for b in find_blocks(vit)] == ["layers.0.mlp", "layers.1.mlp"]


def test_blocks_of_several_stages_are_numbered_in_order():
    vit = nn.Module()
    vit.stages = nn.ModuleList(nn.Sequential(block(mlp=ffn()), block(mlp=ffn())) for _ in range(2))
    found = find_blocks(vit)
    assert [b.index for b in found] == [0, 1, 2, 3]
    assert [b.path for b in found] == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]


def conv_ffn():
    return nn.Sequential(nn.Conv2d(D, F, 1), nn.BatchNorm2d(F), nn.GELU(), nn.Conv2d(F, D, 1))


def test_an_ffn_of_convolutions_has_channels_second():
    first, second = find_blocks(model(block(mlp=ffn()), block(mlp=conv_ffn())))
    assert (first.layout, second.layout) == ("BND", "BCHW")
    assert (second.embed_dim, second.ffn_dim) == (D, F)


def test_the_first_layer_tells_the_layout():
    part = nn.Sequential(nn.Linear(D, F), nn.Conv2d(F, F, 3, 1, 1, groups=F), nn.Linear(F, D))
    (found,) = find_blocks(model(block(mlp=part)))
    assert (found.layout, found.embed_dim, found.ffn_dim) == ("BND", D, F)


def test_a_block_may_be_the_child_of_an_item():
    item = nn.Module()
    item.conv, item.attn_block, item.attn_grid = nn.Conv2d(3, 3, 1), block(mlp=ffn()), block(mlp=ffn())
    found = find_blocks(model(item, item.attn_block))
    assert [b.mlp_path for b in found] == ["layers.0.attn_block.mlp", "layers.0.attn_grid.mlp"]
    assert found[0].aliases == ("layers.1.mlp",)


def test_what_is_inside_of_a_block_is_no_block():
    inner = block(mlp=ffn())
    assert [b.mlp_path for b in find_blocks(model(block(mlp=ffn(), attn=inner)))] == ["layers.0.mlp"]


def residual(inner):
    wrapper = type("Residual", (nn.Module,), {})()
    wrapper.m, wrapper.drop = inner, nn.Identity()
    return wrapper


def test_residuals_are_left_where_they_are():
    attention = residual(type("TinyAttention", (nn.Linear,), {})(D, D))
    part = nn.ModuleDict({"mixer": attention, "ffn": residual(residual(ffn()))})
    (found,) = find_blocks(model(part))
    assert (found.mlp, found.mlp_class, found.embed_dim) == ("ffn.m.m", "Sequential", D)
    assert find_blocks(model(nn.ModuleDict({"attn": nn.Identity(), "ffn": ffn()}))) == ()


def test_several_ffns_of_a_block_are_found_by_their_names():
    both = block(mlp_in=ffn(), mlp=nn.Sequential(nn.LayerNorm(D), *ffn()), norm2=nn.LayerNorm(D))
    vit = model(both, block(mlp=ffn()))
    found = find_blocks(vit, "layers", ("mlp_in", "mlp"), folded=("mlp_in",))
    assert [(b.index, b.path, b.mlp, b.layout) for b in found] == [
        (0, "layers.0", "mlp_in", "(BP)ND"),
        (1, "layers.0", "mlp", "BND"),
        (2, "layers.1", "mlp", "BND"),
    ]
    assert found[0].norms == found[1].norms == ("norm1", "norm2")
    assert [b.mlp_path for b in find_blocks(vit, None, ("mlp",))] == ["layers.0.mlp", "layers.1.mlp"]


def test_ffns_that_are_items_of_their_own_are_found_by_their_class():
    def item(class_name):
        part = type(class_name, (nn.Module,), {})()
        part.mixer = ffn()
        return part

    found = find_blocks(model(item("Attention"), item("FFN"), item("FFN")), None, "mixer", block_class="FFN")
    assert [b.mlp_path for b in found] == ["layers.1.mixer", "layers.2.mixer"]


def halves(output):
    part = block()
    part.intermediate, part.output = nn.Sequential(nn.Linear(D, F), nn.GELU()), output
    return part


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(F, D)

    def forward(self, h, residual):
        return self.dense(h) + residual


@pytest.mark.parametrize(("output", "adds"), [(nn.Sequential(nn.Linear(F, D)), False), (Adds(), True)])
def test_two_halves_are_one_ffn(output, adds):
    (found,) = find_blocks(model(halves(output)))
    assert (found.mlp_path, found.output_path, found.adds_residual) == (
        "layers.0.intermediate",
        "layers.0.output",
        adds,
    )
    assert (found.embed_dim, found.ffn_dim, found.ffn_parameters) == (D, F, D * F + F + F * D + D)


class RMSNorm(nn.Module):
    """A norm of someone's own."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


def test_norms_are_found_but_for_those_inside_the_ffn():
    attention = nn.Module()
    attention.qkv, attention.q_norm, attention.k_norm = nn.Linear(D, 3 * D), nn.LayerNorm(4), RMSNorm(4)
    inner = nn.Sequential(nn.Linear(D, F), nn.LayerNorm(F), nn.Linear(F, D))
    plain = nn.LayerNorm(D, elementwise_affine=False)
    part = block(attn=attention, mlp=inner, norm2=RMSNorm(D), norm3=plain, mlp_norm=nn.LayerNorm(D))
    part.add_module("bn", nn.BatchNorm1d(D))
    (found,) = find_blocks(model(part))
    assert sorted(found.norms) == ["attn.k_norm", "attn.q_norm", "mlp_norm", "norm1", "norm2"]


# Of the libraries


def tiny(name, **options):
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 0}
    with torch.device("meta"):
        return timm.create_model(name, **{**sizes, **options})


def hf(model_class, config_class, **options):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = found(config_class)(**{**sizes, "image_size": 32, "patch_size": 8, **options})
    with torch.device("meta"):
        return found(model_class)(config)


def test_pooling_heads_of_siglip_are_not_found():
    vit = tiny("vit_base_patch16_siglip_224")
    assert hasattr(vit.attn_pool, "mlp")
    assert [b.mlp_path for b in describe(vit).blocks] == ["blocks.0.mlp", "blocks.1.mlp"]
    vit = hf("SiglipVisionModel", "SiglipVisionConfig")
    assert any(name.endswith("head.mlp") for name, _ in vit.named_modules())
    assert [b.mlp_path.rpartition("encoder.")[2] for b in describe(vit).blocks] == [
        "layers.0.mlp",
        "layers.1.mlp",
    ]


def test_query_and_key_norms_are_found():
    norms = describe(tiny("vit_base_patch16_siglip_224", qk_norm=True)).blocks[1].norms
    assert sorted(norms) == ["attn.k_norm", "attn.q_norm", "norm1", "norm2"]
    options = {"use_qk_norm": True, "image_size": [32, 32], "patch_size": [8, 8]}
    norms = describe(hf("InternVLVisionModel", "InternVLVisionConfig", **options)).blocks[1].norms
    assert sorted(norms) == ["attention.k_norm", "attention.q_norm", "layernorm_after", "layernorm_before"]


def test_norms_inside_the_ffn_of_eva_are_not_found():
    vit = tiny("eva02_base_patch14_224", scale_mlp=True)
    assert isinstance(vit.blocks[0].mlp.norm, nn.LayerNorm)
    assert describe(vit).blocks[0].norms == ("norm1", "norm2")


def test_inner_width_of_gated_ffns_is_that_of_the_last_layer():
    """The first layer of a packed one is twice as wide: gate and value side by side."""
    (first, *_) = describe(tiny("eva02_base_patch14_224", mlp_ratio=2)).blocks
    assert (first.mlp_class, first.embed_dim, first.ffn_dim) == ("SwiGLU", 32, 64)
    packed = type("PackedSwiGLU", (nn.Sequential,), {})(nn.Linear(D, 2 * F), nn.GLU(), nn.Linear(F, D))
    (first,) = find_blocks(model(block(mlp=packed)))
    assert (first.mlp_class, first.embed_dim, first.ffn_dim) == ("PackedSwiGLU", D, F)


def test_a_resnet_is_refused_by_name():
    timm = pytest.importorskip("timm")
    for vit in (timm.create_model("resnet10t"), timm.create_model("test_convnext")):
        reason = f"{type(vit).__name__} has no transformer blocks with an FFN: it has no attention"
        with pytest.raises(UnknownViTError, match=reason) as caught:
            covft.wrap(vit, 8)
        assert "vit_base_patch16_224" in caught.value.fix


def test_blocks_that_fuse_attention_and_ffn_are_refused_with_the_reason():
    timm = pytest.importorskip("timm")
    fused = timm.models.vision_transformer.ParallelScalingBlock
    vit = tiny("vit_base_patch16_224", block_fn=fused)
    with pytest.raises(UnsupportedViTError, match=r"blocks\.0 has no FFN .* ParallelScalingBlock computes") as caught:
        covft.wrap(vit, 8)
    assert "in_proj" in caught.value.got
    assert "vit_base_patch16_224" in caught.value.fix


def test_two_towers_are_refused_with_the_way_to_the_vision_tower():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    both = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    before = [id(module) for module in both.modules()]
    with pytest.raises(UnknownViTError, match="CLIPModel is more than a vision tower") as caught:
        covft.wrap(both, 8)
    assert "text_model" in caught.value.got
    assert "covft.wrap(model.vision_model" in caught.value.fix
    assert [id(module) for module in both.modules()] == before
    assert describe(both.vision_model).depth == 3


def test_describe_runs_nothing_and_changes_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("describe() ran a module")

    vit = covft_vit()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    modules = [(name, id(module), sorted(vars(module))) for name, module in vit.named_modules()]
    flags = [(p.requires_grad, p._version) for p in vit.parameters()]
    state = torch.get_rng_state()
    monkeypatch.setattr(nn.Module, "__call__", refuse)
    for module in vit.modules():
        monkeypatch.setattr(type(module), "forward", refuse)
    spec = describe(vit)
    assert (spec.depth, spec.input.prefix_tokens, spec.library) == (6, 1, "timm")
    assert [(name, id(module), sorted(vars(module))) for name, module in vit.named_modules()] == modules
    assert [(p.requires_grad, p._version) for p in vit.parameters()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert describe(vit) == spec


def covft_vit():
    return pytest.importorskip("timm").create_model("test_vit")


def test_the_default_layers_are_the_latter_half_without_the_last():
    wanted = {24: range(11, 23), 12: range(5, 11), 6: range(2, 5), 3: range(2), 2: range(1), 1: range(1)}
    for depth, layers in wanted.items():
        family = ViTFamily(name="x", classes=("torch.nn.modules.module.Module",), library="x")
        spec = describe(model(*(block(mlp=ffn()) for _ in range(depth))), family)
        assert spec.default_layers == tuple(layers)

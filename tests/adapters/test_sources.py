import json
import logging

import pytest
import torch
from torch import nn

import covft
from covft.adapters.sources import load_vit, source_of
from covft.errors import MissingDependencyError, UnknownViTError, UnsupportedViTError
from covft.utils.transformers_names import saved_names
from tests.helpers.releases import found

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"image_size": 8, "patch_size": 4}


def same(one, two):
    one, two = ({saved_names(vit)(name): t for name, t in vit.state_dict().items()} for vit in (one, two))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def pair(library, name):
    """A two-tower model of transformers with tiny towers."""
    config = found(f"{name}Config")(
        text_config={**TOWER, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**TOWER, **({"patch_size": 4, "num_patches": 4} if name == "Siglip2" else PATCHES)},
    )
    return getattr(library, f"{name}Model")(config)


# ------------------------------------------------------------------------------------------ timm


def test_timm_with_options():
    vit = load_vit("timm:test_vit", pretrained=False, num_classes=0)
    assert (type(vit).__name__, vit.num_classes) == ("VisionTransformer", 0)
    assert load_vit("timm:test_vit?num_classes=7&global_pool=", pretrained=False).num_classes == 7


@pytest.mark.parametrize("options", [{}, {"num_classes": 0, "global_pool": ""}, {"img_size": 96}])
def test_the_source_of_a_timm_model_builds_it_again(options):
    import timm

    vit = timm.create_model("test_vit", **options)
    again = load_vit(source_of(vit), pretrained=False)
    assert {n: p.shape for n, p in vit.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
    size = options.get("img_size", 160)
    images = torch.rand(1, 3, size, size)
    assert again(images).shape == vit(images).shape


def test_the_source_survives_wrapping():
    vit = load_vit("timm:test_vit", pretrained=False, num_classes=0)
    before = source_of(vit)
    assert before.startswith("timm:test_vit")
    assert before.endswith("?num_classes=0")
    assert source_of(covft.wrap(vit, 8).vit) == before


def test_a_timm_name_that_is_unknown_lists_the_closest():
    with pytest.raises(UnknownViTError, match="vit_large_patch14_clip_336") as caught:
        load_vit("timm:vit_large_patch14_clip_363")
    assert caught.value.fix == "timm:vit_large_patch14_clip_336"
    with pytest.raises(UnknownViTError, match="Invalid pretrained tag"):
        load_vit("timm:test_vit.nonsense", pretrained=False)


# ------------------------------------------------------------------------------------- open_clip


def test_open_clip_gives_the_image_tower_without_a_word(caplog):
    handlers = list(logging.getLogger().handlers)
    vit = load_vit("open_clip:ViT-L-14-336", pretrained=False, device="meta")
    assert type(vit).__module__ == "open_clip.transformer"
    assert next(vit.parameters()).is_meta
    assert covft.describe(vit).depth == 24
    assert caplog.records == []
    assert logging.getLogger().handlers == handlers
    assert source_of(vit) is None  # random weights have no source


def test_open_clip_needs_to_know_which_weights():
    with pytest.raises(UnknownViTError, match="openai, laion") as caught:
        load_vit("open_clip:ViT-L-14")
    assert caught.value.fix == "open_clip:ViT-L-14/openai"
    with pytest.raises(UnknownViTError, match="no weights for this model"):
        load_vit("open_clip:ViT-M-32")
    with pytest.raises(UnknownViTError, match="ViT-L-14-336"):
        load_vit("open_clip:vit-l-14-366")


def test_open_clip_remembers_its_source(tmp_path):
    import open_clip

    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "covft-test-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("covft-test-tiny", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    source = f"open_clip:covft-test-tiny/{tmp_path / 'weights.pt'}"
    vit = load_vit(source)
    assert source_of(vit) == source
    assert same(load_vit(source_of(vit)), vit)


# ---------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Siglip2"])
def test_the_vision_model_of_a_pair_with_all_its_weights(name, tmp_path):
    import transformers

    both = pair(transformers, name)
    both.save_pretrained(tmp_path)
    vit = load_vit(f"hf:{tmp_path}")
    assert type(vit).__name__ == f"{name}VisionModel"
    assert same(vit, both.vision_model)
    assert source_of(vit) == f"hf:{tmp_path}"


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "InternVLVision"])
def test_vision_models_of_their_own(name, tmp_path):

    settings = {**TOWER, **PATCHES}
    if name == "InternVLVision":
        settings = {**TOWER, "image_size": [8, 8], "patch_size": [4, 4]}
    model = found(f"{name}Model")(found(f"{name}Config")(**settings))
    model.save_pretrained(tmp_path)
    vit = load_vit(f"hf:{tmp_path}")
    assert type(vit) is type(model)
    assert same(vit, model)
    assert source_of(model) is None


def test_another_class_than_the_default_is_remembered(tmp_path):
    import transformers

    pair(transformers, "CLIP").save_pretrained(tmp_path)
    vit = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    again = load_vit(source_of(vit))
    assert type(again) is transformers.CLIPVisionModelWithProjection
    assert same(again, vit)


def test_a_folder_without_weights_is_enough_for_random_ones(tmp_path):
    from transformers import CLIPVisionConfig

    CLIPVisionConfig(**TOWER, **PATCHES).save_pretrained(tmp_path)
    vit = load_vit(f"hf:{tmp_path}", pretrained=False)
    assert not next(vit.parameters()).is_meta
    assert source_of(vit) is None
    assert next(load_vit(f"hf:{tmp_path}", pretrained=False, device="meta").parameters()).is_meta
    with pytest.raises(UnknownViTError, match="cannot be fetched"):
        load_vit(f"hf:{tmp_path}")


def test_the_tower_of_a_whole_mllm_is_not_loaded_from_nothing(tmp_path):
    import transformers

    vision = transformers.CLIPVisionConfig(**TOWER, **PATCHES)
    text = transformers.LlamaConfig(**TOWER, vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    # Either with its weights, or not at all: never a random tower under a pretrained name.
    with pytest.raises(UnsupportedViTError, match="not those of a CLIPVisionModel"):
        load_vit(f"hf:{tmp_path}")


def without(tensors, folder, lost):
    """Rewrite the weights in a folder without those whose name has a match."""
    from safetensors.torch import load_file, save_file

    kept = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if lost not in name}
    assert len(kept) == len(load_file(folder / "model.safetensors")) - tensors
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("name", "lost", "tensors"), [("CLIP", "layers.1.", 16), ("Siglip2", "layers.0.mlp.", 4)])
def test_a_folder_that_lacks_a_layer_is_refused_and_the_tensors_named(name, lost, tensors, tmp_path):
    import transformers

    pair(transformers, name).save_pretrained(tmp_path)
    without(2 * tensors, tmp_path, lost)  # of the text model too
    with pytest.raises(UnsupportedViTError, match=rf"not those of a {name}VisionModel[\s\S]*without .*{lost}"):
        load_vit(f"hf:{tmp_path}")


def test_a_pooling_head_and_a_mask_token_may_be_missing(tmp_path):
    import transformers

    pair(transformers, "Siglip").save_pretrained(tmp_path / "siglip")
    without(11, tmp_path / "siglip", "vision_model.head.")
    assert type(load_vit(f"hf:{tmp_path / 'siglip'}")).__name__ == "SiglipVisionModel"
    transformers.Dinov2Model(transformers.Dinov2Config(**TOWER, **PATCHES)).save_pretrained(tmp_path / "dinov2")
    without(1, tmp_path / "dinov2", "mask_token")
    assert type(load_vit(f"hf:{tmp_path / 'dinov2'}")).__name__ == "Dinov2Model"


def test_a_projection_that_was_asked_for_may_not_be_missing(tmp_path):
    import transformers

    pair(transformers, "CLIP").save_pretrained(tmp_path)
    without(1, tmp_path, "visual_projection")
    with pytest.raises(UnsupportedViTError, match=r"without visual_projection\.weight"):
        load_vit(f"hf:{tmp_path}", class_name="CLIPVisionModelWithProjection")
    assert load_vit(f"hf:{tmp_path}").config.name_or_path == str(tmp_path)


def test_dtype_and_attention_are_options(tmp_path):
    import transformers

    pair(transformers, "CLIP").to(torch.float16).save_pretrained(tmp_path)
    assert load_vit(f"hf:{tmp_path}").dtype == torch.float16
    vit = load_vit(f"hf:{tmp_path}?dtype=bfloat16&attn_implementation=eager")
    assert (vit.dtype, vit.config._attn_implementation) == (torch.bfloat16, "eager")
    assert load_vit(f"hf:{tmp_path}", dtype=torch.float32, attn_implementation=None).dtype == torch.float32


def test_a_language_model_is_not_a_vision_model(tmp_path):
    import transformers

    config = transformers.LlamaConfig(**TOWER, vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnknownViTError, match="no vision model"):
        load_vit(f"hf:{tmp_path}")


def test_names_that_lead_to_no_vision_model(tmp_path):
    import transformers

    with pytest.raises(UnknownViTError, match="hf download nobody/nothing"):
        load_vit("hf:nobody/nothing")
    transformers.CLIPVisionConfig(**TOWER, **PATCHES).save_pretrained(tmp_path)
    with pytest.raises(UnknownViTError, match="no vision model"):
        load_vit(f"hf:{tmp_path}", pretrained=False, class_name="NoSuchModel")


# ---------------------------------------------------------------------------------------- shared


@pytest.mark.parametrize("source", ["vit_base_patch16_224", "openai/clip", "tim:test_vit", "timm:", ""])
def test_a_source_without_a_known_kind_is_refused(source):
    with pytest.raises(UnknownViTError, match="timm:NAME, open_clip:NAME/TAG or hf:ID_OR_FOLDER"):
        load_vit(source)


def test_nothing_is_loaded_onto_meta():
    with pytest.raises(UnsupportedViTError, match="pretrained=False"):
        load_vit("timm:test_vit", device="meta")


@pytest.mark.parametrize(("kind", "module"), [("timm", "timm"), ("open_clip", "open-clip"), ("hf", "transformers")])
def test_a_missing_library_names_the_extra(monkeypatch, kind, module):
    import importlib

    def without(name, *args):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingDependencyError, match=rf'pip install "covft\[{module}\]"'):
        load_vit(f"{kind}:anything")


def test_a_model_of_the_users_own_has_no_source():
    assert source_of(nn.Linear(2, 2)) is None

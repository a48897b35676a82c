"""The text reaches the FFNs in every forward and in every recomputation of it, to the last gradient."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import covft
from covft.adapters import InputFormat
from covft.conditioning import Conditioning
from covft.errors import MissingContextError, ReentrantCheckpointError, ShapeError
from tests.helpers.towers import BY_NAME, TEXT_DIM, features, perturb

CHECKPOINTED = [
    "timm-clip",
    "timm-dinov3",
    "timm-eva02",
    "timm-beit",
    "open_clip-native",
    "open_clip-timm",
    "hf-clip",
    "hf-clip-projection",
    "hf-siglip",
    "hf-siglip2",
    "hf-dinov2",
    "hf-dinov2-registers",
    "hf-dinov3",
    "hf-internvl",
    "hf-vit",
    "hf-qwen2-vl",
    "hf-qwen2.5-vl",
    "hf-qwen3-vl",
    "hf-glm4v",
    "hf-pixtral",
    "hf-mllama",
]

Call = Callable[[Tensor, Tensor], Tensor]


class Case:
    """A wrapped tower in float64 training mode, with its experts apart."""

    def __init__(self, name: str, **settings: Any) -> None:
        self.tower = BY_NAME[name]
        self.encoder = covft.wrap(self.tower.build().double(), TEXT_DIM, **settings).double()
        perturb(self.encoder)
        self.encoder.train()
        self.images = self.tower.images(3, torch.float64)
        self.others = self.tower.images(3, torch.float64)
        self.inputs = self.tower.inputs(3)
        self.texts = [torch.randn(3, TEXT_DIM, dtype=torch.float64) for _ in range(3)]

    def output(self, images: Tensor, text: Tensor | None) -> Tensor:
        output = self.encoder(images, text, **self.inputs)
        return output.image_embeds if hasattr(output, "image_embeds") else features(output)

    def gradients(self, scenario: Callable[[Case, Call], None], call: Call) -> dict[str, Tensor]:
        self.encoder.zero_grad()
        torch.manual_seed(7)  # DINOv3 draws rotary jitter in training mode
        scenario(self, call)
        named = self.encoder.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}


# Ways of checkpointing: each makes a `call(images, text)` out of a case.


def plain(case: Case) -> Call:
    return case.output


def by_library(case: Case) -> Call:
    case.encoder.gradient_checkpointing_enable()
    return case.output


def whole_encoder(case: Case) -> Call:
    return lambda images, text: checkpoint(case.output, images, text, use_reentrant=False)


def inside_condition(case: Case) -> Call:
    """The checkpoint sees images alone; the text comes from a condition that is closed by backward."""

    def call(images: Tensor, text: Tensor) -> Tensor:
        with case.encoder.condition(text):
            return checkpoint(case.output, images, None, use_reentrant=False)

    return call


def nested(case: Case) -> Call:
    case.encoder.gradient_checkpointing_enable()
    return inside_condition(case)


WAYS = [by_library, whole_encoder, inside_condition, nested]


# Scenarios: what is run between zero_grad() and the gradients.


def one_forward(case: Case, call: Call) -> None:
    call(case.images, case.texts[0]).square().sum().backward()


def two_forwards(case: Case, call: Call) -> None:
    one = call(case.images, case.texts[0]).square().sum()
    two = call(case.others, case.texts[1]).square().sum()
    (one + 3 * two).backward()


def same_images(case: Case, call: Call) -> None:
    one = call(case.images, case.texts[0]).square().sum()
    two = call(case.images, case.texts[1]).square().sum()
    (one + 3 * two).backward()


def other_thread(case: Case, call: Call) -> None:
    loss = call(case.images, case.texts[0]).square().sum() + call(case.images, case.texts[1]).cos().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


def other_condition(case: Case, call: Call) -> None:
    loss = call(case.images, case.texts[0]).square().sum()
    with case.encoder.condition(case.texts[2]):
        loss.backward()


def later_forward_first(case: Case, call: Call) -> None:
    one = call(case.images, case.texts[0]).square().sum()
    two = call(case.images, case.texts[1]).square().sum()
    with torch.no_grad():
        case.encoder.eval()
        call(case.others, case.texts[2])
        case.encoder.train()
    one.backward()
    two.backward()


SCENARIOS = [one_forward, two_forwards, same_images, other_thread, other_condition, later_forward_first]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = max(gradient.abs().max().item(), 1.0)
        assert (found[name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradients__equal_with_and_without_checkpointing(name, way):
    case = Case(name)
    wanted = {scenario: case.gradients(scenario, plain(case)) for scenario in SCENARIOS}
    call = way(case)
    for scenario in SCENARIOS:
        assert_same(case.gradients(scenario, call), wanted[scenario])
    # The scenarios can tell right from wrong: with the texts exchanged the gradients are others.
    case.texts[0], case.texts[1] = case.texts[1], case.texts[0]
    swapped = case.gradients(two_forwards, call)
    assert any((swapped[n] - g).abs().max() > 1e-9 for n, g in wanted[two_forwards].items())


@pytest.mark.parametrize("way", [by_library, nested], ids=lambda way: way.__name__)
@pytest.mark.parametrize("settings", [{"routing": "sparse"}, {"routing": "random"}, {"context": "text"}], ids=str)
@pytest.mark.parametrize("name", ["timm-clip", "hf-clip", "hf-qwen2.5-vl"])
def test_gradients__equal_for_other_routings(name, settings, way):
    case = Case(name, **settings)

    wanted = case.gradients(two_forwards, plain(case))
    assert_same(case.gradients(two_forwards, way(case)), wanted)


@pytest.mark.parametrize("name", ["timm-clip", "hf-clip", "open_clip-native"])
def test_gradients__equal_with_dropout_and_offload(name):
    case = Case(name)
    for module in case.encoder.modules():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(lambda _, __, output: nn.functional.dropout(output, 0.3))

    def offloaded(case: Case, call: Call) -> None:
        with torch.autograd.graph.save_on_cpu():
            one = call(case.images, case.texts[0]).square().sum()
        (one + call(case.images, case.texts[1]).square().sum()).backward()

    wanted = case.gradients(offloaded, plain(case))
    assert_same(case.gradients(offloaded, by_library(case)), wanted)


def test_gradients__equal_with_every_second_layer_checkpointed_and_offloaded():
    case = Case("hf-clip")
    wanted = case.gradients(same_images, plain(case))
    kwargs = {"activation_checkpointing_kwargs": {"use_reentrant": False}}
    case.encoder.vit.activation_checkpointing_enable(**kwargs, every_n_layers=2, offload=True)
    assert_same(case.gradients(same_images, case.output), wanted)


@pytest.mark.parametrize("name", ["timm-clip", "hf-clip", "hf-qwen2.5-vl"])
def test_gradients__index_says_which_text_an_image_has(name):
    case = Case(name)
    index = torch.tensor([1, 1, 0])

    def call(images: Tensor, text: Tensor) -> Tensor:
        output = case.encoder(images, text[:2], index=index, **case.inputs)
        return features(output)

    def spread(images: Tensor, text: Tensor) -> Tensor:
        return case.output(images, text[:2][index])

    wanted = case.gradients(two_forwards, spread)
    assert_same(case.gradients(two_forwards, call), wanted)
    case.encoder.gradient_checkpointing_enable()
    assert_same(case.gradients(two_forwards, call), wanted)


def test_gradients__blocks_called_without_the_tower():
    case = Case("timm-clip")
    tokens = torch.randn(3, 17, 32, dtype=torch.float64)

    def call(images: Tensor, text: Tensor) -> Tensor:
        with case.encoder.condition(text):
            x = tokens
            for block in case.encoder.vit.blocks:
                x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return x

    checkpointed = False
    wanted = case.gradients(same_images, call)
    checkpointed = True
    assert_same(case.gradients(same_images, call), wanted)


def test_aux_loss__under_checkpointing():
    case = Case("hf-clip", routing="sparse")

    def scenario(case: Case, call: Call) -> None:
        output = call(case.images, case.texts[0])
        (output.square().sum() + case.encoder.aux_loss()).backward()

    wanted = case.gradients(scenario, plain(case))
    assert_same(case.gradients(scenario, by_library(case)), wanted)


def test_records__are_those_of_the_last_forward_not_of_a_recomputation():
    case = Case("hf-clip")
    case.encoder.gradient_checkpointing_enable()
    loss = case.output(case.images, case.texts[0]).sum()
    case.output(case.images, case.texts[1])
    last = case.encoder.routing_weights()
    loss.backward()
    for layer, weights in case.encoder.routing_weights().items():
        assert torch.equal(weights, last[layer])


@pytest.mark.parametrize("name", ["timm-clip", "open_clip-native", "hf-clip"])
def test_frames__are_forgotten_with_the_graph(name):
    case = Case(name)
    call = nested(case)
    loss = call(case.images, case.texts[0]).sum()
    noted = case.encoder.conditioning._noted
    assert len(noted) > 0
    loss.backward()
    del loss
    assert len(noted) == 0


# Reentrant checkpointing would give the experts no gradient, in silence.


def test_reentrant__refused_where_it_is_switched_on():
    encoder = Case("hf-clip").encoder
    with pytest.raises(ReentrantCheckpointError, match="use_reentrant=False"):
        encoder.gradient_checkpointing_enable({"use_reentrant": True})


def test_reentrant__refused_when_the_tower_was_switched_directly():
    case = Case("hf-clip")
    case.encoder.vit.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
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


def test_no_grad__refused_in_training_inside_a_condition_with_gradients():
    case = Case("hf-clip")
    with case.encoder.condition(case.texts[0]):
        with torch.no_grad(), pytest.raises(ReentrantCheckpointError, match="without gradients"):
            case.encoder.vit(case.images)
        case.encoder.eval()
        with torch.no_grad():
            case.encoder.vit(case.images)
    case.encoder.train()
    with torch.no_grad():
        case.output(case.images, case.texts[0])


# A call without text, or with text that does not fit, fails before any compute.


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


def test_one_text_for_all_images():
    case = Case("timm-clip")
    encoder = case.encoder.eval()
    encoder.set_text_encoder(covft.testing.HashTextEncoder(TEXT_DIM))
    alone = encoder(case.images, "what is left of the cup?")
    spread = encoder(case.images, ["what is left of the cup?"] * 3)
    assert torch.equal(alone, spread)
    with pytest.raises(ShapeError, match="3 images, but the text is for 1"):
        encoder(case.images, ["what is left of the cup?"])

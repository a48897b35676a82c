"""Low-rank experts, compression and skipped experts on every layout of tokens, not only on plain `(B, N, D)`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import covft
from covft.adapters import ViTFamily, registry
from covft.errors import UnsupportedViTError
from covft.nn.experts import Experts
from covft.nn.low_rank import LowRankExperts
from tests.helpers.tiny_vits import (
    HALVES,
    D,
    Halves,
    LinearMlp,
    Shared,
    TinyViT,
    family,
    images,
    naflex,
    patches,
    texts,
)
from tests.helpers.tiny_vits import LAYOUTS as TINY
from tests.helpers.towers import MLLAMA, PACKED, TEXT_DIM, Tower, exact, features, perturb

pytestmark = pytest.mark.long
Inputs = tuple[Any, dict[str, Any]]
LENGTHS = [4, 7, 5]  # patches of the images of naflex
EXPERTS = 3
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# Compression computes in float32.
FLOAT = {"rtol": 1e-4, "atol": 1e-4}


@dataclass(frozen=True)
class Case:
    """A tower in float64, three images for it, one of them alone, and its adapter where covft has none."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    alone: Callable[[Inputs, int], Inputs]
    adapter: ViTFamily | None = None
    lengths: tuple[int, ...] | None = None  # tokens of each image, where they are packed
    has_low_rank: bool = True

    def __str__(self) -> str:
        return self.name

    def wrapped(self, vit: nn.Module, **settings: Any) -> covft.ContextEncoder:
        layers = range(covft.describe(vit).depth)
        return covft.wrap(vit, TEXT_DIM, layers=layers, experts=EXPERTS, **settings)

    @property
    def exact(self) -> dict[str, float]:
        return {**EXACT, **(exact(self.name) if self.name == "hf-pixtral" else {})}

    def per_image(self, output: Any) -> list[Tensor]:
        found = features(output)
        if self.lengths is None:
            return list(found.split(1))
        tokens = found.flatten(0, -2)
        merged = sum(self.lengths) // len(tokens)  # GLM-4V returns one vector for a square of tokens
        return list(tokens.split([length // merged for length in self.lengths]))


def row(given: Inputs, number: int) -> Inputs:
    """The image that is one row of everything."""
    own = slice(number, number + 1)
    first = {name: value[own] for name, value in given[0].items()} if isinstance(given[0], dict) else given[0][own]
    return first, {name: value[own] for name, value in given[1].items()}


def tiny(name: str) -> Case:
    def build() -> nn.Module:
        vit = TinyViT(TINY[name][0](), name.removesuffix("-3x3")).double().eval()
        for module in vit.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return vit

    linear = not name.startswith("BCHW") and name != "arguments"
    return Case(name, build, lambda: (images(), {}), row, family(name), has_low_rank=linear)


def shared() -> nn.Module:
    vit = Shared()
    block = vit.blocks[0]
    block.mlp2 = block.mlp3 = LinearMlp(*block.mlp2)
    return vit.double().eval()


def tokens() -> Inputs:
    return torch.randn(3, 5, D, dtype=torch.float64), {}


def packed(tower: Tower) -> Case:
    lengths = tower.lengths(3)

    def alone(given: Inputs, number: int) -> Inputs:
        pixels, inputs = row(given, number)
        return (given[0].split(lengths)[number] if tower.sizes == "grid_thw" else pixels), inputs

    build = lambda: tower.build().double().eval()  # noqa: E731
    return Case(str(tower), build, lambda: (tower.images(3, torch.float64), tower.inputs(3)), alone, None, (*lengths,))


CASES = [
    *map(tiny, TINY),
    Case("halves", lambda: Halves(residual=False).double().eval(), tokens, row, HALVES),
    Case("halves-residual", lambda: Halves(residual=True).double().eval(), tokens, row, HALVES),
    Case(
        "shared",
        shared,
        tokens,
        row,
        ViTFamily(name="shared", classes=("tests.helpers.tiny_vits.Shared",), library="tests"),
    ),
    Case("naflex", naflex, lambda: (patches(LENGTHS, size=9), {}), row),
    Case(
        "tiled",
        lambda: MLLAMA.build().double().eval(),
        lambda: (MLLAMA.images(3, torch.float64), MLLAMA.inputs(3)),
        row,
    ),
    *map(packed, PACKED),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_low_rank_case = pytest.mark.parametrize("case", [case for case in CASES if case.has_low_rank], ids=str)


@pytest.fixture(autouse=True)
def _known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """covft.load takes no adapter, so that of a case is registered while its test runs."""
    adapter = request.getfixturevalue("case").adapter
    monkeypatch.setattr(registry, "_registered", {} if adapter is None else {adapter.name: adapter})


def state(module: nn.Module) -> dict[str, Any]:
    """Everything that a refused call must not change."""
    return {
        "modules": {name: id(child) for name, child in module.named_modules()},
        "trained": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "hooks": [len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules()],
        "weights": {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()},
    }


def check_alone(case: Case, encoder: covft.ContextEncoder, given: Inputs, text: Tensor) -> None:
    """Check that an image of a batch has the output of the image alone."""
    for number, wanted in enumerate(case.per_image(encoder(given[0], text, **given[1]))):
        first, rest = case.alone(given, number)
        found = features(encoder(first, text[number : number + 1], **rest))
        torch.testing.assert_close(found.reshape(wanted.shape), wanted, **case.exact)


# Low-rank experts


@every_case
def test_expert_rank__starts_as_the_vit_or_is_refused(case):
    vit, (first, rest) = case.build(), case.inputs()
    before, plain = state(vit), features(vit(first, **rest))
    weights = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    if case.has_low_rank:
        encoder = case.wrapped(vit, expert_rank=2)
        torch.testing.assert_close(features(encoder(first, texts(), **rest)), plain, **EXACT)
        perturb(encoder, 0.3)
        assert not torch.allclose(features(encoder(first, texts(), **rest)), plain, rtol=1e-6, atol=1e-6)
        covft.unwrap(encoder)
    else:
        with pytest.raises(UnsupportedViTError, match="Experts of low rank cannot be made from") as caught:
            case.wrapped(vit, expert_rank=2)
        assert "linear, activation, linear" in caught.value.expected
        assert "expert_rank=None" in caught.value.fix
    assert state(vit) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vit.state_dict().items())
    assert torch.equal(features(vit(first, **rest)), plain)


@pytest.mark.parametrize("routing", ["dense", "sparse"])
@every_low_rank_case
def test_expert_rank__equals_full_experts_of_the_same_weights(case, routing):
    """Outputs and gradients, against full experts of the weights $W + B_e A_e$, called one by one."""
    thin = case.wrapped(case.build(), expert_rank=2, routing=routing)
    perturb(thin, 0.3)
    whole = case.wrapped(covft.unwrap(copy.deepcopy(thin)), routing=routing, recompute="none")
    values = dict(thin.vit.named_parameters())
    with torch.no_grad():
        for name, parameter in whole.vit.named_parameters():
            if ".experts." not in name:
                parameter.copy_(values[name])
        for layer, slot in whole.slots().items():
            low = thin.slots()[layer].experts
            for name, difference in zip((*low.plan.first, low.plan.last), low.differences, strict=True):
                layer_of_all = low.shared.get_submodule(name)
                for number, expert in enumerate(slot.experts):
                    own = expert.get_submodule(name)
                    own.weight.copy_(layer_of_all.weight + difference.up[number] @ difference.down[number])
                    if own.bias is not None:
                        own.bias.copy_(layer_of_all.bias + difference.bias[number])
    (first, rest), text = case.inputs(), texts()
    found, wanted = (features(encoder(first, text, **rest)) for encoder in (thin, whole))
    torch.testing.assert_close(found, wanted, **EXACT)
    direction = torch.randn_like(found)
    for encoder, output in ((thin, found), (whole, wanted)):
        (output * direction).sum().backward()
        assert all(p.grad is not None for name, p in encoder.named_parameters() if ".differences." in name)
    gradients = dict(whole.vit.named_parameters())
    for name, parameter in thin.vit.named_parameters():
        if parameter.requires_grad and ".experts." not in name:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, **EXACT)
    for layer, slot in thin.slots().items():
        low = slot.experts
        assert all(p.grad is None and not p.requires_grad for p in low.shared.parameters())
        for name, difference in zip((*low.plan.first, low.plan.last), low.differences, strict=True):
            for number, expert in enumerate(whole.slots()[layer].experts):
                gradient = expert.get_submodule(name).weight.grad
                torch.testing.assert_close(difference.up.grad[number], gradient @ difference.down[number].T, **EXACT)
                torch.testing.assert_close(difference.down.grad[number], difference.up[number].T @ gradient, **EXACT)
            assert difference.up.grad.any()
            assert difference.down.grad.any()


@every_low_rank_case
def test_expert_rank__an_image_does_not_depend_on_its_batch(case):
    encoder = case.wrapped(case.build(), expert_rank=2)
    perturb(encoder, 0.3)
    check_alone(case, encoder, case.inputs(), texts())


@every_low_rank_case
def test_expert_rank__is_saved_and_loaded(case, tmp_path):
    vit = case.build()
    base = copy.deepcopy(vit)
    encoder = case.wrapped(vit, expert_rank=2)
    perturb(encoder)
    (first, rest), text = case.inputs(), texts()
    wanted = features(encoder(first, text, **rest))
    encoder.save_pretrained(tmp_path)
    again = covft.load(tmp_path, base, TEXT_DIM)
    assert all(isinstance(slot.experts, LowRankExperts) for slot in again.slots().values())
    assert torch.equal(features(again(first, text, **rest)), wanted)


# Compression


@every_case
def test_compress__full_rank_is_exact_or_it_is_refused(case, tmp_path):
    vit = case.build()
    base = copy.deepcopy(vit)
    encoder = case.wrapped(vit)
    perturb(encoder)
    (first, rest), text = case.inputs(), texts()
    wanted, before, settings = features(encoder(first, text, **rest)), state(encoder), encoder.covft_config
    if not case.has_low_rank:
        with pytest.raises(UnsupportedViTError, match="Experts of low rank cannot be made from"):
            covft.compress(encoder, 2)
        assert state(encoder) == before
        assert encoder.covft_config == settings
        assert torch.equal(features(encoder(first, text, **rest)), wanted)
        return
    report = covft.compress(encoder, max(block.embed_dim for block in encoder.spec.blocks))
    torch.testing.assert_close(features(encoder(first, text, **rest)), wanted, **FLOAT)
    assert report.weight_error.keys() == encoder.slots().keys()
    assert max(report.weight_error.values()) < 1e-5
    encoder.save_pretrained(tmp_path)
    again = covft.load(tmp_path, copy.deepcopy(base), TEXT_DIM)
    assert torch.equal(features(again(first, text, **rest)), features(encoder(first, text, **rest)))
    plain = features(covft.unwrap(encoder)(first, **rest))
    assert torch.equal(plain, features(base(first, **rest)))


@every_low_rank_case
def test_compress__a_low_rank_loses_something_for_every_layout(case):
    encoder = case.wrapped(case.build())
    perturb(encoder, 0.3)
    (first, rest), text = case.inputs(), texts()
    wanted = features(encoder(first, text, **rest))
    report = covft.compress(encoder, 1)
    assert all(0.1 < error < 1 for error in report.weight_error.values())
    found = features(encoder(first, text, **rest))
    assert found.isfinite().all()
    assert not torch.allclose(found, wanted, **FLOAT)


# Skipped experts


@every_case
def test_skip_experts__an_image_does_not_depend_on_its_batch(case):
    encoder = case.wrapped(case.build())
    perturb(encoder, 0.5)
    given, text = case.inputs(), texts()
    exact = features(encoder(given[0], text, **given[1]))
    covft.skip_experts(encoder, 0.0)
    assert torch.equal(features(encoder(given[0], text, **given[1])), exact)

    covft.skip_experts(encoder, 1 / EXPERTS)
    left = [weights >= 1 / EXPERTS for weights in encoder.routing_weights().values()]
    assert any(0 < own.sum() < own.numel() for own in left)
    together = features(encoder(given[0], text, **given[1]))
    assert together.isfinite().all()
    assert not torch.allclose(together, exact, rtol=1e-9, atol=1e-9)  # float64
    check_alone(case, encoder, given, text)

    covft.skip_experts(encoder, 0.0)
    assert torch.equal(features(encoder(given[0], text, **given[1])), exact)


@every_case
def test_skip_experts__the_others_weights_are_scaled_up(case):
    """Outputs against those of the remaining experts, each called on everything."""
    encoder = case.wrapped(case.build())
    perturb(encoder, 0.5)
    calls = []

    def record(experts: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        calls.append((experts, args, kwargs, output))

    handles = [slot.experts.register_forward_hook(record, with_kwargs=True) for slot in encoder.slots().values()]
    covft.skip_experts(encoder, 0.3)
    given = case.inputs()
    encoder(given[0], texts(), **given[1])
    for handle in handles:
        handle.remove()
    assert len({id(experts) for experts, *_ in calls}) == len(encoder.layers)
    for experts, (x, routing, *args), kwargs, output in calls:
        weights = torch.where(routing.weights_BE < 0.3, 0.0, routing.weights_BE)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        outputs = torch.stack([expert(x, *args, **kwargs) for expert in experts])
        shape = (EXPERTS, -1, *[1] * (x.dim() - 1))
        torch.testing.assert_close(output, (outputs * weights.T.reshape(shape)).sum(0), **EXACT)


@every_case
def test_skip_experts__no_image_is_left_without_any(case):
    """Where all weights are equal, and so all at the threshold."""
    encoder = case.wrapped(case.build(), routing="uniform")
    perturb(encoder)
    given = case.inputs()
    exact = features(encoder(given[0], **given[1]))
    assert all(isinstance(slot.experts, Experts) for slot in encoder.slots().values())
    covft.skip_experts(encoder, 1 / EXPERTS)
    torch.testing.assert_close(features(encoder(given[0], **given[1])), exact, **EXACT)


@every_low_rank_case
def test_compress__errors_are_measured_on_what_the_tower_takes(case):
    encoder = case.wrapped(case.build())
    perturb(encoder, 0.3)
    (first, rest), text = case.inputs(), texts()
    wanted = features(encoder(first, text, **rest))
    report = covft.compress(encoder, 1, first, text, **rest)
    found = features(encoder(first, text, **rest))
    assert report.feature_error == pytest.approx(((found - wanted).norm() / wanted.norm()).item(), rel=1e-4)
    assert report.output_error.keys() == encoder.slots().keys()
    assert all(0 < error < 2 for error in report.output_error.values())


@every_low_rank_case
def test_expert_rank__returns_the_type_of_the_ffn_under_autocast(case):
    types: dict[int | None, list[torch.dtype]] = {}
    for rank in (None, 2):
        encoder = case.wrapped(case.build().float(), expert_rank=rank)
        own = types[rank] = []
        for slot in encoder.slots().values():
            slot.register_forward_hook(lambda _, __, output, own=own: own.append(output.dtype))
        x, rest = case.inputs()
        x = {k: v.float() if v.is_floating_point() else v for k, v in x.items()} if isinstance(x, dict) else x.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            encoder(x, texts().float(), **rest)
    assert types[2] == types[None] != []

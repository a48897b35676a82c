"""What holds for every wrapped tower, in the types that GPUs train in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import covft
from tests.helpers.conditioning import Case
from tests.helpers.towers import BY_NAME, TEXT_DIM, features

pytestmark = pytest.mark.usefixtures("quiet")

TOWERS = ["hf-clip", "hf-siglip", "hf-dinov2", "hf-dinov2-swiglu", "hf-qwen2.5-vl", "timm-clip"]
# Of the largest output: about four roundings of each type.
ROUNDING = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
CASES = [
    pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[pytest.mark.quick] if quick else [])
    for name in TOWERS
    for dtype in ROUNDING
    for quick in [(name, dtype) in {("hf-clip", torch.bfloat16), ("hf-qwen2.5-vl", torch.float16)}]
]
every_case = pytest.mark.parametrize(("name", "dtype"), CASES)
ROUTINGS = [{"routing": "sparse"}, {"routing": "uniform"}, {"routing": "random"}, {"context": "concat"}]


def moved_apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((one.double() - other.double()).abs().max() / other.double().abs().max()).item()


def inputs_of(tower: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tower.inputs(3).items()}
    return tower.images(3).to(device, dtype), torch.randn(3, TEXT_DIM).to(device, dtype), inputs


@every_case
def test_identity_at_the_start_and_unwrap_bit_for_bit(name, dtype, device):
    tower = BY_NAME[name]
    vit = tower.build().eval().to(device, dtype)
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    classes = [type(module) for module in vit.modules()]
    images, text, inputs = inputs_of(tower, device, dtype)
    settings = [{}, *ROUTINGS] if name == "hf-clip" else [{}]
    with torch.no_grad():
        plain = features(vit(images, **inputs))
        for options in settings:
            encoder = covft.wrap(vit, TEXT_DIM, **options)
            found = features(encoder(images, text, **inputs))
            assert (found.device, found.dtype) == (plain.device, plain.dtype)
            assert moved_apart(found, plain) < ROUNDING[dtype]
            for parameter in encoder.trainable_parameters():
                parameter.add_(0.1)
            covft.unwrap(encoder)
            assert [type(module) for module in vit.modules()] == classes
            assert vit.state_dict().keys() == before.keys()
            assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
            assert torch.equal(features(vit(images, **inputs)), plain)


@every_case
def test_values_and_texts(name, dtype, device):
    """The output is that of float64 on the CPU up to rounding, and another text changes it, for its image alone."""
    case = Case(name, device=device, dtype=dtype)
    exact, text = copy.deepcopy(case.encoder).cpu().double().eval(), case.texts[0]
    case.encoder.eval()
    with torch.no_grad():
        found = case.output(case.images, text)
        inputs = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in case.inputs.items()}
        wanted = features(exact(case.images.cpu().double(), text.cpu().double(), **inputs))
        other = case.output(case.images, torch.cat([case.texts[1][:1], text[1:]]))
    assert found.isfinite().all()
    assert moved_apart(found.cpu(), wanted) < 2 * ROUNDING[dtype]
    tokens = case.tower.lengths(3) if case.tower.sizes else [1, 1, 1]
    first, *rest = (found - other).abs().split([length * len(found) // sum(tokens) for length in tokens])
    assert first.max() > ROUNDING[dtype] * found.abs().max()
    assert all(difference.max() <= ROUNDING[dtype] * found.abs().max() for difference in rest)


@pytest.mark.parametrize("masters", [pytest.param(True, marks=pytest.mark.quick), False], ids=["float32", "half"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.quick), torch.float16], ids=str)
def test_three_steps_move_all_that_is_trained_and_nothing_else(dtype, masters, device):
    case = Case("hf-clip", device=device, dtype=dtype)
    if masters:
        assert case.encoder.train_in_float32() > 0
    before = {name: p.detach().clone() for name, p in case.encoder.named_parameters()}
    lr = 1e-4 if masters else 1e-2  # half precision rounds smaller steps away
    optimizer = torch.optim.AdamW(case.encoder.param_groups(lr=lr, weight_decay=0.0), eps=1e-8 if masters else 1e-4)
    for step in range(3):
        case.output(case.images, case.texts[step]).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in case.encoder.named_parameters():
        changed = (parameter != before[name]).float().mean().item()
        assert parameter.isfinite().all(), name
        assert (changed > (0.8 if masters else 0)) if parameter.requires_grad else changed == 0, (name, changed)


@pytest.mark.parametrize("recompute", ["none", "activation", "all"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_autocast__is_float32_up_to_rounding(dtype, recompute, device):
    case = Case("hf-clip", device=device, dtype=torch.float32, recompute=recompute)

    def step(autocast: bool) -> list[Tensor]:
        case.encoder.zero_grad()
        with torch.autocast(device.type, dtype, enabled=autocast):
            output = case.output(case.images, case.texts[0])
        output.float().square().mean().mul(2**10).backward()  # in float16 the smallest gradients would be zero
        return [output, *(p.grad for p in case.encoder.trainable_parameters())]

    wanted = step(False)
    found = step(True)
    assert moved_apart(found[0], wanted[0]) < 2 * ROUNDING[dtype]
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert (one - other).norm() <= 8 * ROUNDING[dtype] * other.norm() + 1e-4

"""Gradients with and without activation checkpointing are equal on the device, for every way to switch it on."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.checkpointing import (
    SCENARIOS,
    WAYS,
    assert_same,
    by_library,
    nested,
    one_forward,
    plain,
    two_forwards,
)
from tests.helpers.conditioning import Case

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["hf-clip", "hf-siglip", "hf-dinov2", "hf-qwen2.5-vl", "timm-clip"])
def test_matrix__in_float64(name, way, device):
    case = Case(name, device=device)
    wanted = {scenario: case.gradients(scenario, plain(case)) for scenario in SCENARIOS}
    call = way(case)
    for scenario in SCENARIOS:
        # A GPU adds in another order each time where it adds atomically.
        assert_same(case.gradients(scenario, call), wanted[scenario], tolerance=1e-11)
    case.texts[0], case.texts[1] = case.texts[1], case.texts[0]
    swapped = case.gradients(two_forwards, call)
    assert any((swapped[n] - g).abs().max() > 1e-9 for n, g in wanted[two_forwards].items())


HALF = [
    pytest.param("hf-clip", torch.bfloat16, by_library, marks=pytest.mark.quick, id="hf-clip-bfloat16"),
    pytest.param("hf-clip", torch.float16, nested, id="hf-clip-float16"),
    pytest.param("hf-qwen2.5-vl", torch.bfloat16, nested, id="qwen-bfloat16"),
    pytest.param("hf-qwen2.5-vl", torch.float16, by_library, id="qwen-float16"),
]


@pytest.mark.parametrize(("name", "dtype", "way"), HALF)
def test_half_precision__recomputes_the_same(name, dtype, way, device):
    case = Case(name, device=device, dtype=dtype)

    def mean(case, call):
        (call(case.images, case.texts[0]).square().mean() + call(case.images, case.texts[1]).cos().mean()).backward()

    wanted, again = (case.gradients(mean, plain(case)) for _ in range(2))
    call = way(case)
    found = case.gradients(mean, call)
    case.texts[0], case.texts[1] = case.texts[1], case.texts[0]
    swapped = case.gradients(mean, call)
    assert found.keys() == wanted.keys()
    apart = []
    for parameter, gradient in wanted.items():
        scale = gradient.abs().max()
        assert scale.isfinite(), parameter
        # The order of atomic additions: never more than a rounding.
        noise = (again[parameter] - gradient).abs().max()
        assert (found[parameter] - gradient).abs().max() <= 4 * noise + torch.finfo(dtype).eps * scale, parameter
        apart.append(((swapped[parameter] - gradient).abs().max() > 0.05 * scale).item())
    assert any(apart)


@pytest.mark.parametrize("settings", [{"routing": "sparse"}, {"routing": "random"}], ids=str)
def test_other_routings__in_float64(settings, device):
    case = Case("hf-clip", device=device, **settings)
    wanted = case.gradients(one_forward, plain(case))
    assert_same(case.gradients(one_forward, nested(case)), wanted, tolerance=1e-11)

"""torch.func: transforms and lent weights give the derivatives of plain autograd, whatever backward recomputes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import covft
from covft.nn.moe import ContextualMoE
from covft.testing import HashTextEncoder, ToyViT
from tests.helpers.towers import perturb

every_routing = pytest.mark.parametrize("routing", ["dense", "sparse", "uniform"])
every_recompute = pytest.mark.parametrize("recompute", ["none", "activation", "all"])


def mixture(routing: str, recompute: str, *, fused: bool = True) -> ContextualMoE:
    middle = nn.GELU() if fused else nn.Sequential(nn.GELU(), nn.LayerNorm(12))
    ffn = nn.Sequential(nn.Linear(8, 12), middle, nn.Linear(12, 8))
    moe = ContextualMoE(ffn, embed_dim=8, text_dim=4, num_experts=3, routing=routing, recompute=recompute)
    assert not hasattr(moe.experts, "plan") or (moe.experts.plan is not None) == fused
    perturb(moe, 0.3)
    return moe.double()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)


def loss(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sin().sum()


def by_autograd(moe: ContextualMoE, x: Tensor, text: Tensor) -> dict[str, Tensor]:
    moe.zero_grad()
    loss(moe(x, text)).backward()
    found = {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}
    assert sum(gradient.abs().max() > 1e-6 for gradient in found.values()) > 6
    return found


def assert_same(found: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "one by one"])
@every_recompute
@every_routing
def test_grad__is_that_of_autograd(routing, recompute, fused):
    moe, (x, text) = mixture(routing, recompute, fused=fused), inputs()
    wanted = by_autograd(moe, x, text)
    weights = {name: p.detach() for name, p in moe.named_parameters()}
    assert_same(grad(lambda weights: loss(functional_call(moe, weights, (x, text))))(weights), wanted)
    of_x = x.clone().requires_grad_()
    loss(moe(of_x, text)).backward()
    assert torch.allclose(grad(lambda x: loss(moe(x, text)))(x), of_x.grad, rtol=1e-9, atol=1e-11)


@every_recompute
@every_routing
def test_vmap__gives_the_gradients_of_each_image_alone(routing, recompute):
    moe, (x, text) = mixture(routing, recompute), inputs()
    weights = {name: p.detach() for name, p in moe.named_parameters()}

    def one(weights: dict[str, Tensor], x: Tensor, text: Tensor) -> Tensor:
        return loss(functional_call(moe, weights, (x[None], text[None])))

    found = vmap(grad(one), in_dims=(None, 0, 0))(weights, x, text)
    for image in range(2):
        wanted = by_autograd(moe, x[image : image + 1], text[image : image + 1])
        assert_same({name: gradient[image] for name, gradient in found.items()}, wanted)
    assert torch.allclose(vmap(lambda x, text: moe(x[None], text[None])[0])(x, text), moe(x, text), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # by torch itself
@every_recompute
@every_routing
def test_forward_mode__is_the_transpose_of_backward(routing, recompute):
    moe, (x, text) = mixture(routing, recompute), inputs()
    direction = torch.randn_like(x)
    backward = jacrev(lambda x: moe(x, text))(x)
    wanted = torch.einsum("bndcme,cme->bnd", backward, direction)
    assert torch.allclose(jvp(lambda x: moe(x, text), (x,), (direction,))[1], wanted, rtol=1e-9, atol=1e-11)
    with forward_ad.dual_level():
        output = moe(forward_ad.make_dual(x, direction), text)
        assert torch.allclose(forward_ad.unpack_dual(output).tangent, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [nn.Parameter, lambda tensor: tensor.requires_grad_()], ids=["parameter", "tensor"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "one by one"])
@every_recompute
def test_lent_weights__get_their_own_gradients_after_the_call(recompute, fused, kind):
    """Backward runs when the module has its own weights again."""
    moe, (x, text) = mixture("dense", recompute, fused=fused), inputs()
    lent = {name: kind(2 * p.detach().clone()) for name, p in moe.named_parameters()}
    wanted = grad(lambda lent: loss(functional_call(moe, lent, (x, text))))({n: p.detach() for n, p in lent.items()})
    loss(functional_call(moe, lent, (x, text))).backward()
    assert_same(
        {name: p.grad for name, p in lent.items() if p.grad is not None},
        {name: wanted[name] for name, p in lent.items() if p.grad is not None},
    )
    assert all(lent[name].grad is not None for name in wanted if "experts" in name)
    assert all(p.grad is None for p in moe.parameters())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_encoder__takes_transforms_with_strings_and_features():
    encoder = covft.wrap(ToyViT(), HashTextEncoder(4), layers=[1]).double()
    perturb(encoder, 0.3)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    texts = ["one", "two"]
    features = encoder.encode_text(texts).double()
    leaf = features.clone().requires_grad_()
    loss(encoder(images, leaf)).backward()
    assert leaf.grad.abs().max() > 1e-6
    assert torch.allclose(grad(lambda text: loss(encoder(images, text)))(features), leaf.grad, rtol=1e-9, atol=1e-12)
    of_images = grad(lambda images: loss(encoder(images, texts)))(images)
    with encoder.condition(texts):
        assert torch.equal(grad(lambda images: loss(encoder.vit(images)))(images), of_images)
    each = vmap(lambda image, text: encoder(image[None], text[None])[0])(images, features)
    assert torch.allclose(each, encoder(images, texts), rtol=1e-9)

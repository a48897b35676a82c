"""What the router looks at: refinement, attention, and the four context vectors."""

import math

import pytest
import torch
from torch import nn

from covft.nn import (
    ConcatContext,
    CrossAttentionContext,
    ImageContext,
    QuickGELU,
    ResidualRefinement,
    SingleQueryAttention,
    TextContext,
)
from tests.helpers import oracle

D, C, H = 6, 8, 4
float64 = {"dtype": torch.float64}


def shaken(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def test_quick_gelu_is_the_sigmoid_formula():
    values = torch.linspace(-6, 6, 101, **float64)
    wanted = torch.tensor([v / (1 + math.exp(-1.702 * v)) for v in values.tolist()], **float64)
    torch.testing.assert_close(QuickGELU()(values), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_refinement_is_a_residual_then_a_norm(activation):
    block = shaken(ResidualRefinement(D, activation=activation, **float64))
    v = torch.randn(2, 5, D, **float64)
    torch.testing.assert_close(block(v), oracle.refined(v, block, activation), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(("recompute", "kept"), [("none", 8), ("activation", 5), ("all", 3)])
def test_refinement_may_be_recomputed_in_backward(recompute, kept, activation):
    block = shaken(ResidualRefinement(D, activation=activation, **float64))
    v = torch.randn(2, 5, D, requires_grad=True, **float64)
    inputs = [v, *block.parameters()]
    upstream = torch.randn(2, 5, D, **float64)
    wanted = torch.autograd.grad(block(v), inputs, upstream)
    block.recompute = recompute
    sizes = {}

    def pack(tensor):
        if tensor.dim() > 1 and not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(v)
    for one, other in zip(torch.autograd.grad(output, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    if activation == "gelu":  # in units of the tokens: they, the norm's input, up to two of twice the width
        assert sum(sizes.values()) // (v.numel() * 8) <= kept


def test_refinement_is_twice_as_wide_inside_with_biases():
    block = ResidualRefinement(D)
    found = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    assert found == {
        "up.weight": (2 * D, D),
        "up.bias": (2 * D,),
        "down.weight": (D, 2 * D),
        "down.bias": (D,),
        "norm.weight": (D,),
        "norm.bias": (D,),
    }


def reference_attention(num_heads=H, dead_scale=1.0):
    module = nn.MultiheadAttention(C, num_heads, kdim=D + C, vdim=D + C, batch_first=True, **float64)
    shaken(module)
    with torch.no_grad():
        module.k_proj_weight[:, D:] *= dead_scale
        module.in_proj_bias[C : 2 * C] *= dead_scale
    return module


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
def test_weights_of_multihead_attention_give_its_outputs(num_heads):
    theirs = reference_attention(num_heads)
    ours = SingleQueryAttention(D, C, num_heads, **float64)
    ours.load_multihead_attention(theirs.state_dict())
    tokens, text = torch.randn(3, 7, D, **float64), torch.randn(3, C, **float64)
    joint = torch.cat([tokens, text[:, None].expand(-1, 7, -1)], dim=-1)
    wanted = theirs(text[:, None], joint, joint, need_weights=False)[0][:, 0]
    torch.testing.assert_close(ours(tokens, text), wanted, rtol=1e-12, atol=1e-12)


def test_padded_keys_are_those_of_a_key_padding_mask():
    theirs, ours = reference_attention(), SingleQueryAttention(D, C, H, **float64)
    ours.load_multihead_attention(theirs.state_dict())
    tokens, text = torch.randn(3, 7, D, **float64), torch.randn(3, C, **float64)
    mask = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]
    joint = torch.cat([tokens, text[:, None].expand(-1, 7, -1)], dim=-1)
    wanted = theirs(text[:, None], joint, joint, key_padding_mask=~mask, need_weights=False)[0][:, 0]
    torch.testing.assert_close(ours(tokens, text, mask), wanted, rtol=1e-12, atol=1e-12)


def test_the_parameters_left_out_of_the_attention_are_dead():
    """The text columns of the keys and the key bias change no output and get no gradient."""
    theirs = reference_attention()
    tokens, text = torch.randn(3, 7, D, **float64), torch.randn(3, C, **float64)
    joint = torch.cat([tokens, text[:, None].expand(-1, 7, -1)], dim=-1)
    output = theirs(text[:, None], joint, joint, need_weights=False)[0]
    output.square().sum().backward()
    assert theirs.k_proj_weight.grad[:, D:].abs().max() < 1e-10
    assert theirs.in_proj_bias.grad[C : 2 * C].abs().max() < 1e-10
    assert theirs.k_proj_weight.grad[:, :D].abs().max() > 1e-3
    ours = sum(parameter.numel() for parameter in SingleQueryAttention(D, C, H).parameters())
    assert ours == sum(parameter.numel() for parameter in theirs.parameters()) - C * C - C


def test_loading_takes_a_copy():
    theirs, ours = reference_attention(), SingleQueryAttention(D, C, H, **float64)
    ours.load_multihead_attention(theirs.state_dict())
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    shaken(theirs)
    assert all(torch.equal(parameter, before[name]) for name, parameter in ours.named_parameters())


def test_attention_starts_like_multihead_attention():
    ours = SingleQueryAttention(60, 40, 4)
    theirs = nn.MultiheadAttention(40, 4, kdim=100, vdim=100)
    pairs = [
        (ours.q_proj.weight, theirs.q_proj_weight),
        (ours.k_proj_weight, theirs.k_proj_weight),
        (ours.v_proj_image_weight, theirs.v_proj_weight),
        (ours.v_proj_text.weight, theirs.v_proj_weight),
    ]
    for mine, other in pairs:  # uniform, so the spread shows the bound
        assert abs(mine.abs().max() / other.abs().max() - 1) < 0.02
        assert abs(mine.std() / other.std() - 1) < 0.1
    for bias in (ours.q_proj.bias, ours.v_proj_text.bias, ours.out_proj.bias):
        assert not bias.any()


def test_each_context_has_its_width_and_sees_its_inputs():
    tokens, text = torch.randn(2, 5, D), torch.randn(2, C)
    table = {
        CrossAttentionContext(D, C): (C, True, True),
        ImageContext(D): (D, True, False),
        TextContext(C): (C, False, True),
        ConcatContext(D, C): (D + C, True, True),
    }
    for context, (width, sees_image, sees_text) in table.items():
        vector = context(tokens, text)
        assert vector.shape == (2, width)
        assert context.context_dim == width
        assert context.needs_text == sees_text
        assert torch.equal(context(tokens + torch.randn_like(tokens), text), vector) != sees_image
        assert torch.equal(context(tokens, text + torch.randn_like(text)), vector) != sees_text


def test_a_context_does_not_depend_on_the_order_of_tokens_or_the_neighbours():
    context = shaken(CrossAttentionContext(D, C, **float64))
    tokens, text = torch.randn(3, 5, D, **float64), torch.randn(3, C, **float64)
    vector = context(tokens, text)
    torch.testing.assert_close(context(tokens.flip(1), text), vector, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(context(tokens[1:2], text[1:2]), vector[1:2], rtol=1e-12, atol=1e-12)

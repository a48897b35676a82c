"""What transformers promises of its vision models holds for wrapped ones, too."""

from __future__ import annotations

import inspect

import pytest
import torch

import covft
from tests.helpers.releases import needs
from tests.helpers.towers import BY_NAME, SIZE, TEXT_DIM, features, perturb

HF = ["hf-clip", "hf-siglip", "hf-dinov2"]
NAMES = [*HF, "timm-clip", "open_clip-native"]
ALL = {"output_hidden_states": True, "output_attentions": True}
hf = pytest.mark.parametrize("name", HF)


def wrapped(name, **settings):
    """A wrapped tower whose text matters, three images and their texts."""
    tower = BY_NAME[name]
    encoder = covft.wrap(tower.build().eval(), TEXT_DIM, **settings)
    perturb(encoder)
    return encoder, tower.images(3), torch.randn(3, TEXT_DIM)


@hf
def test_outputs__hidden_states_and_attentions_are_complete_and_tuples_equal_dicts(name):
    encoder, images, text = wrapped(name)
    needs(encoder.vit, "set_attn_implementation")
    encoder.vit.set_attn_implementation("eager")
    depth, tokens = encoder.spec.depth, encoder(images, text).last_hidden_state.shape
    output = encoder(images, text, **ALL)
    assert [state.shape for state in output.hidden_states] == [tokens] * (depth + 1)
    heads = encoder.vit.config.num_attention_heads
    assert [a.shape for a in output.attentions] == [(3, heads, tokens[1], tokens[1])] * depth
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    values = encoder(images, text, **ALL, return_dict=False)
    assert len(values) == len(output.to_tuple())
    for one, other in zip(values, output.to_tuple(), strict=True):
        pairs = [(one, other)] if isinstance(one, torch.Tensor) else zip(one, other, strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


@hf
def test_attention_implementations_agree(name):
    encoder, images, text = wrapped(name)
    needs(encoder.vit, "set_attn_implementation")
    found = {}
    for kind in ("eager", "sdpa"):
        encoder.vit.set_attn_implementation(kind)
        found[kind] = encoder(images, text, output_hidden_states=True).hidden_states
    for one, other in zip(found["eager"], found["sdpa"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routing", ["dense", "sparse"])
@pytest.mark.parametrize("name", NAMES)
def test_calls_are_deterministic_and_a_batch_equals_its_images(name, routing):
    encoder, images, text = wrapped(name, routing=routing)
    together = features(encoder(images, text))
    assert torch.equal(features(encoder(images, text)), together)
    alone = [features(encoder(image, own)) for image, own in zip(images.split(1), text.split(1), strict=True)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_methods__signature_and_arguments_that_other_code_reads(name):
    """Trainer drops columns that forward does not name; accelerate and FSDP look for the classes of blocks."""
    plain = BY_NAME[name].build()
    encoder = wrapped(name)[0]
    assert inspect.signature(encoder.vit.forward) == inspect.signature(plain.forward)
    assert type(encoder.vit) is type(plain)
    classes = {type(module).__name__ for module in encoder.vit.modules()}
    if name in HF:
        assert encoder.vit._no_split_modules == plain._no_split_modules != []
        assert set(plain._no_split_modules) & {type(m).__name__ for m in plain.modules()} <= classes
        assert type(encoder.vit.get_input_embeddings()) is type(plain.get_input_embeddings())
        assert encoder.vit.config.to_dict().keys() == plain.config.to_dict().keys()


@hf
def test_device_maps_do_not_cut_an_adapted_block(name):
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    encoder = wrapped(name)[0]
    vit = encoder.vit
    size = sum(p.numel() * p.element_size() for p in vit.parameters())
    blocks = vit._no_split_modules
    if type(vit.get_submodule(encoder.spec.blocks[0].path)).__name__ not in blocks:
        pytest.skip(
            f"transformers {transformers.__version__} lets device maps cut blocks of a plain {type(vit).__name__}"
        )
    found = accelerate.infer_auto_device_map(vit, {0: size // 2, "cpu": 2 * size}, no_split_module_classes=blocks)
    assert {0, "cpu"} <= set(found.values())
    assert not any(".mlp" in part for part in found)


@hf
def test_images_are_cast_to_the_type_of_the_tower(name):
    encoder, images, text = wrapped(name)
    encoder.to(torch.bfloat16)
    found = encoder(images, text).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert torch.equal(encoder(images.to(torch.bfloat16), text).last_hidden_state, found)


@hf
def test_larger_images__positions_are_interpolated(name):
    plain = BY_NAME[name].build().eval()
    options = {} if name == "hf-dinov2" else {"interpolate_pos_encoding": True}
    images, text = torch.randn(2, 3, 2 * SIZE, SIZE), torch.randn(2, TEXT_DIM)
    wanted = plain(images, **options).last_hidden_state
    encoder = covft.wrap(plain, TEXT_DIM)
    found = encoder(images, text, **options).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    perturb(encoder)
    assert not torch.equal(encoder(images, text, **options).last_hidden_state, found)


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts__go_into_another_tower_and_unwrapping_gives_the_keys_back(name):
    encoder, images, text = wrapped(name)
    plain = BY_NAME[name].build().state_dict().keys()
    twin = covft.wrap(BY_NAME[name].build().eval(), TEXT_DIM)
    missing, unexpected = twin.vit.load_state_dict(encoder.vit.state_dict(), strict=True)
    assert not missing
    assert not unexpected
    assert torch.equal(features(twin(images, text)), features(encoder(images, text)))
    assert covft.unwrap(twin).state_dict().keys() == plain


@hf
def test_gradients_of_hidden_states_can_be_kept(name):
    """From the first block that trains; what comes before it is frozen."""
    encoder, images, text = wrapped(name, layers=[1, 2])
    needs(encoder.vit, "set_attn_implementation")
    encoder.vit.set_attn_implementation("eager")
    output = encoder(images, text, **ALL)
    kept = [*output.hidden_states[1:], *output.attentions]
    for tensor in kept:
        tensor.retain_grad()
    output.last_hidden_state.square().sum().backward()
    assert not output.hidden_states[0].requires_grad
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in kept[1:])

"""feature_layer: the blocks after the hidden state that is read never run, and that hidden state is the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import covft
from covft.errors import ConfigError, LayerIndexError
from covft.integrations import attach, detach, get_encoder
from covft.surgery.skipping import run_all_blocks
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.releases import needs_hidden_states, trained
from tests.helpers.tiny_vits import TWO_FFNS, D, TwoFFNs
from tests.helpers.towers import BY_NAME as TOWERS
from tests.helpers.towers import body, features, hidden_states, perturb

TEXTS = covft.testing.HashTextEncoder(16)
QUESTIONS = ["what is left of the cup?", "how many people are there?"]


def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, image_size=32, patch_size=8
    )
    return CLIPVisionModel(config).eval()


def timm_vit():
    import timm

    return timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32, patch_size=8).eval()


def runs_of(vit, blocks, call):
    """Return what a call returns, and the blocks whose attention ran in it."""
    seen, handles = [], []
    for index, block in enumerate(blocks):
        attention = next(child for name, child in block.named_children() if "attn" in name)
        handles.append(attention.register_forward_hook(lambda *_, index=index: seen.append(index)))
    try:
        return call(), seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("feature_layer", [-2, -3, 4, 6, -1])
def test_transformers__features_are_the_same_and_later_blocks_do_not_run(feature_layer):
    plain = clip()
    other = copy.deepcopy(plain)
    images = torch.randn(2, 3, 32, 32)
    last = 5 + feature_layer + 1 if feature_layer < 0 else feature_layer - 1
    settings = {"layers": [1, min(3, last)]}
    torch.manual_seed(0)
    whole = covft.wrap(plain, TEXTS, **settings)
    torch.manual_seed(0)
    short = covft.wrap(other, TEXTS, **settings, feature_layer=feature_layer)
    for encoder in (whole, short):
        torch.manual_seed(1)
        perturb(encoder)
    wanted = whole(images, QUESTIONS, output_hidden_states=True).hidden_states
    for _ in range(2):
        output, seen = runs_of(
            other, body(other).encoder.layers, lambda: short(images, QUESTIONS, output_hidden_states=True).hidden_states
        )
        assert len(output) == len(wanted) == 7
        assert torch.equal(output[feature_layer], wanted[feature_layer])
        assert all(torch.equal(hidden, output[feature_layer]) for hidden in output[last + 1 :])  # copies of it
        assert seen == list(range(last + 1))


def test_timm__features_are_the_same_and_later_blocks_do_not_run():
    plain = timm_vit()
    other = copy.deepcopy(plain)
    images, depth = torch.randn(2, 3, 32, 32), len(plain.blocks)
    torch.manual_seed(0)
    whole = covft.wrap(plain, TEXTS, layers=[1, 2])
    torch.manual_seed(0)
    short = covft.wrap(other, TEXTS, layers=[1, 2], feature_layer=-3)

    def read(encoder):
        with encoder.condition(QUESTIONS):
            return encoder.vit.forward_intermediates(images, indices=[depth - 3], intermediates_only=True)[0]

    for _ in range(2):
        found, seen = runs_of(other, other.blocks, lambda: read(short))
        assert torch.equal(found, read(whole))
    assert seen == list(range(depth - 2))


# A skipped block never runs, not even in the first call


class NeverRuns(nn.Module):
    def forward(self, *args, **kwargs):
        raise AssertionError("a skipped block ran")


SKIPPED = ["hf-clip", "hf-siglip", "hf-dinov2", "hf-internvl", "timm-clip"]
every_tower = pytest.mark.parametrize("name", SKIPPED)


def skipping(name, twin_of=lambda encoder: encoder, **settings):
    """A tower without its last block, which raises an error if it runs, and images for it."""
    encoder = covft.wrap(TOWERS[name].build().eval(), TEXTS, feature_layer=-2, **settings)
    perturb(encoder)
    encoder = twin_of(encoder)
    encoder.set_text_encoder(TEXTS)
    block = encoder.vit.get_submodule(encoder.spec.blocks[-1].path)
    for child, _ in list(block.named_children()):
        setattr(block, child, NeverRuns())
    return encoder, block, TOWERS[name].images(2)


def outputs_of(vit, images):
    """The hidden states and all other outputs of a call, by name."""
    if hasattr(vit, "forward_intermediates"):
        tokens, states = vit.forward_intermediates(images)
        return {"hidden_states": states, "tokens": tokens, "output": vit(images)}
    found = vit(images, **hidden_states(vit))
    needs_hidden_states(vit, found)
    return dict(found)


def answers(encoder, images):
    with encoder.condition(QUESTIONS):
        found = outputs_of(encoder.vit, images)
    assert len(found["hidden_states"]) >= encoder.spec.depth
    return found


def assert_close(found, wanted, names=None, **tolerance):
    assert found.keys() == wanted.keys()
    for name in wanted.keys() if names is None else names:
        torch.testing.assert_close(found[name], wanted[name], **tolerance)


def test_never_runs__the_probe_notices_a_block_that_runs():
    encoder, _, images = skipping("hf-clip")
    run_all_blocks(encoder.vit)
    with pytest.raises(AssertionError, match="a skipped block ran"):
        answers(encoder, images)


@every_tower
def test_never_runs__first_and_second_call_are_equal(name):
    encoder, _, images = skipping(name)
    assert_close(answers(encoder, images), answers(encoder, images), rtol=0, atol=0)


class Identity(nn.Module):
    """Stands where a block stood."""

    attention_type = None

    def __init__(self, in_tuple):
        super().__init__()
        self.in_tuple = in_tuple  # as blocks of older releases return their tokens

    def forward(self, tokens, *args, **kwargs):
        return (tokens,) if self.in_tuple else tokens


@pytest.mark.parametrize("feature_layer", [-2, -3])
@every_tower
def test_never_runs__other_outputs_come_from_the_hidden_state_that_is_read(name, feature_layer):
    vit = TOWERS[name].build().eval()
    plain, images = copy.deepcopy(vit), TOWERS[name].images(2)
    outputs = []
    handle = vit.get_submodule(covft.describe(vit).blocks[0].path).register_forward_hook(
        lambda _, __, output: outputs.append(output)
    )
    vit(images)
    handle.remove()
    in_tuple = isinstance(outputs[0], tuple)
    encoder = covft.wrap(vit, TEXTS, feature_layer=feature_layer)
    for block in encoder.spec.blocks[feature_layer + 1 :]:
        plain.set_submodule(block.path, Identity(in_tuple))
    wanted = outputs_of(plain, images)
    for _ in range(2):
        assert_close(answers(encoder, images), wanted, wanted.keys() - {"hidden_states"}, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@every_tower
def test_never_runs__in_training(name, checkpointing):
    encoder, _, images = skipping(name)
    encoder.train()
    if checkpointing:
        encoder.gradient_checkpointing_enable()
    for _ in range(2):
        encoder.zero_grad()
        answers(encoder, images)["hidden_states"][-1].square().sum().backward()
        assert all(p.grad is not None for slot in encoder.slots().values() for p in slot.parameters())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("called", [False, True], ids=["before-a-call", "after-a-call"])
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
@every_tower
def test_never_runs__in_a_copy(name, twin_of, called):
    originals = []

    def made(encoder):
        originals.append(encoder)
        if called:
            encoder(TOWERS[name].images(2), QUESTIONS)  # hidden states would leave hooks that cannot be pickled
        return twin_of(encoder)

    twin, block, images = skipping(name, made)
    assert vars(block)["forward"].owner is block
    for _ in range(2):
        assert_close(answers(twin, images), answers(originals[0], images), rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",  # twenty seconds each
    [name if name in ("hf-clip", "timm-clip") else pytest.param(name, marks=pytest.mark.slow) for name in SKIPPED],
)
def test_never_runs__compiled(name):
    encoder, _, images = skipping(name, layers=[1], experts=2)
    twin, text = copy.deepcopy(encoder), encoder.encode_text(QUESTIONS)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(features(compiled(images, text)), features(twin(images, text)))


def test_never_runs__but_for_its_form_where_the_block_before_it_is_of_another_class():
    vit = TOWERS["timm-clip"].build()

    class Other(type(vit.blocks[3])):
        """The class of the last block alone."""

    vit.blocks[3].__class__ = Other
    encoder, ran = covft.wrap(vit, TEXTS, feature_layer=-2), []
    vit.blocks[3].norm1.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    images = TOWERS["timm-clip"].images(2)
    assert torch.equal(encoder(images, QUESTIONS), encoder(images, QUESTIONS))
    assert ran == [False]  # once, without gradients


@pytest.mark.parametrize(("feature_layer", "skipped"), [(-1, []), (-2, []), (-3, [1]), (-4, [1])])
def test_two_ffns_in_a_block__the_block_that_is_read_runs(feature_layer, skipped):
    vit = TwoFFNs().eval()
    encoder = covft.wrap(vit, 16, adapter=TWO_FFNS, layers=[0], feature_layer=feature_layer)
    assert encoder.spec.depth == 4
    assert [index for index, block in enumerate(vit.blocks) if "forward" in vars(block)] == skipped
    for index in skipped:
        for child, _ in list(vit.blocks[index].named_children()):
            setattr(vit.blocks[index], child, NeverRuns())
    x = torch.randn(2, 5, D)
    one, other = (encoder(x, torch.ones(2, 16)) for _ in range(2))
    assert torch.equal(one, other)
    with encoder.condition(torch.ones(2, 16)):
        wanted = vit.blocks[0](x)
        assert torch.equal(one, wanted if skipped else vit.blocks[1](wanted))


# Training


def test_gradients__are_the_same_with_checkpointing_and_without():
    grown = []
    for feature_layer, checkpointing in ((None, False), (-2, False), (-2, True)):
        torch.manual_seed(0)
        encoder = covft.wrap(clip().double(), TEXTS, layers=[2, 4], feature_layer=feature_layer)
        torch.manual_seed(1)
        perturb(encoder)
        encoder.train()
        if checkpointing:
            encoder.gradient_checkpointing_enable()
        torch.manual_seed(2)
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        for _ in range(2):
            encoder.zero_grad()
            encoder(images, QUESTIONS, output_hidden_states=True).hidden_states[-2].square().sum().backward()
        grown.append({name: p.grad for name, p in encoder.named_parameters() if p.requires_grad})
    for other in grown[1:]:
        assert other.keys() == grown[0].keys()
        assert all(torch.allclose(other[name], grown[0][name], rtol=1e-12) for name in other)


def test_unwrap__runs_all_blocks_again():
    vit = clip()
    images = torch.randn(2, 3, 32, 32)
    before = vit(images).last_hidden_state
    encoder = covft.wrap(vit, TEXTS, feature_layer=-3)
    assert encoder.layers == (2, 3)
    encoder(images, QUESTIONS)
    short = encoder(images, QUESTIONS).last_hidden_state
    assert not torch.allclose(short, before)
    covft.unwrap(encoder)
    assert torch.equal(vit(images).last_hidden_state, before)
    assert all("forward" not in vars(module) for module in vit.modules())


def test_copies_and_pickles__skip_their_own_blocks():
    encoder = covft.wrap(clip(), TEXTS, feature_layer=-2)
    twin = copy.deepcopy(encoder)
    again = pickle.loads(pickle.dumps(encoder))
    again.set_text_encoder(TEXTS)
    for other in (twin, again):
        block = body(other.vit).encoder.layers[5]
        assert vars(block)["forward"].owner is block
        assert torch.equal(
            other(torch.ones(1, 3, 32, 32), "what?", output_hidden_states=True).hidden_states[-2],
            encoder(torch.ones(1, 3, 32, 32), "what?", output_hidden_states=True).hidden_states[-2],
        )


def test_save_and_load__keep_the_setting(tmp_path):
    vit = clip()
    base = copy.deepcopy(vit)
    encoder = covft.wrap(vit, TEXTS, feature_layer=-2)
    encoder.save_pretrained(tmp_path)
    again = covft.load(tmp_path, base, TEXTS)
    assert again.covft_config.feature_layer == -2
    images = torch.randn(1, 3, 32, 32)
    one, other = (e(images, "what?", output_hidden_states=True).hidden_states[-2] for e in (encoder, again))
    assert torch.equal(one, other)


def test_refused__before_anything_has_changed():
    vit = clip()
    for feature_layer in (0, 7, -7):
        with pytest.raises(ConfigError, match="is not the output of a block"):
            covft.wrap(vit, TEXTS, feature_layer=feature_layer)
    with pytest.raises(LayerIndexError, match="after the hidden state") as caught:
        covft.wrap(vit, TEXTS, layers=[3, 5], feature_layer=-2)
    assert "layers=[3]" in str(caught.value)
    with pytest.raises(ConfigError, match="whole number"):
        covft.CoVFTConfig(feature_layer=1.5)
    assert all(p.requires_grad for p in vit.parameters())
    assert all("forward" not in vars(module) for module in vit.modules())


@trained
def test_attach__of_a_model_that_reads_the_penultimate_layer():
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, [Row(1, QUESTIONS[0]), Row(1, QUESTIONS[1])])
    before = model(**batch.inputs).logits
    attach(model, TEXTS, tokenizer=mllm.tokenizer, feature_layer=-2)
    assert get_encoder(model).layers == (1, 2)
    for _ in range(2):
        after, seen = runs_of(
            model, body(model.model.vision_tower).encoder.layers, lambda: model(**batch.inputs).logits
        )
        assert torch.allclose(after, before, atol=1e-5)
    assert seen == [0, 1, 2]
    detach(model)
    assert torch.equal(model(**batch.inputs).logits, before)


@pytest.mark.long
def test_compile__without_graph_breaks():
    encoder = covft.wrap(timm_vit(), TEXTS, layers=[1], feature_layer=-2).eval()
    images, features = torch.randn(2, 3, 32, 32), encoder.encode_text(QUESTIONS)
    with torch.no_grad():
        encoder(images, features)
        wanted = encoder(images, features)
        compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(images, features), wanted, atol=1e-5)

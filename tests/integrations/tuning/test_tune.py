"""Every method inside a LLaVA and other multimodal LLMs: what starts, moves, is saved, loads, and comes back."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import covft
from covft.errors import ConfigError, LayerIndexError, MissingContextError, UnsupportedViTError
from covft.integrations import get_encoder, parts_of
from covft.integrations.tuning.tune import is_mllm
from covft.testing import HashTextEncoder
from covft.text.base import TokenStates
from tests.helpers.attached import CUP, MIXED, PEOPLE, features
from tests.helpers.mllm_configs import SIZE
from tests.helpers.mllms import BY_NAME, MLLMS, Row
from tests.helpers.snapshots import aligned, assert_unchanged, snapshot
from tests.helpers.towers import BY_NAME as TOWERS
from tests.helpers.tuned import CHANGED_AT_START, MIXES, OPTIONS, READS_TEXT

pytestmark = pytest.mark.usefixtures("quiet")
METHODS = list(covft.tuning.methods())
# A bias of all keys cancels in the softmax.
WITHOUT_GRADIENT = re.compile(r"k_proj\.bias")
# What the first call of a tower of transformers changes: it installs hooks that capture hidden states.
CALLED = ("hooks", "attributes")


class Words(HashTextEncoder):
    """One state per word."""

    def encode_states(self, texts):
        rows = [self.encode(text.split()) for text in texts]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return TokenStates(pad_sequence(rows, batch_first=True), mask)


TEXTS = Words(16)


def built(name="llava"):
    """A model in double precision whose weights all matter, and a batch of rows with none, one and two images."""
    mllm = BY_NAME[name]
    torch.manual_seed(0)
    model = mllm.build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return mllm, model, doubled(mllm.batch(model, MIXED))


def doubled(batch):
    return {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in batch.inputs.items()}


def tuned_of(method, mllm, model, **more):
    if method == "svpt":
        more["images"] = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    return covft.tune(model, method, text_encoder=TEXTS, tokenizer=mllm.tokenizer, **OPTIONS.get(method, {}), **more)


def logits(model, batch, **more):
    with torch.no_grad():
        return model(**batch, **more).logits


def train(model, batch, steps=3):
    """Take steps of SGD, so that every parameter with a gradient moves; return the gradients of the last."""
    encoder = get_encoder(model)
    optimizer = torch.optim.SGD(encoder.param_groups(lr=0.5))
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(**batch).logits
        (output - output.detach().roll(1, 0)).square().mean().backward()
        optimizer.step()
    return {name: p.grad for name, p in encoder.vit.named_parameters() if p.grad is not None}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS)
def test_start_training_text_saving_and_undoing(method, tmp_path):
    from transformers import LlavaForConditionalGeneration

    mllm, model, batch = built()
    model.requires_grad_(True)
    plain, before = logits(model, batch), snapshot(model)
    assert tuned_of(method, mllm, model) is model
    encoder = get_encoder(model)
    trained = set(encoder.adapted_parameters())
    assert trained == {name for name, p in encoder.vit.named_parameters() if p.requires_grad}
    unread = [name for name in trained if "layers.3." in name or "post_layernorm" in name]
    assert unread == [], "blocks that LLaVA does not read"
    start = logits(model, batch)
    same = torch.allclose(start, plain) if method in MIXES else torch.equal(start, plain)
    assert same == (method not in CHANGED_AT_START)

    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = train(model, batch) if trained else {}
    moved = {name for name, p in encoder.vit.named_parameters() if not torch.equal(p, values[prefixed(model, name)])}
    still = {name for name in trained - moved if not WITHOUT_GRADIENT.search(name)}
    assert (still, moved - trained) == (set(), set())
    assert gradients.keys() == trained
    parts = parts_of(model)
    assert {parts[prefixed(model, name)] for name in trained} <= {covft.tuning.methods()[method].part, "vision"}
    outside = {name for name in values if "vision_tower" not in name}
    assert all(torch.equal(model.get_parameter(name), values[name]) for name in outside)
    last = logits(model, batch)
    other = logits(model, batch, context_text="another question?")
    assert torch.equal(last, other) == (method not in READS_TEXT)

    model.save_pretrained(tmp_path)
    mllm.tokenizer.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(aligned(loaded), batch), last if encoder.keeps_names else plain)
    again, _ = covft.load_model(tmp_path, TEXTS, processor=mllm.tokenizer, dtype=torch.float64)
    assert get_encoder(again).method == encoder.method
    assert torch.equal(logits(aligned(again), batch), last)
    copied = copy.deepcopy(again)
    for parameter in get_encoder(again).trainable_parameters():
        parameter.data.zero_()  # the copy has its own
    assert torch.equal(logits(copied, batch), last)

    assert covft.untune(model) is model
    assert_unchanged(model, before, without=CALLED)
    assert torch.equal(logits(model, batch), plain)
    with pytest.raises(UnsupportedViTError):
        covft.untune(model)


def prefixed(model, name):
    """The name in the model of a parameter of its tower."""
    [prefix] = {n[: -len(name)] for n, _ in model.named_parameters() if "vision_tower" in n and n.endswith(f".{name}")}
    return prefix + name


@pytest.mark.parametrize("method", ["lora", "vpt", "full", *READS_TEXT])
def test_recomputing_changes_no_gradient(method):
    found = []
    for on in (False, True):
        mllm, model, batch = built()
        torch.manual_seed(1)
        tuned_of(method, mllm, model).train()
        if on:
            get_encoder(model).gradient_checkpointing_enable()
        found.append(train(model, batch))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.long
@pytest.mark.parametrize("mllm", [m for m in MLLMS if m.name != "llava"], ids=str)
@pytest.mark.parametrize("method", ["lora", "cross_attention"])
def test_every_family_takes_lora_and_text(mllm, method):
    _, model, batch = built(mllm.name)
    plain, before = logits(model, batch), snapshot(model)
    tuned_of(method, mllm, model)
    torch.testing.assert_close(logits(model, batch), plain)
    for parameter in get_encoder(model).trainable_parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    changed = logits(model, batch)
    assert not torch.allclose(changed, plain)
    assert torch.equal(changed, logits(model, batch, context_text="another?")) == (method == "lora")
    covft.untune(model)
    assert_unchanged(model, before, without=CALLED)


def test_generation_reads_each_rows_question():
    mllm, model, _ = built()
    batch = doubled(mllm.batch(model, [Row(1, CUP), Row(1, PEOPLE)]))
    tuned_of("cross_attention", mllm, model)
    for parameter in get_encoder(model).trainable_parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    seen = []
    handle = get_encoder(model).vit.register_forward_hook(lambda _, args, output: seen.append(features(output)))
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    handle.remove()
    [tokens] = seen
    with torch.no_grad():
        alone = features(get_encoder(model)(batch["pixel_values"], [CUP, PEOPLE]))
    assert torch.equal(tokens, alone)


def test_a_call_without_text_is_refused_and_a_method_without_text_needs_no_tokenizer():
    _, model, batch = built()
    covft.tune(model, "adaln", text_encoder=TEXTS, width=8)
    with pytest.raises(MissingContextError, match="no tokenizer"):
        model(**batch)
    assert logits(model, batch, context_text=CUP).isfinite().all()
    _, model, batch = built()
    covft.tune(model, "lora")
    assert logits(model, batch).isfinite().all()


@pytest.mark.parametrize("method", ["lora", "bitfit", "full", "ffn"])
def test_merged_models_are_plain_and_the_same(method):
    mllm, model, batch = built()
    names = list(model.state_dict())
    tuned_of(method, mllm, model)
    train(model, batch)
    last = logits(model, batch)
    assert covft.merge(model) is model
    torch.testing.assert_close(logits(model, batch), last, rtol=1e-9, atol=1e-9)
    assert list(model.state_dict()) == names
    with pytest.raises(UnsupportedViTError, match="not attached"):
        get_encoder(model)


def test_what_depends_on_the_input_is_not_merged():
    mllm, model, batch = built()
    tuned_of("adaln", mllm, model)
    before = logits(model, batch)
    with pytest.raises(covft.errors.MergeError, match="depends on the input"):
        covft.merge(model)
    assert torch.equal(logits(model, batch), before)
    covft.untune(model)
    covft.tune(model, text_encoder=TEXTS, tokenizer=mllm.tokenizer)
    with pytest.raises(covft.errors.MergeError, match="cannot be merged"):
        covft.merge(model)


def test_covft_by_name_is_attach():
    mllm, model, batch = built()
    covft.tune(model, "covft", text_encoder=TEXTS, tokenizer=mllm.tokenizer, layers=[1], turns="last")
    assert get_encoder(model).layers == (1,)
    assert get_encoder(model).reading["turns"] == "last"
    covft.untune(model)
    assert logits(model, batch).isfinite().all()


def test_wrong_calls_change_nothing():
    mllm, model, _ = built()
    before = snapshot(model)
    for error, method, options in (
        (ConfigError, "lora", {"rank": 3}),
        (ConfigError, "lora", {"language": "nothing"}),
        (ConfigError, "lora", {"language": {"method": "lora", "rank": 3}}),
        (UnsupportedViTError, "lora", {"language": {"method": "last_layers", "n": 99}}),
        (LayerIndexError, "ffn", {"layers": [3]}),
        (ConfigError, "nothing", {}),
    ):
        with pytest.raises(error):
            covft.tune(model, method, text_encoder=TEXTS, tokenizer=mllm.tokenizer, **options)
        assert_unchanged(model, before)
    vit = TOWERS["hf-clip"].build()
    with pytest.raises(ConfigError, match="multimodal LLM"):
        covft.tune(vit, "lora", language="lora")
    assert not is_mllm(vit)
    covft.tune(model, "lora")
    with pytest.raises(UnsupportedViTError, match="already"):
        covft.tune(model, "bitfit")


def test_a_tower_with_the_name_of_its_multimodal_llm_is_a_tower():
    vit = TOWERS["hf-qwen2.5-vl"].build()
    vit.config.model_type = "qwen2_5_vl"  # as before release 5 of transformers
    assert not is_mllm(vit)
    assert covft.tune(vit, "bitfit").vit is vit

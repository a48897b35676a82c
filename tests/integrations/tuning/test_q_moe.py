"""Experts in the connector of multimodal LLMs, against their equation written out, and what trains them."""

import pytest
import torch
from torch import nn

import covft
from covft.errors import ConfigError, MissingContextError, UnsupportedViTError
from covft.integrations import get_encoder, parts_of, train_only
from covft.tuning.q_moe import ffns_of
from tests.helpers.attached import CUP, MIXED, PEOPLE, TEXTS
from tests.helpers.mllms import BY_NAME, MLLMS, Row
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import GRIDS

pytestmark = pytest.mark.usefixtures("quiet")
# Models whose connector is one linear layer, or has a gated FFN.
WITHOUT = ("paligemma", "gemma3", "idefics3", "smolvlm", "glm4v", "mllama")
WITH = [mllm for mllm in MLLMS if mllm.name not in WITHOUT]
OFTEN = ("llava", "mistral3", "qwen3_vl")
C = TEXTS.text_dim
TOUCHED = ("hooks", "attributes")  # by the first call of a tower of transformers


def built(name, rows=MIXED, dtype=torch.float64):
    mllm = BY_NAME[name]
    torch.manual_seed(0)
    model = mllm.build().to(dtype)
    batch = mllm.batch(model, rows, dtype)
    return mllm, model, batch


def tuned(mllm, model, **options):
    """Tune a model, and move its experts apart."""
    covft.tune(model, "q_moe", text_encoder=TEXTS, tokenizer=mllm.tokenizer, **options)
    encoder = get_encoder(model)
    with torch.no_grad():
        for parameter in encoder.trainable_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


def mixed_by_hand(mixture, x, text):
    """The equation in the docstring, for tokens `(N, D)` of one image."""
    moe = mixture.moe
    refine, gate = moe.context.text, moe.router.gate
    refined = text + refine.down(nn.functional.gelu(refine.up(text)))
    refined = nn.functional.layer_norm(refined, (C,), refine.norm.weight, refine.norm.bias)
    weights = torch.softmax(gate.weight @ refined + gate.bias, dim=0)
    outputs = [expert[2](expert[1](expert[0](x))) for expert in moe.experts]
    return sum(weight * output for weight, output in zip(weights, outputs, strict=True))


@pytest.mark.parametrize(
    "mllm", [pytest.param(m, marks=() if m.name in OFTEN else pytest.mark.long) for m in WITH], ids=str
)
def test_each_image_is_mixed_by_its_own_question_and_all_comes_back(mllm):
    _, model, batch = built(mllm.name)
    before = snapshot(model)
    with torch.no_grad():
        plain = model(**batch.inputs).logits
        ffns = ffns_of({name: m for name, m in model.named_modules() if name.endswith(("projector", "merger"))})
        encoder = tuned(mllm, model)
        first, last = ffns[0].first, ffns[0].last
        seen = {}
        handles = [
            first.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
            last.register_forward_hook(lambda _, args, output: seen.update(y=output)),
        ]
        assert not torch.allclose(model(**batch.inputs).logits, plain)
        for handle in handles:
            handle.remove()
        texts = TEXTS.encode([MIXED[row].question for row in batch.row_of_tile]).double()
        x, y = seen["x"], seen["y"]
        if mllm.layout in ("grid", "sizes"):
            lengths = [(h // mllm.merged) * (w // mllm.merged) for h, w in GRIDS[: len(texts)]]
            x, y = (tokens.flatten(0, -2).split(lengths) for tokens in (x, y))
        assert len(x) == len(texts)
        for tokens, found, text in zip(x, y, texts, strict=True):
            torch.testing.assert_close(found, mixed_by_hand(encoder.vit.covft_connector[0], tokens, text))
    covft.untune(model)
    assert_unchanged(model, before, without=TOUCHED)
    assert torch.equal(model(**batch.inputs).logits, plain)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "glm4v" else pytest.mark.long) for n in WITHOUT])
def test_a_connector_without_such_an_ffn_is_refused(name):
    mllm, model, _ = built(name)
    before = snapshot(model)
    with pytest.raises(UnsupportedViTError, match="has no FFN"):
        covft.tune(model, "q_moe", text_encoder=TEXTS, tokenizer=mllm.tokenizer)
    assert_unchanged(model, before)


class Gated(nn.Module):
    """The layers of an FFN, side by side, but called otherwise."""

    def __init__(self):
        super().__init__()
        self.gate, self.act, self.up = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)

    def forward(self, x):
        return self.act(self.gate(x)) * self.up(x)


class Twice(Gated):
    def forward(self, x):
        return self.gate(self.up(self.act(self.gate(x))))


class Looking(Gated):
    def forward(self, x):
        return self.up(self.act(self.gate(x))) if x.sum() > 0 else x


def test_ffns_are_found_by_what_is_called():
    three = nn.Sequential(nn.LayerNorm(4), *[m for _ in range(3) for m in (nn.Linear(4, 4), nn.GELU())][:-1])
    [found] = ffns_of({"connector": three})
    assert found == (three[1], three[2], three[3])
    for other in (Gated(), Twice(), Looking(), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))):
        assert ffns_of({"connector": other}) == []


@pytest.mark.parametrize(("name", "experts", "tokens"), [("llava", 3, 16), ("internvl", 1, 4), ("internvl", 4, 4)])
def test_parameters_and_flops_are_those_of_the_formulas(name, experts, tokens):
    mllm, model, _ = built(name)
    before = snapshot(model)
    connector = model.model.multi_modal_projector
    (inner, width), (out, _) = connector.linear_1.weight.shape, connector.linear_2.weight.shape
    cost = covft.budget(model, "q_moe", text_dim=C, experts=experts)
    assert_unchanged(model, before)
    ffn = width * inner + inner + inner * out + out
    assert cost.parameters == cost.added == experts * ffn + 4 * C * C + 5 * C + experts * (C + 1)
    products = width * inner + inner * out
    assert cost.forward_flops == 2 * (tokens * (experts - 1) * products + 4 * C * C + C * experts)
    encoder = tuned(mllm, model, experts=experts)
    assert sum(p.numel() for p in encoder.trainable_parameters()) == cost.parameters


def test_a_vit_alone_has_no_budget_of_it():
    with pytest.raises(UnsupportedViTError, match=r"covft.tune\(mllm, 'q_moe'"):
        covft.budget(built("llava")[1].model.vision_tower, "q_moe")


@pytest.mark.parametrize("wide", [False, True])
def test_half_precision_is_finite(wide):
    mllm, model, batch = built("llava", dtype=torch.bfloat16)
    encoder = tuned(mllm, model)
    if wide:
        encoder.train_in_float32()
    assert {p.dtype for p in encoder.trainable_parameters()} == {torch.float32 if wide else torch.bfloat16}
    logits = model(**batch.inputs).logits
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.long)])
@pytest.mark.parametrize("projector", [None, True])
def test_the_connectors_own_weights_are_frozen_whoever_asks(name, projector):
    mllm, model, batch = built(name)
    before = snapshot(model)
    connector = next(m for n, m in model.named_modules() if n.endswith(("multi_modal_projector", "merger")))
    language = {"method": "lora", "r": 2}
    whole = covft.tune(
        model, "q_moe", text_encoder=TEXTS, tokenizer=mllm.tokenizer, language=language, projector=projector
    )
    encoder = get_encoder(whole)
    own = {id(p) for p in encoder.adapted_parameters().values()}
    idle = {id(p) for ffn in ffns_of({"": connector}) for layer in (ffn.first, ffn.last) for p in layer.parameters()}
    for _ in range(2):
        named = dict(whole.named_parameters())
        assert own <= {id(p) for p in named.values() if p.requires_grad}
        assert not any(p.requires_grad for p in named.values() if id(p) in idle)
        assert {parts_of(whole)[n] for n, p in named.items() if id(p) in own} == {"projector"}
        whole(**batch.inputs).logits.square().mean().backward()
        assert [n for n, p in named.items() if p.requires_grad and p.grad is None] == []
        train_only(whole, ["projector", "vision", "llm"])
    assert covft.untune(whole) is model
    assert_unchanged(model, before, without=TOUCHED)


def test_calls_that_cannot_work_say_so():
    mllm, model, batch = built("llava", [Row(1, CUP), Row(1, PEOPLE)])
    before = snapshot(model)
    with pytest.raises(ConfigError, match="trains experts of the projector"):
        covft.tune(model, "q_moe", text_encoder=TEXTS, tokenizer=mllm.tokenizer, projector=False)
    with pytest.raises(ConfigError, match="there is none"):
        covft.tune(model, "q_moe")
    assert_unchanged(model, before)
    tuned(mllm, model)
    with pytest.raises(MissingContextError):
        model.get_image_features(pixel_values=batch.inputs["pixel_values"])
    with pytest.raises(MissingContextError):
        model.model.multi_modal_projector(torch.randn(1, 16, 32, dtype=torch.float64))


def test_another_library_in_its_place_is_noticed():
    mllm, model, _ = built("llava")
    tuned(mllm, model)
    model.model.multi_modal_projector.linear_1.forward = lambda x: x
    with pytest.raises(UnsupportedViTError, match="Other code has replaced"):
        covft.untune(model)


def test_lora_on_everything_leaves_it_out():
    import re

    mllm, model, _ = built("llava")
    tuned(mllm, model)
    pattern = re.compile(covft.lora_exclude(model))
    left = {name for name, m in model.named_modules() if type(m) is nn.Linear and not pattern.fullmatch(name)}
    assert left
    assert not any("projector" in name or "covft_connector" in name for name in left)

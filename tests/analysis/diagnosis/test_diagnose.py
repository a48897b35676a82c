import json

import pytest
import torch

import covft
from covft.errors import ConfigError
from covft.testing import HashTextEncoder, ToyViT, tiny_llava
from tests.helpers.snapshots import assert_unchanged, snapshot

SETTINGS = {"samples": 40, "steps": 4, "permutations": 99, "rate": 1e-3}


@pytest.fixture
def vit():
    return ToyViT(depth=2)


def data(signs, count=40):
    """Images, texts and kinds; `loss` wants a projection of the tokens to be the sign of the kind."""
    kinds = sorted(signs)
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.rand(3, 16, 16, generator=draw), f"{kinds[i % len(kinds)]} of thing {i}", kinds[i % len(kinds)])
        for i in range(count)
    ]


def loss_of(signs):
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1))

    def loss(vit, samples):
        images = torch.stack([image for image, *_ in samples])
        wanted = torch.tensor([signs[kind] for *_, kind in samples])
        return (vit(images)[:, 1:].mean(1) @ direction / 4 - wanted).square().mean()

    return loss


@pytest.fixture
def conflicting(vit):
    signs = {"left": 1.0, "right": -1.0}
    before, state = snapshot(vit.train()), torch.get_rng_state()
    found = covft.diagnose(vit, data(signs), loss=loss_of(signs), **SETTINGS)
    assert_unchanged(vit, before)
    assert torch.equal(torch.get_rng_state(), state)
    return found


def test_a_planted_conflict_asks_for_context(conflicting, tmp_path):
    assert conflicting.verdict.choice == "context"
    assert conflicting.conflict.p_value == 0.01
    assert conflicting.conflict.alignment[-1, 0, 1] < -0.5
    assert conflicting.probe.alone["left"]["right"].low > 0
    assert (conflicting.kinds, conflicting.found) == ({"left": 20, "right": 20}, False)
    assert conflicting.verdict.experts == 2
    assert set(conflicting.verdict.layers) <= {0, 1}
    page = str(conflicting)
    for told in ("context routing", "p = 0.01", "left | right", "Not measured", "experts=2", "trained on left"):
        assert told in page
    conflicting.save(tmp_path / "diagnosis.json")
    saved = json.loads((tmp_path / "diagnosis.json").read_text())
    assert saved["verdict"]["choice"] == "context"
    assert saved["conflict"]["alignment"][-1][0][1] == conflicting.conflict.alignment[-1, 0, 1]


def test_halves_of_one_task_ask_for_none(vit):
    signs = {"one": 1.0, "two": 1.0}
    found = covft.diagnose(vit, data(signs), loss=loss_of(signs), **SETTINGS)
    assert found.verdict.choice in ("tune", "lora")
    assert found.conflict.p_value > 0.05
    assert found.verdict.groups == (("one", "two"),)
    assert (found.verdict.experts, found.verdict.layers) == (None, ())


def test_nothing_to_learn_asks_for_a_frozen_tower(vit):
    def noise(vit, samples):
        draw = torch.Generator().manual_seed(int(samples[0][0].sum() * 1e6))
        wanted = torch.randn(len(samples), 16, generator=draw)
        return (vit(torch.stack([image for image, *_ in samples]))[:, 1:].mean(1) * wanted).mean()

    assert (
        covft.diagnose(vit, data({"a": 0, "b": 0}), loss=noise, **{**SETTINGS, "rate": 1e-5}).verdict.choice == "freeze"
    )


def batches_of(tiny, count=16):
    torch.manual_seed(0)
    asked = {"where": ("where is the cup?", "left"), "what": ("what is it?", "a red cup")}
    kinds = ["where", "what"] * (count // 2)
    return [{**tiny.batch([asked[kind][0]], answers=[asked[kind][1]]), "kind": kind} for kind in kinds]


@pytest.mark.parametrize("attached", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_multimodal_llm_has_its_own_loss(attached):
    tiny = tiny_llava(depth=3)
    if attached:
        covft.attach(tiny.model, HashTextEncoder(8), tokenizer=tiny.tokenizer, layers=[1], experts=2)
    entries = batches_of(tiny)
    before = snapshot(tiny.model)
    found = covft.diagnose(tiny.model, entries, steps=1, batch=2, rate=1e-4, permutations=19)
    assert_unchanged(tiny.model, before, without=["hooks"])
    assert found.conflict.p_value == 0.05, "other words, other gradients"
    with torch.no_grad():
        losses = [float(tiny.model(**{k: v for k, v in e.items() if k != "kind"}).loss) for e in entries]
    means = [sum(losses[i::2]) / 8 for i in range(2)]
    assert found.probe.before == pytest.approx({"where": means[0], "what": means[1]}, rel=0.2)
    assert list(found.conflict.layers) == [0, 1, 2]
    assert not found.conflict.cosines[2].any(), "LLaVA does not read the last block"


def test_what_cannot_be_diagnosed_is_refused(vit):
    signs = {"left": 1.0, "right": -1.0}
    entries, loss = data(signs), loss_of(signs)
    with pytest.raises(ConfigError, match="has no loss"):
        covft.diagnose(vit, entries)
    with pytest.raises(ConfigError, match="too few samples"):
        covft.diagnose(vit, entries, loss=loss, samples=10)
    for name, value in (("rate", 0.0), ("permutations", 0), ("level", 1.0), ("seed", -1), ("steps", 0)):
        with pytest.raises(ConfigError, match=f"{name}="):
            covft.diagnose(vit, entries, loss=loss, **{name: value})
    tiny = tiny_llava(depth=2)
    with pytest.raises(ConfigError, match="has no labels"):
        covft.diagnose(tiny.model, [{**tiny.batch(["a?"]), "kind": "ab"[i % 2]} for i in range(16)])

"""The language model and the projector beside a tuned tower."""

from __future__ import annotations

import collections

import pytest
import torch

import covft
from covft.errors import UnsupportedViTError
from covft.integrations import get_encoder, parts_of
from tests.helpers.attached import MIXED, TEXTS
from tests.helpers.mllms import BY_NAME
from tests.helpers.snapshots import assert_unchanged, snapshot

pytestmark = pytest.mark.usefixtures("quiet")
CALLED = ("hooks", "attributes")
LLAVA = BY_NAME["llava"]


def sizes(model):
    """Trained parameters of each part."""
    parts = parts_of(model)
    found = collections.Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[parts[name]] += parameter.numel()
    return found


def expected(model, language):
    """Parameters of the language model that are trained, from its config alone."""
    config = model.config.text_config
    d, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    key = config.num_key_value_heads * (d // config.num_attention_heads)
    block = 2 * d * d + 2 * d * key + 3 * d * inner + 2 * d
    if language == "full":
        return config.num_hidden_layers * block + d + 2 * vocabulary * d
    if language in ("top_layer", "last_layers"):
        return block
    if language == "frozen":
        return 0
    ends = 2 * (d + d) + 2 * (d + key) + 2 * (d + inner) + (inner + d)
    magnitudes = 2 * d + 2 * key + 2 * inner + d if language == "dora" else 0
    return config.num_hidden_layers * (2 * ends + magnitudes)


CHOICES = {
    "frozen": "frozen",
    "full": "full",
    "last_layers": {"method": "last_layers", "n": 1},
    "top_layer": "top_layer",
    "lora": {"method": "lora", "r": 2},
    "dora": {"method": "dora", "r": 2},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("projector", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("language", CHOICES)
@pytest.mark.parametrize("method", ["covft", "lora", "frozen"])
def test_what_trains_is_what_was_asked_for_and_all_comes_back(method, language, projector):
    model = LLAVA.build()
    batch = LLAVA.batch(model, MIXED).inputs
    model.requires_grad_(True)
    before = snapshot(model)
    tuned = covft.tune(
        model,
        method,
        text_encoder=TEXTS,
        tokenizer=LLAVA.tokenizer,
        language=CHOICES[language],
        projector=projector,
    )
    assert (tuned is model) == (language not in ("lora", "dora"))
    found = sizes(tuned)
    assert found["llm"] == expected(model, language)
    assert (found["projector"] > 0) == projector
    assert (found["vision"] + found["experts"] > 0) == (method != "frozen")
    if not sum(found.values()):
        return
    tuned(**batch, labels=batch["input_ids"]).loss.backward()
    assert [name for name, p in tuned.named_parameters() if p.requires_grad and p.grad is None] == []
    assert covft.untune(tuned) is model
    assert_unchanged(model, before, without=CALLED)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("method", ["covft", "lora", "bitfit"])
def test_adapters_of_the_language_model_are_saved_beside_the_tower(method, tmp_path):
    from covft.integrations.building.saving import merged

    torch.manual_seed(0)
    model = LLAVA.build()
    model.save_pretrained(tmp_path / "base")
    batch = LLAVA.batch(model, MIXED).inputs
    tuned = covft.tune(
        model, method, text_encoder=TEXTS, tokenizer=LLAVA.tokenizer, language={"method": "lora", "r": 2}
    )
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        last = tuned(**batch).logits
    tuned.save_pretrained(tmp_path / "tuned")
    for merge in (False, True):
        again, _ = covft.load_model(
            tmp_path / "tuned", TEXTS, base=tmp_path / "base", processor=LLAVA.tokenizer, merge_lora=merge
        )
        with torch.no_grad():
            torch.testing.assert_close(again(**batch).logits, last, rtol=1e-4, atol=1e-5)
    whole = merged(tuned)
    assert whole is model
    with torch.no_grad():
        torch.testing.assert_close(whole(**batch).logits, last, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in whole.named_parameters() if "lora_" in name]
    assert bool(names) == (method == "lora"), "those of the tower stay"
    assert all("vision_tower" in name for name in names)
    get_encoder(whole).save_pretrained(tmp_path / "tower")


def test_a_model_with_adapters_gets_no_second_ones():
    import peft

    model = peft.get_peft_model(LLAVA.build(), peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    with pytest.raises(UnsupportedViTError, match="adapters of peft already"):
        covft.tune(model, "bitfit", language="lora")
    covft.tune(model, "bitfit")
    assert sizes(model)["vision"] > 0

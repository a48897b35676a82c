"""load_model over several devices: the text reaches the tower where it is, and an offloaded tower is refused."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.errors import ConfigError
from tests.helpers.attached import CUP, PEOPLE, attached
from tests.helpers.mllms import BY_NAME, Row

pytestmark = pytest.mark.usefixtures("quiet")
PARTS = {
    "llava": ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"),
    "qwen2_5_vl": ("model.visual", "model.language_model", "lm_head"),
}


@pytest.fixture(params=PARTS)
def saved(request, tmp_path):
    """The name of a model, its folder, a batch, logits and answers."""
    torch.manual_seed(0)
    model, batch = attached(request.param, [Row(1, CUP), Row(1, PEOPLE)], layers=[1, 2])
    model.save_pretrained(tmp_path)
    BY_NAME[request.param].tokenizer.save_pretrained(tmp_path)
    return request.param, tmp_path, batch.inputs, outputs(model, batch.inputs)


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)


def check(folder, batch, wanted, device_map):
    loaded, _ = covft.load_model(folder, device_map=device_map)
    logits, answer = outputs(loaded, batch)
    torch.testing.assert_close(logits, wanted[0])
    assert torch.equal(answer, wanted[1])
    return {name for name, p in loaded.named_parameters() if p.is_meta}


@pytest.mark.long
def test_every_map_answers_as_without_one(saved):
    name, folder, batch, wanted = saved
    assert not check(folder, batch, wanted, "cpu")
    assert not check(folder, batch, wanted, "auto")
    places = dict.fromkeys(PARTS[name], "cpu")
    offloaded = check(folder, batch, wanted, {**places, "model.language_model": "disk"})
    assert offloaded
    assert all(key.startswith("model.language_model.") for key in offloaded)


def test_an_offloaded_tower_is_refused(saved):
    name, folder, *_ = saved
    tower, *others = PARTS[name]
    with pytest.raises(ConfigError, match=rf"offloaded the tower[\s\S]*{tower}.* on the meta device"):
        covft.load_model(folder, device_map={tower: "disk", **dict.fromkeys(others, "cpu")})

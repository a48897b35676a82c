"""transformers' `save_pretrained` is recognised by its code, wherever it is and whatever surrounds it."""

from __future__ import annotations

import functools
import inspect
import types

import pytest
import torch
from torch import nn

import covft
from covft.checkpoints.pretrained import MARK
from covft.errors import UnsupportedVersionError
from covft.integrations.mllm.families import find_tower
from covft.surgery.save_guard import running_save
from covft.testing import HashTextEncoder
from tests.helpers.mllms import BY_NAME
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import BY_NAME as TOWERS
from tests.helpers.towers import perturb

transformers = pytest.importorskip("transformers")

TEXTS = HashTextEncoder(16)
MODEL = transformers.PreTrainedModel
SAVE = MODEL.save_pretrained


def decorated(monkeypatch):
    @functools.wraps(SAVE)
    def save_pretrained(*args, **kwargs):
        return SAVE(*args, **kwargs)

    monkeypatch.setattr(MODEL, "save_pretrained", save_pretrained)


def decorated_twice(monkeypatch):
    decorated(monkeypatch)
    inner = MODEL.save_pretrained

    @functools.wraps(inner)
    def save_pretrained(self, save_directory, **kwargs):
        return inner(self, save_directory, **kwargs)

    monkeypatch.setattr(MODEL, "save_pretrained", save_pretrained)


def moved(monkeypatch):
    inner = inspect.unwrap(SAVE)
    twin = types.FunctionType(inner.__code__, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
    twin.__kwdefaults__ = inner.__kwdefaults__
    twin.__module__, twin.__qualname__ = "transformers.saving", "SavingMixin.save_pretrained"
    monkeypatch.setattr(MODEL, "save_pretrained", twin)


def unchanged(monkeypatch):
    """The save_pretrained of this transformers."""


CHANGES = [unchanged, decorated, decorated_twice, moved]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_mllm__a_wrapped_tower_is_saved_with_its_original_ffns(change, monkeypatch, tmp_path):
    change(monkeypatch)
    model = BY_NAME["llava"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoder = covft.wrap(find_tower(model)[0], TEXTS)
    perturb(encoder)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    found = [set(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    assert found == [set(), {MARK}, set()]
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    adapted = covft.load(tmp_path / "covft", find_tower(loaded)[0], TEXTS).adapted_state_dict()
    assert adapted.keys() == encoder.adapted_state_dict().keys()
    assert all(torch.equal(tensor, adapted[name]) for name, tensor in encoder.adapted_state_dict().items())


def renamed(self, folder, is_main_process=True, state_dict=None, **kwargs):
    """A later save_pretrained whose folder has another name."""


def without_state_dict(self, save_directory, is_main_process=True, **kwargs):
    """A later save_pretrained that takes no state dict by name."""


OTHERS = {"save_directory": renamed, "state_dict": without_state_dict}


@pytest.mark.parametrize("missing", OTHERS)
@pytest.mark.parametrize("tower", ["hf-clip", "hf-siglip", "hf-qwen2.5-vl"])
def test_wrap__refuses_a_save_pretrained_with_other_parameters(tower, missing, monkeypatch):
    vit = TOWERS[tower].build()
    before = snapshot(vit)
    monkeypatch.setattr(MODEL, "save_pretrained", OTHERS[missing])
    with pytest.raises(UnsupportedVersionError, match=r"does not know save_pretrained") as caught:
        covft.wrap(vit, TEXTS)
    assert caught.value.got == f"transformers {transformers.__version__}, without {missing}"
    assert_unchanged(vit, before)


def test_wrap__takes_a_vit_without_save_pretrained_whatever_transformers_is(monkeypatch):
    monkeypatch.setattr(MODEL, "save_pretrained", renamed)
    assert covft.wrap(covft.testing.ToyViT(), 4).layers


class Probe(nn.Module):
    """Runs `running_save` whenever a state dict is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list = []
        self.register_state_dict_post_hook(lambda *_: self.found.append(running_save()))


def test_running_save__tells_the_arguments_of_the_call(tmp_path):
    model = TOWERS["hf-clip"].build()
    model.probe = probe = Probe()
    model.state_dict()
    assert probe.found == [None]
    model.save_pretrained(tmp_path)
    save = probe.found[-1]
    assert (save.model, save.state_dict, save.writes) == (model, None, True)
    assert str(save.directory) == str(tmp_path)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert all(found is None or not found.writes for found in probe.found[2:])
    assert running_save() is None

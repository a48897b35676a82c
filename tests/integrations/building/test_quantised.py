"""load_model with a quantised language model: the adapted tower stays as it is, trains, and is saved again."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import covft
from tests.helpers.attached import CUP, PEOPLE, attached
from tests.helpers.mllms import BY_NAME, Row

pytestmark = pytest.mark.usefixtures("quiet")
# How far the logits of two random layers may move, relative to their norm.
LIBRARIES = {"bitsandbytes-4": 0.5, "bitsandbytes-8": 0.05, "torchao-8": 0.05}


def config_of(library):
    pytest.importorskip(library.partition("-")[0], reason=f"{library} is not installed")
    import transformers

    if library.startswith("bitsandbytes"):
        bits = library[-1]
        return transformers.BitsAndBytesConfig(load_in_4bit=bits == "4", load_in_8bit=bits == "8")
    quantization: Any = importlib.import_module("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def gradients(model, batch):
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.long
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # of bitsandbytes, on float32
def test_the_tower_keeps_its_values_trains_and_is_saved_again(name, library, tmp_path):
    config = config_of(library)
    torch.manual_seed(0)
    model, batch = attached(name, [Row(1, CUP), Row(1, PEOPLE)], layers=[1, 2])
    batch = batch.inputs
    model.save_pretrained(tmp_path / "trained")
    BY_NAME[name].tokenizer.save_pretrained(tmp_path / "trained")
    loaded, processor = covft.load_model(tmp_path / "trained", quantization_config=config)

    kept = dict(model.named_parameters())
    packed = {key for key, p in loaded.named_parameters() if type(p) is not nn.Parameter}
    assert len(packed) == 14, "the linear layers of two blocks of the language model"
    assert all("language_model.layers" in key for key in packed)
    for key, parameter in loaded.named_parameters():
        assert key in packed or torch.equal(parameter, kept[key]), key
    with torch.no_grad():
        before = loaded(**batch).logits
        assert relative(before, model(**batch).logits) < LIBRARIES[library]

    loaded.save_pretrained(tmp_path / "again")
    again, _ = covft.load_model(tmp_path / "again", processor=processor)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, before)

    found, wanted = gradients(loaded, batch), gradients(model, batch)
    encoder = covft.get_encoder(loaded)
    assert all(p.grad is not None for p in encoder.trainable_parameters())
    largest = max(wanted, key=lambda key: wanted[key].norm() if ".experts." in key else 0)
    similarity = torch.cosine_similarity(found[largest].flatten(), wanted[largest].flatten(), dim=0)
    assert similarity > (0.5 if library.endswith("-4") else 0.99)

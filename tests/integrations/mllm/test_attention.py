"""Updates of the tower's attention inside an attached model."""

import pytest
import torch

from covft.integrations import attach, get_encoder, parts_of, train_only
from tests.helpers.attached import MIXED, TEXTS, forward
from tests.helpers.mllms import BY_NAME
from tests.helpers.snapshots import aligned
from tests.helpers.towers import perturb

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_are_saved_beside_the_plain_model_and_are_a_part_of_their_own(name, tmp_path):
    mllm = BY_NAME[name]
    model = mllm.build()
    batch, state = mllm.batch(model, MIXED), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[1, 2], attention_rank=2)
    perturb(get_encoder(model))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    attach(loaded, TEXTS, tokenizer=mllm.tokenizer, pretrained=tmp_path / "covft")
    assert torch.equal(forward(aligned(loaded).eval(), batch)[0], forward(model, batch)[0])

    owner = parts_of(model)
    updates = {name for name, part in owner.items() if part == "attention"}
    assert updates == {name for name in owner if "covft_update" in name}
    counts = train_only(model, ["covft"])
    assert counts["attention"] == sum(model.get_parameter(name).numel() for name in updates)
    train_only(model, ["attention"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == updates
    model(**batch.inputs).logits.square().mean().backward()
    assert any(bool(model.get_parameter(name).grad.any()) for name in updates)

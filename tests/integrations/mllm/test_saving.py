"""Saving attached models, and pipelines with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from covft.errors import (
    CheckpointError,
)
from covft.integrations import attach, detach, get_encoder
from tests.helpers.attached import CUP, MIXED, TEXTS, alone, attached, changed, forward
from tests.helpers.hub import without_repositories
from tests.helpers.mllms import BY_NAME
from tests.helpers.snapshots import aligned
from tests.helpers.towers import perturb
from tests.helpers.watching import watch

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral", "mllama"])
def test_save_pretrained__writes_the_model_as_it_was_and_the_tower_beside_it(name, tmp_path):
    mllm = BY_NAME[name]
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, TEXTS, tokenizer=mllm.tokenizer)
    perturb(get_encoder(model))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name] + 1 if name == "lm_head.weight" else state[name]), name
    attach(loaded, TEXTS, tokenizer=mllm.tokenizer, pretrained=tmp_path / "covft")
    assert torch.equal(forward(aligned(loaded).eval(), batch)[0], forward(model, batch)[0])


def test_save_pretrained__of_a_model_that_was_cast_and_of_a_state_that_was_gathered(tmp_path):
    from safetensors.torch import load_file

    model, _ = attached("internvl")
    model.to(torch.bfloat16)
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    loaded = type(model).from_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    plain = detach(model).state_dict()
    assert loaded.state_dict().keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.state_dict().items())


def test_save_pretrained__what_it_cannot_write_it_refuses(tmp_path):
    model, _ = attached("llava")
    with pytest.raises(CheckpointError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "a", push_to_hub=True)
    with pytest.raises(CheckpointError, match="distributed_checkpoint"):
        model.save_pretrained(tmp_path / "a", distributed_checkpoint=True)
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b" / "covft").exists()


def test_push_to_hub__takes_the_tower_along(monkeypatch):
    from transformers.utils import hub

    model, _ = attached("llava")
    seen: set[str] = set()

    def upload(self, folder, *args, **kwargs):
        seen.update(str(file.relative_to(folder)) for file in Path(folder).rglob("*"))

    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    without_repositories(monkeypatch)
    model.push_to_hub("me/mine")
    assert {"config.json", "model.safetensors", "covft/covft_config.json", "covft/model.safetensors"} <= seen


def test_pipeline__asks_about_a_picture():
    pytest.importorskip("PIL")
    from PIL import Image
    from transformers import CLIPImageProcessor, ImageTextToTextPipeline, LlavaProcessor

    mllm = BY_NAME["llava"]
    model, _ = attached("llava")
    size = {"height": 32, "width": 32}
    tokenizer = copy.deepcopy(mllm.tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # LLaVA takes no types of tokens
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    ask = ImageTextToTextPipeline(model=model, processor=processor)
    vit = get_encoder(model).vit
    picture = Image.new("RGB", (40, 40), "red")
    given = {"text": f"USER: <image>\n{CUP} ASSISTANT:", "max_new_tokens": 2}
    answer, runs = watch(vit, lambda: ask(images=picture, **given))
    assert isinstance(answer[0]["generated_text"], str)
    assert not any(changed(runs[0].features, alone(model, runs[0].images, [CUP])))

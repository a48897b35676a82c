"""The language model sees means of squares of patches, also after loading."""

import json

import pytest
import torch

import covft
from covft.errors import CheckpointError, ConfigError, CoVFTError
from covft.integrations import llava_processor
from covft.integrations.building.pooling import averaged_squares, pool_patches, unpool_patches
from covft.testing import tiny_llava
from tests.helpers.attached import TEXTS

pytestmark = pytest.mark.usefixtures("quiet")


def test_each_square_becomes_its_mean():
    patches = torch.rand(2, 36, 3, dtype=torch.float64)
    grid = patches.view(2, 6, 6, 3)
    expected = [grid[:, y : y + 3, x : x + 3].mean((1, 2)) for y in (0, 3) for x in (0, 3)]
    torch.testing.assert_close(averaged_squares(patches, 3), torch.stack(expected, dim=1))


def test_a_pooled_model_is_saved_and_loaded(tmp_path):
    model, tokenizer = tiny_llava()[:2]
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    for wrong in (0, side + 1, True):
        with pytest.raises(CoVFTError):
            pool_patches(model, wrong)
    pool_patches(model, side)
    with pytest.raises(ConfigError, match="already"):
        pool_patches(model, side)
    covft.attach(model, TEXTS, tokenizer=tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = covft.load_model(tmp_path)
    pixels = torch.rand(1, 3, model.config.vision_config.image_size, model.config.vision_config.image_size)
    messages = [{"role": "user", "content": "<image>\nWhat is it?"}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
    assert (ids == model.config.image_token_id).sum() == 1, "one token for the one square of the picture"
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, pixels).logits, model(ids, pixels).logits)
    unpool_patches(loaded)
    with pytest.raises(ValueError, match="tokens"):
        loaded(ids, pixels)
    with pytest.raises(ConfigError, match="does not pool"):
        unpool_patches(loaded)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ("1", 7, [2]):
        (tmp_path / "config.json").write_text(json.dumps({**config, "covft_pooling": wrong}))
        with pytest.raises(CheckpointError, match="covft_pooling"):
            covft.load_model(tmp_path)


def test_the_processor_writes_one_placeholder_per_square():
    from transformers import CLIPImageProcessor

    model, tokenizer = tiny_llava()[:2]
    vision = model.config.vision_config
    square = {"height": vision.image_size, "width": vision.image_size}
    pool_patches(model, vision.image_size // vision.patch_size)  # of 2 x 2 patches
    processor = llava_processor(model, tokenizer, CLIPImageProcessor(size=square, crop_size=square))
    inputs = processor(images=torch.zeros(3, 50, 40), text="<image>", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 1
    assert model.config.image_seq_length == 1

"""Turns as token ids, by templates that take parts and by those that take strings."""

from __future__ import annotations

import pytest
from PIL import Image

from covft.data.broken import DataError
from covft.errors import ConfigError
from covft.integrations.chat.prompts import Prompts, Turn, as_images
from covft.testing import tiny_llava
from tests.helpers.mllm_configs import SIZE

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))


def processor(tokenizer, template):
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, tokenizer, patch_size=16, chat_template=template, **options)


@pytest.mark.parametrize("own", [True, False])
def test_a_template_of_strings(own):
    tiny = tiny_llava()
    made = Prompts(processor(tiny.tokenizer, tiny.tokenizer.chat_template if own else None))
    inputs = made.inputs([Turn("a cup?", (PICTURE,), "yes"), Turn("a dog?")])
    messages = [
        {"role": "user", "content": f"{tiny.image}\na cup?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "a dog?"},
    ]
    expected = tiny.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tiny.tokenizer.decode(inputs["input_ids"][0]) == expected
    assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE)
    assert "pixel_values" not in made.inputs([Turn("a dog?")])


def test_pictures_are_opened(tmp_path):
    PICTURE.save(tmp_path / "red.png")
    shown = as_images([tmp_path / "red.png", PICTURE.convert("L")])
    assert [image.mode for image in shown] == ["RGB", "RGB"]
    assert shown[0].getpixel((0, 0)) == (200, 30, 30)
    assert as_images(None) == ()
    for wrong in (3, [PICTURE, object()]):
        with pytest.raises(ConfigError, match="not a picture"):
            as_images(wrong)
    for wrong in (tmp_path / "none.png", "https://example.org/red.png"):
        with pytest.raises(DataError):
            as_images(wrong)


def test_a_processor_without_a_template_is_refused():
    tokenizer = tiny_llava().tokenizer
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        Prompts(processor(tokenizer, None))

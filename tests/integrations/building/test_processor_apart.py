"""load_model of a folder without a processor's own files: tokenizer and image processor were saved apart."""

import pytest
import torch

import covft
from covft.errors import ConfigError
from tests.helpers.attached import TEXTS
from tests.tiny.folders import build, picture

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.long]


def saved_apart(family, folder):
    """A model and its processor, whose parts are in the folder."""
    torch.manual_seed(0)
    model, processor = build(family)
    covft.attach(model, TEXTS, tokenizer=processor, layers=[1, 2])
    model.save_pretrained(folder)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return model, processor


def test_internvl_has_as_many_tokens_of_a_picture_as_the_config_says(tmp_path):
    model, processor = saved_apart("internvl", tmp_path)
    loaded, found = covft.load_model(tmp_path)
    assert found.image_seq_length == model.config.image_seq_length == 4, "256 is the default"
    answers = [
        covft.Chat(one, its, max_new_tokens=4, do_sample=False).ask("What colour is it?", image=picture("red"))
        for one, its in ((model, processor), (loaded, found))
    ]
    assert answers[0] == answers[1]


def test_llava_does_not_know_it_and_the_chat_says_what_does(tmp_path):
    saved_apart("llava", tmp_path)
    loaded, found = covft.load_model(tmp_path)
    with pytest.raises(ConfigError, match=r"how many tokens a picture has[\s\S]*llava_processor\(model"):
        covft.Chat(loaded, found)
    whole = covft.integrations.llava_processor(loaded, found.tokenizer, found.image_processor)
    covft.Chat(loaded, whole, max_new_tokens=2).ask("What colour is it?", image=picture("red"))

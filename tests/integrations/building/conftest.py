"""Folders of pretrained parts, and a tokenizer whose vocabulary is larger than their embeddings."""

import copy

import pytest
import torch

from tests.helpers.building import LANGUAGE, LLMS, TOWERS, shaken
from tests.helpers.prompts import tokenizer_of


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of pretrained towers and language models."""
    import transformers

    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    for name, make in TOWERS.items():
        shaken(make(root)[0]).save_pretrained(root / name)
    for name, (config, options) in LLMS.items():
        made = getattr(transformers, config)(**LANGUAGE, **options)
        shaken(transformers.AutoModelForCausalLM.from_config(made)).save_pretrained(root / name)
    return root


@pytest.fixture
def tokenizer():
    tokenizer = copy.deepcopy(tokenizer_of("vicuna"))
    assert len(tokenizer) > LANGUAGE["vocab_size"], "the embeddings have to grow"
    return tokenizer

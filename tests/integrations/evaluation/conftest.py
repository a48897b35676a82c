"""A small LLaVA that was saved with its tower, and the stand-in of VLMEvalKit."""

from pathlib import Path

import pytest
import torch

import covft
from covft.testing import HashTextEncoder, tiny_llava
from tests.helpers.codebases import forget
from tests.helpers.prompts import TEMPLATES

STANDIN = Path(__file__).parent / "standins" / "vlmevalkit"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a LLaVA whose answers depend on the picture and on what its tower is told."""
    import transformers

    torch.manual_seed(0)
    model, tokenizer, _ = tiny_llava(depth=3)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.chat_template = TEMPLATES["llava-hf"].jinja
    covft.attach(model, HashTextEncoder(32), tokenizer=processor, layers=[1])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        for parameter in covft.get_encoder(model).trainable_parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("saved") / "llava"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def run_py():
    """run.py of the stand-in, whose package is gone afterwards."""
    forget("vlmeval")
    yield STANDIN / "run.py"
    forget("vlmeval")

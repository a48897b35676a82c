"""Patches that hold while lmms-eval builds a model; the others are tested with their codebases."""

import accelerate
import transformers

from covft.integrations.codebases.patches import loaded_already, one_process
from covft.testing import tiny_llava


def test_loaded_already__every_way_to_load_gives_the_model(tmp_path):
    model = tiny_llava(depth=2).model
    model.config.save_pretrained(tmp_path)  # no weights
    before = vars(transformers.PreTrainedModel)["from_pretrained"]
    with loaded_already(model):
        for name in ("LlavaForConditionalGeneration", "AutoModelForImageTextToText", "AutoModel"):
            assert getattr(transformers, name).from_pretrained(tmp_path, dtype="bfloat16") is model
    assert vars(transformers.PreTrainedModel)["from_pretrained"] is before


def test_one_process__is_what_accelerate_says():
    before = vars(accelerate.Accelerator)["num_processes"]
    with one_process():
        assert accelerate.Accelerator.num_processes.fget(object()) == 1
    assert vars(accelerate.Accelerator)["num_processes"] is before

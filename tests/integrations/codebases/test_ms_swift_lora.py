"""ms-swift's `--tuner_type covft_lora`: LoRA on the language model beside the tower."""

import sys

import pytest
import torch

import covft
from covft.checkpoints.trained import read_names
from covft.errors import CheckpointError, ConfigError
from covft.integrations.mllm.attachment import attachment_of
from covft.integrations.training.checkpoints import seal
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.ms_swift import Template, arguments, as_loaded, model_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5.0")

ROWS = [Row(1, "what is left of the cup?"), Row(2, "how many people are there?")]


@pytest.fixture
def tuner(swift_tuners):
    return swift_tuners["covft_lora"]


def change(model):
    """Change everything that is trained, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model, kind):
    torch.manual_seed(7)
    batch = kind.batch(model_of(kind), ROWS).inputs
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize(
    "targets", [["all-linear"], ["q_proj", "fc1", "linear_1"], r".*(vision_tower|language_model).*\.(q_proj|fc1)"]
)
@pytest.mark.parametrize("freeze_aligner", [False, True])
def test_lora_is_on_the_language_model_alone(tuner, swift_tuners, swift_llava, targets, freeze_aligner):
    args = arguments(freeze_aligner=freeze_aligner, freeze_vit=False, target_modules=targets, lora_rank=2)
    model = tuner.prepare_model(args, model_of(swift_llava))
    assert isinstance(model, peft.PeftModel)
    assert args.tuner_type == "covft"  # theirs is left as it was
    lora = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert lora
    assert lora <= trained(model)
    assert all(".language_model." in name for name in lora)
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name} == {2}

    without = model_of(swift_llava)
    swift_tuners["covft"].prepare_model(arguments(freeze_llm=True, freeze_aligner=freeze_aligner), without)
    assert {name.removeprefix("base_model.model.") for name in trained(model) - lora} == trained(without)


def test_the_start_is_the_plain_model(tuner, swift_llava):
    before = logits(model_of(swift_llava), swift_llava)
    model = tuner.prepare_model(arguments(), model_of(swift_llava))
    torch.testing.assert_close(logits(model, swift_llava), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("freeze_aligner", [False, True])
def test_saved_and_loaded(tuner, swift_llava, tmp_path, gathered, freeze_aligner):
    model = tuner.prepare_model(arguments(freeze_aligner=freeze_aligner), model_of(swift_llava))
    change(model)
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    tuner.save_pretrained(model, str(tmp_path), state_dict=state if gathered else None)
    names = read_names(tmp_path / "covft" / "trained.json")["names"]
    assert any("projector" in name for name in names) != freeze_aligner
    expected = logits(model, swift_llava)

    again = tuner.from_pretrained(model_of(swift_llava), str(tmp_path))
    assert torch.equal(logits(again, swift_llava), expected)
    assert not any("lora_" in name or "projector" in name for name in trained(again))
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        tuner.from_pretrained(model_of(swift_llava), str(tmp_path), is_trainable=True)
    seal(tmp_path, step=1)
    resumed = tuner.from_pretrained(model_of(swift_llava), str(tmp_path), is_trainable=True)
    assert trained(resumed) == trained(model)


@pytest.mark.parametrize("name", ["covft", "covft_lora"])
def test_a_projector_inside_the_tower_is_trained_and_saved(swift_tuners, monkeypatch, tmp_path, name):
    kind, tuner = BY_NAME["qwen2_5_vl"], swift_tuners[name]
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *args, **kwargs: kind.tokenizer)
    frozen = tuner.prepare_model(arguments(), model_of(kind))
    model = tuner.prepare_model(arguments(freeze_aligner=False), model_of(kind))
    merger = {name for name, _ in model.named_parameters() if ".merger." in name}
    assert merger
    assert trained(model) - trained(frozen) == merger
    assert not any("lora_" in name and ".visual." in name for name in trained(model))
    change(model)
    tuner.save_pretrained(model, str(tmp_path))
    again = tuner.from_pretrained(model_of(kind), str(tmp_path))
    assert torch.equal(logits(again, kind), logits(model, kind))


def test_plain_peft_reads_the_adapter(tuner, swift_llava, tmp_path):
    model = tuner.prepare_model(arguments(freeze_aligner=True), model_of(swift_llava))
    change(model)
    tuner.save_pretrained(model, str(tmp_path))
    plain = peft.PeftModel.from_pretrained(model_of(swift_llava), str(tmp_path))
    covft.attach(plain, tokenizer=swift_llava.tokenizer, pretrained=tmp_path / "covft")
    assert torch.equal(logits(plain, swift_llava), logits(model, swift_llava))


def test_merged(tuner, swift_llava, tmp_path):
    """As `swift export --merge_lora` does, and `swift infer --model MERGED --adapters MERGED`."""
    model = tuner.prepare_model(arguments(freeze_aligner=False), model_of(swift_llava))
    change(model)
    expected = logits(model, swift_llava)
    sys.modules["swift.tuners"].Swift.merge_and_unload(model)
    model.model.save_pretrained(tmp_path)

    plain = as_loaded(transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match="is run with the original one"):
        Template().pre_forward_hook(plain, (), {})
    with pytest.raises(ConfigError, match="would start from the original one"):
        tuner.prepare_model(arguments(), plain)
    with pytest.raises(CheckpointError, match="not saved by the tuner covft_lora"):
        tuner.from_pretrained(plain, str(tmp_path), is_trainable=True)
    assert attachment_of(plain) is None
    again = tuner.from_pretrained(plain, str(tmp_path))
    torch.testing.assert_close(logits(again, swift_llava), expected, rtol=1e-4, atol=1e-4)


def test_merging_without_lora_is_refused(swift_tuners, swift_llava):
    model = swift_tuners["covft"].prepare_model(arguments(), model_of(swift_llava))
    with pytest.raises(ConfigError, match="no LoRA to merge"):
        sys.modules["swift.tuners"].Swift.merge_and_unload(model)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"freeze_llm": True}, "--freeze_llm true"),
        ({"lora_bias": "all"}, "--lora_bias all"),
        ({"tuner_backend": "unsloth"}, "--tuner_backend unsloth"),
        ({"use_swift_lora": True}, "--use_swift_lora true"),
        ({"init_weights": "lora-ga"}, "--init_weights lora-ga"),
        ({"modules_to_save": ["layer_norm1"]}, "layer_norm1"),
        ({"modules_to_save": ["linear_2"]}, "linear_2"),
    ],
)
def test_what_would_reach_the_tower_is_refused(tuner, swift_llava, given, named):
    model = model_of(swift_llava)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match=named):
        tuner.prepare_model(arguments(**given), model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_modules_of_the_language_model_are_trained_and_saved(tuner, swift_llava, tmp_path):
    model = tuner.prepare_model(arguments(modules_to_save=["embed_tokens"]), model_of(swift_llava))
    change(model)
    tuner.save_pretrained(model, str(tmp_path))
    again = tuner.from_pretrained(model_of(swift_llava), str(tmp_path))
    assert torch.equal(logits(again, swift_llava), logits(model, swift_llava))


def test_a_folder_of_plain_lora_is_refused(tuner, swift_llava, tmp_path):
    lora = peft.LoraConfig(target_modules=r".*language_model.*q_proj")
    peft.get_peft_model(model_of(swift_llava), lora).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not saved by the tuner covft_lora"):
        tuner.from_pretrained(model_of(swift_llava), str(tmp_path))

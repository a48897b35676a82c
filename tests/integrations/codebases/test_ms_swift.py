"""ms-swift: the plug-in, driven as its pipelines drive tuners and templates; modules of its names stand in for it."""

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import covft
from covft.errors import CheckpointError
from covft.integrations.codebases import ms_swift
from covft.testing import HashTextEncoder
from tests.helpers.mllms import MLLMS, Row
from tests.helpers.towers import image_features

transformers = pytest.importorskip("transformers", minversion="5.0")

ROWS = [Row(1, "what is left of the cup?"), Row(0, "who are you?"), Row(2, "how many people are there?")]
FLAGS = "--covft_text_encoder hash:16 --covft_layers 1-2"


class Template:
    """The part of swift.template.Template that a tower may be run in."""

    def pre_forward_hook(self, model, args, kwargs):
        old, kwargs = kwargs, self._post_encode(model, kwargs)
        for name in ("input_ids", "attention_mask", "labels"):
            if name in old and name not in kwargs:
                kwargs[name] = old[name]
        if "inputs_embeds" in kwargs:
            kwargs.pop("input_ids", None)
        assert "input_ids" in inspect.signature(model.forward).parameters
        return args, kwargs

    def _post_encode(self, model, inputs):
        return inputs

    def register_post_encode_hook(self, models):
        for model in models:
            model.register_forward_pre_hook(self.pre_forward_hook, with_kwargs=True)


class EmbeddingTemplate(Template):
    """Runs the tower before the model's forward, as theirs for InternVL does."""

    def _post_encode(self, model, inputs):
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        if inputs.get("pixel_values") is None:
            dummy = image_features(model.get_image_features(pixel_values=torch.zeros(1, 3, 32, 32)))
            dummy = dummy if isinstance(dummy, torch.Tensor) else torch.cat(list(dummy))
            return {"inputs_embeds": embeds + dummy.mean() * 0.0}
        features = image_features(model.get_image_features(pixel_values=inputs["pixel_values"]))
        mask = (inputs["input_ids"] == model.config.image_token_id)[..., None].expand_as(embeds)
        features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
        return {"inputs_embeds": embeds.masked_scatter(mask, features.to(embeds))}


@pytest.fixture
def plugin(monkeypatch):
    """What `--external_plugins` does with the file."""
    swift, tuner_plugin, template = (ModuleType(name) for name in ("swift", "swift.tuner_plugin", "swift.template"))
    tuner_plugin.Tuner = type("Tuner", (), {})
    tuner_plugin.tuners_map = {}
    template.Template = type("Template", (Template,), {"pre_forward_hook": Template.pre_forward_hook})
    for module in (swift, tuner_plugin, template):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Template, "pre_forward_hook", Template.pre_forward_hook)
    template.Template = Template
    monkeypatch.setenv("COVFT_FLAGS", FLAGS)
    file = Path(ms_swift.__file__).parent / "covft_plugin.py"
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.delitem(sys.modules, "covft_plugin", raising=False)
    module = importlib.import_module("covft_plugin")
    assert tuner_plugin.tuners_map == {"covft": module.CovftTuner}
    assert issubclass(module.CovftTuner, tuner_plugin.Tuner)
    return tuner_plugin.tuners_map["covft"]


@pytest.fixture
def mllm(monkeypatch):
    """A LLaVA of transformers, as ms-swift hands models over, and its processor, wherever that is asked for."""
    kind = next(entry for entry in MLLMS if entry.name == "llava")
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *args, **kwargs: kind.tokenizer)
    return kind


def model_of(kind):
    torch.manual_seed(6)
    model = kind.build()
    architecture = {"language_model": ["model.language_model", "lm_head"], "aligner": ["model.multi_modal_projector"]}
    model.model_meta = SimpleNamespace(model_arch=SimpleNamespace(**architecture, vision_tower=["model.vision_tower"]))
    model.model_info = SimpleNamespace(model_dir="somewhere")
    return model


ARGUMENTS = {"freeze_llm": False, "freeze_aligner": False}


def test_what_is_trained(plugin, mllm):
    for freeze_llm, freeze_aligner in [(False, False), (True, False), (False, True), (True, True)]:
        model = model_of(mllm)
        arguments = SimpleNamespace(freeze_llm=freeze_llm, freeze_aligner=freeze_aligner)
        assert plugin.prepare_model(arguments, model) is model
        tower = {id(p) for p in covft.get_encoder(model).vit.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in tower:
                continue
            frozen = freeze_aligner if "projector" in name else freeze_llm
            assert parameter.requires_grad != frozen, name
        assert list(covft.get_encoder(model).trainable_parameters())
        assert covft.get_encoder(model).layers == (1, 2)


@pytest.mark.parametrize("template", [Template, EmbeddingTemplate])
def test_the_text_is_there_wherever_the_template_runs_the_tower(plugin, mllm, template):
    model = model_of(mllm)
    batch = mllm.batch(model, ROWS)
    before = model(**batch.inputs).logits
    plugin.prepare_model(SimpleNamespace(**ARGUMENTS), model)
    encoder = covft.get_encoder(model)
    template().register_post_encode_hook([model])
    torch.testing.assert_close(model(**batch.inputs).logits, before, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        for name, parameter in encoder.vit.named_parameters():
            if ".experts." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.train()
    labels = batch.inputs["input_ids"]
    output = model(**batch.inputs, labels=labels)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.trainable_parameters())
    texts = [row.question for row in ROWS]
    with encoder.condition(texts, torch.tensor(batch.row_of_tile)):
        torch.testing.assert_close(model(**batch.inputs).logits, output.logits)


def test_a_batch_of_text_alone(plugin, mllm):
    model = plugin.prepare_model(SimpleNamespace(**ARGUMENTS), model_of(mllm))
    EmbeddingTemplate().register_post_encode_hook([model])
    model.train()
    ids = mllm.tokenizer([ROWS[1].question], return_tensors="pt", add_special_tokens=False)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in covft.get_encoder(model).trainable_parameters())


@pytest.mark.parametrize("gathered", [False, True])
def test_saved_and_loaded(plugin, mllm, tmp_path, gathered):
    model = plugin.prepare_model(SimpleNamespace(freeze_llm=True, freeze_aligner=False), model_of(mllm))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    plugin.save_pretrained(model, str(tmp_path), state_dict=trained if gathered else None)
    batch = mllm.batch(model_of(mllm), ROWS).inputs
    expected = model.eval()(**batch).logits

    again = plugin.from_pretrained(model_of(mllm), str(tmp_path)).eval()
    torch.testing.assert_close(again(**batch).logits, expected)
    assert not any("projector" in name and p.requires_grad for name, p in again.named_parameters())
    resumed = plugin.from_pretrained(model_of(mllm), str(tmp_path), is_trainable=True)
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == set(trained)
    with pytest.raises(CheckpointError, match="not saved by the tuner"):
        plugin.from_pretrained(model_of(mllm), str(tmp_path / "covft" / "nowhere"))


def test_a_model_of_other_shapes_is_refused(plugin, mllm, tmp_path):
    model = plugin.prepare_model(SimpleNamespace(**ARGUMENTS), model_of(mllm))
    plugin.save_pretrained(model, str(tmp_path))
    other = model_of(mllm)
    other.resize_token_embeddings(other.get_input_embeddings().num_embeddings + 8)
    with pytest.raises(CheckpointError, match="other shapes"):
        plugin.from_pretrained(other, str(tmp_path))


def test_flags(plugin, mllm, monkeypatch):
    flags = "--covft_text_encoder hash:16 --covft_routing sparse --covft_chat_template chatml"
    monkeypatch.setenv("COVFT_FLAGS", f"{flags} --covft_empty_instruction nothing")
    model = plugin.prepare_model(SimpleNamespace(**ARGUMENTS), model_of(mllm))
    assert covft.get_encoder(model).covft_config.routing == "sparse"
    assert isinstance(covft.get_encoder(model).text_encoder, HashTextEncoder)
    assert model.forward.attachment.reader.empty_instruction == "nothing"

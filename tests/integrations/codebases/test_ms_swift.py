"""ms-swift: the plug-in, driven as its pipelines drive tuners and templates; modules of its names stand in for it."""

import pytest
import torch

import covft
from covft.errors import CheckpointError
from covft.integrations.training.checkpoints import seal
from covft.testing import HashTextEncoder
from covft.utils.transformers_names import training_field
from tests.helpers.mllms import Row
from tests.helpers.ms_swift import EmbeddingTemplate, Template, arguments, model_of

transformers = pytest.importorskip("transformers", minversion="5.0")

ROWS = [Row(1, "what is left of the cup?"), Row(0, "who are you?"), Row(2, "how many people are there?")]


@pytest.fixture
def plugin(swift_tuners):
    """The tuner without LoRA."""
    assert sorted(swift_tuners) == ["covft", "covft_lora"]
    return swift_tuners["covft"]


@pytest.fixture
def mllm(swift_llava):
    return swift_llava


ARGUMENTS = arguments(freeze_aligner=False)


def test_what_is_trained(plugin, mllm):
    for freeze_llm, freeze_aligner in [(False, False), (True, False), (False, True), (True, True)]:
        model = model_of(mllm)
        given = arguments(freeze_llm=freeze_llm, freeze_aligner=freeze_aligner)
        assert plugin.prepare_model(given, model) is model
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
    plugin.prepare_model(ARGUMENTS, model)
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
    model = plugin.prepare_model(ARGUMENTS, model_of(mllm))
    EmbeddingTemplate().register_post_encode_hook([model])
    model.train()
    ids = mllm.tokenizer([ROWS[1].question], return_tensors="pt", add_special_tokens=False)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in covft.get_encoder(model).trainable_parameters())


@pytest.mark.parametrize("gathered", [False, True])
def test_saved_and_loaded(plugin, mllm, tmp_path, gathered):
    model = plugin.prepare_model(arguments(freeze_llm=True, freeze_aligner=False), model_of(mllm))
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
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        plugin.from_pretrained(model_of(mllm), str(tmp_path), is_trainable=True)
    seal(tmp_path, step=1)
    resumed = plugin.from_pretrained(model_of(mllm), str(tmp_path), is_trainable=True)
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == set(trained)
    with pytest.raises(CheckpointError, match="not saved by the tuner"):
        plugin.from_pretrained(model_of(mllm), str(tmp_path / "covft" / "nowhere"))


def test_a_model_of_other_shapes_is_refused(plugin, mllm, tmp_path):
    model = plugin.prepare_model(ARGUMENTS, model_of(mllm))
    plugin.save_pretrained(model, str(tmp_path))
    other = model_of(mllm)
    other.resize_token_embeddings(other.get_input_embeddings().num_embeddings + 8)
    with pytest.raises(CheckpointError, match="other shapes"):
        plugin.from_pretrained(other, str(tmp_path))


def test_flags(plugin, mllm, monkeypatch):
    flags = "--covft_text_encoder hash:16 --covft_routing sparse --covft_chat_template chatml"
    monkeypatch.setenv("COVFT_FLAGS", f"{flags} --covft_empty_instruction nothing")
    model = plugin.prepare_model(ARGUMENTS, model_of(mllm))
    assert covft.get_encoder(model).covft_config.routing == "sparse"
    assert isinstance(covft.get_encoder(model).text_encoder, HashTextEncoder)
    assert model.forward.attachment.reader.empty_instruction == "nothing"


def trainer_of(mllm, model, folder, **settings):
    """A Trainer as ms-swift constructs it, on one batch."""
    batch = mllm.batch(model_of(mllm), ROWS).inputs
    batch["labels"] = batch["input_ids"]
    settings = {"report_to": "none", "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True, **settings}
    args = transformers.TrainingArguments(str(folder), **settings)
    return transformers.Trainer(model, args, train_dataset=[{"row": 0}] * 64, data_collator=lambda rows: dict(batch))


def trained_in_tower(model):
    return {n: p for n, p in covft.get_encoder(model).vit.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["covft", "covft_lora"])
def test_a_run_in_half_precision_continues_with_the_float32_values_of_its_tower(swift_tuners, mllm, tmp_path, name):
    tuner = swift_tuners[name]
    if name == "covft_lora":
        pytest.importorskip("peft")
    model = tuner.prepare_model(ARGUMENTS, model_of(mllm).bfloat16())
    trainer_of(mllm, model, tmp_path / "run")
    tower = trained_in_tower(model)
    assert {p.dtype for p in tower.values()} == {torch.float32}
    with torch.no_grad():
        for parameter in tower.values():
            parameter.mul_(1 + 1e-4)  # less than a step of bfloat16
    tuner.save_pretrained(model, str(tmp_path))
    seal(tmp_path, step=1)
    again = tuner.from_pretrained(model_of(mllm).bfloat16(), str(tmp_path), is_trainable=True)
    trainer_of(mllm, again, tmp_path / "run")
    found = trained_in_tower(again)
    assert found.keys() == tower.keys()
    assert all(torch.equal(found[name], tower[name]) for name in tower)


def test_checkpointing_is_not_reentrant(plugin, mllm, tmp_path):
    """ms-swift's default is."""
    name = training_field()
    model = plugin.prepare_model(ARGUMENTS, model_of(mllm))
    trainer = trainer_of(mllm, model, tmp_path, **{name: True})
    assert getattr(trainer.args, f"{name}_kwargs") == {"use_reentrant": False}


@pytest.mark.slow
def test_a_resumed_run_is_watched(plugin, mllm, tmp_path):
    model = plugin.prepare_model(ARGUMENTS, model_of(mllm))
    plugin.save_pretrained(model, str(tmp_path))
    seal(tmp_path, step=1)
    again = plugin.from_pretrained(model_of(mllm), str(tmp_path), is_trainable=True)
    trainer = trainer_of(mllm, again, tmp_path / "run", learning_rate=0.0, max_steps=10, save_strategy="no")
    with pytest.warns(UserWarning, match="Few elements have changed in 10 optimizer steps"):
        trainer.train()


def test_a_model_that_is_not_attached_is_trained_as_ever(swift_tuners, mllm, tmp_path):
    before = len(trainer_of(mllm, model_of(mllm), tmp_path).callback_handler.callbacks)
    model = swift_tuners["covft"].prepare_model(ARGUMENTS, model_of(mllm))
    assert len(trainer_of(mllm, model, tmp_path).callback_handler.callbacks) == before + 1

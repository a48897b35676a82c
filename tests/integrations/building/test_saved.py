"""load_model: a saved multimodal LLM comes back attached, as it was trained."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import covft
from covft.checkpoints.pretrained import MARK
from covft.errors import CheckpointError, ConfigError
from covft.integrations import MLLMTrainer, train_only
from tests.helpers.attached import CUP, PEOPLE, TEXTS
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.releases import untied
from tests.helpers.snapshots import aligned
from tests.helpers.towers import perturb
from tests.helpers.training import arguments, dataset, write_folder

pytestmark = pytest.mark.usefixtures("quiet")
ROOT = Path(covft.__file__).parents[1]
READING = {"turns": "first", "system": "You help.", "empty_instruction": "Describe it."}
LORA = r".*language_model.*\.(q|v)_proj"


def trained(name, folder=None):
    """An attached model after a few real steps, and a batch; saved with its tokenizer."""
    mllm = BY_NAME[name]
    model = mllm.build()
    batch = mllm.batch(model, [Row(1, CUP), Row(1, PEOPLE)]).inputs
    covft.attach(model, TEXTS, tokenizer=mllm.tokenizer, layers=[1, 2], **READING)
    perturb(covft.get_encoder(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    if folder is not None:
        model.save_pretrained(folder)
        mllm.tokenizer.save_pretrained(folder)
    return model, batch


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)


def assert_same(one, other, batch):
    for ours, theirs in zip(outputs(aligned(one), batch), outputs(other, batch), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl"])
def test_it_is_the_model_that_was_saved(name, tmp_path):
    model, batch = trained(name, tmp_path)
    loaded, processor = covft.load_model(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same(loaded, model, batch)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert covft.get_encoder(loaded).reading == READING, "inference sees what training saw"
    assert processor.get_vocab() == BY_NAME[model.config.model_type].tokenizer.get_vocab()
    # The plain model is another one, and transformers says so.
    plain, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {MARK}
    assert not torch.equal(outputs(plain, batch)[0], outputs(model, batch)[0])


@pytest.mark.long
def test_a_fresh_process_loads_it(tmp_path):
    model, batch = trained("llava", tmp_path)
    torch.save((batch, outputs(model, batch)), tmp_path / "expected.pt")
    code = """
import sys, torch, covft
from tests.helpers.snapshots import aligned
model, processor = covft.load_model(sys.argv[1])
aligned(model)
batch, (logits, answer) = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    assert torch.equal(model(**batch).logits, logits)
assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), answer)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transformers_warns_of_the_mark_and_covft_does_not(tmp_path, caplog):
    from transformers.utils import logging as of_transformers

    model, _ = trained("llava", tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    of_transformers.set_verbosity_warning()  # the default, which the fixture put back afterwards
    try:
        covft.load_model(tmp_path)
        assert "covft.load_model" not in caplog.text
        type(model).from_pretrained(tmp_path)
        assert "the_adapted_tower_is_not_loaded.see_covft.load_model" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_only_what_was_tuned_around_a_tower_has_the_mark(tmp_path):
    from safetensors.torch import load_file

    model, _ = trained("llava", tmp_path / "attached")
    covft.detach(model).save_pretrained(tmp_path / "plain")
    encoder = covft.wrap(model.model.vision_tower, TEXTS)
    model.save_pretrained(tmp_path / "wrapped")
    encoder.vit.save_pretrained(tmp_path / "tower")
    found = {path.name: MARK in load_file(path / "model.safetensors") for path in tmp_path.iterdir()}
    assert found == {"attached": True, "plain": False, "wrapped": True, "tower": False}


def test_a_model_that_was_given_its_texts_reads_none(tmp_path):
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, [Row(1, CUP)]).inputs
    covft.attach(model, TEXTS, tokenizer=None)
    model.save_pretrained(tmp_path)
    loaded, _ = covft.load_model(tmp_path, processor=mllm.tokenizer)
    with pytest.raises(covft.errors.MissingContextError):
        loaded(**batch)
    loaded(**batch, context_text=CUP)


def test_dtype_text_encoder_and_attention_are_the_callers(tmp_path):
    _, batch = trained("llava", tmp_path)
    loaded, _ = covft.load_model(
        tmp_path, TEXTS, dtype=torch.bfloat16, attn_implementation="eager", device_map={"": "cpu"}
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.vision_tower.config._attn_implementation == "eager"
    assert covft.get_encoder(loaded).text_encoder is TEXTS
    assert outputs(loaded, {**batch, "pixel_values": batch["pixel_values"].bfloat16()})[0].isfinite().all()


def write_text_encoder(folder):
    """A small model of texts, whose tokenizer spells bytes."""
    from transformers import BertConfig, BertModel

    tokenizer = BY_NAME["llava"].tokenizer
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(**small, vocab_size=len(tokenizer), max_position_embeddings=128))
    for parameter in bert.parameters():  # the usual 0.02 would make all texts alike
        torch.nn.init.normal_(parameter, std=0.3)
    bert.save_pretrained(folder)


def test_a_text_encoder_in_the_folder_is_found(tmp_path):
    write_text_encoder(tmp_path / "bert")
    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, [Row(1, CUP), Row(1, PEOPLE)]).inputs
    covft.attach(model, f"{tmp_path / 'bert'}?pooling=mean", tokenizer=mllm.tokenizer)
    perturb(covft.get_encoder(model))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    mllm.tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="was in a folder of the machine that saved"):
        covft.load_model(folder)
    (tmp_path / "bert").rename(folder / "text_encoder")
    assert_same(covft.load_model(folder)[0], model, batch)  # so its pooling is that of training
    config = json.loads((folder / "covft" / "covft_config.json").read_text())
    edit(folder / "covft" / "covft_config.json", text={**config["text"], "source": "local:bert?cache_dir=x"})
    with pytest.raises(CheckpointError, match="cache_dir"):
        covft.load_model(folder)


# ------------------------------------------------------------------------------- a trainer's checkpoints


def checkpoint(tmp_path, *, lora):
    """The checkpoint of a run that trains projector, language model (or LoRA on it) and tower; and its model."""
    torch.manual_seed(0)
    model = BY_NAME["llava"].build()
    base = tmp_path / "base"
    model.save_pretrained(base)
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=LORA))
    covft.attach(model, TEXTS, tokenizer=BY_NAME["llava"].tokenizer, layers=[1, 2], feature_layer=-2)
    perturb(covft.get_encoder(model))
    train_only(model, ["projector", "llm", "covft"])
    rows = dataset(write_folder(tmp_path / "data"))
    args = arguments(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    MLLMTrainer(model, args, train_dataset=rows, processing_class=rows.tokenizer).train()
    mllm = BY_NAME["llava"]
    batch = mllm.batch(mllm.build(), [Row(1, CUP), Row(1, PEOPLE)]).inputs
    return model.eval(), batch, base, tmp_path / "run" / "checkpoint-2"


def test_a_checkpoint_of_the_trainer(tmp_path):
    model, batch, _, folder = checkpoint(tmp_path, lora=False)
    assert_same(covft.load_model(folder)[0], model, batch)


@untied
def test_a_checkpoint_with_lora_on_its_base(tmp_path):
    model, batch, base, folder = checkpoint(tmp_path, lora=True)
    loaded, _ = covft.load_model(folder, base=base)
    assert_same(loaded, model, batch)
    given = type(model.get_base_model()).from_pretrained(base)
    merged, _ = covft.load_model(folder, base=given, merge_lora=True)
    assert merged is given
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(outputs(merged, batch)[0], outputs(model, batch)[0], rtol=1e-4, atol=1e-4)
    # The base may lie inside the folder, but a path elsewhere is not followed.
    config = json.loads((folder / "adapter_config.json").read_text())
    for named, loads in ((str(base), False), ("../../base", False), ("base", True)):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        if loads:
            base.rename(folder / "base")
            assert_same(covft.load_model(folder)[0], model, batch)
        else:
            with pytest.raises(ConfigError, match="does not name its base model by an id"):
                covft.load_model(folder)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "megatron_config": {"a": 1}}))
    with pytest.raises(CheckpointError, match=r"names modules to import[\s\S]*megatron_config"):
        covft.load_model(folder, base=folder / "base")


def test_a_quantised_language_model_leaves_tower_and_projector_alone(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    _, batch = trained("llava", tmp_path)
    loaded, _ = covft.load_model(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    packed = {name for name, p in loaded.named_parameters() if not p.is_floating_point()}
    assert packed
    assert all("language_model.layers" in name for name in packed)
    assert outputs(loaded, batch)[0].isfinite().all()


# --------------------------------------------------------------------------------------- what is refused


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def test_a_folder_without_a_tower_says_so(tmp_path):
    mllm = BY_NAME["llava"]
    mllm.build().save_pretrained(tmp_path / "plain")
    for folder, got in ((tmp_path / "plain", "config.json"), (tmp_path / "none", "no such folder")):
        with pytest.raises(CheckpointError, match=rf"has no adapted tower[\s\S]*{got}"):
            covft.load_model(folder)
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        covft.load_model("nobody/nothing")


def test_no_code_of_the_folder_runs(tmp_path):
    trained("llava", tmp_path)
    flag = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(flag)!r}, 'w').close()\nclass Evil: pass\n")
    edit(
        tmp_path / "config.json",
        auto_map=dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageTextToText"), "evil.Evil"),
        trust_remote_code=True,
    )
    edit(tmp_path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    (tmp_path / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.Evil"}}))
    covft.load_model(tmp_path)
    assert not flag.exists()
    edit(tmp_path / "config.json", model_type="evil")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        covft.load_model(tmp_path)
    assert not flag.exists()
    edit(tmp_path / "config.json", model_type="llava", vision_config={"attn_implementation": {"": "evil/kernel"}})
    with pytest.raises(CheckpointError, match="asks for code or weights of somewhere else"):
        covft.load_model(tmp_path)


def test_what_is_missing_or_damaged_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    trained("llava", tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    [lost] = [name for name in tensors if name.endswith("linear_1.bias")]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: .*linear_1\.bias"):
        covft.load_model(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        covft.load_model(tmp_path)
    for reading in ({"turns": 3}, {"new": "x"}, [1]):
        edit(tmp_path / "covft" / "covft_config.json", reading=reading)
        with pytest.raises(CheckpointError, match="settings of the prompt reader"):
            covft.load_model(tmp_path)
    edit(tmp_path / "covft" / "covft_config.json", reading=READING)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"no processor and no tokenizer[\s\S]*processor=processor"):
        covft.load_model(tmp_path)


def test_every_option_of_attach_about_the_text_is_restored():
    """An option that is added to `attach` is one of the tower's, which has them, or of the reader's settings."""
    import inspect

    from covft.integrations.mllm.prompt import PromptReader

    options = set(inspect.signature(covft.attach).parameters)
    tower = {"model", "text_encoder", "tokenizer", "pretrained", "config", "adapter"}
    fields = set(covft.CoVFTConfig.__dataclass_fields__)
    assert options - tower - fields == set(PromptReader(None).settings)

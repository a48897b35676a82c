"""The launcher of LLaVA and LLaVA-NeXT: it runs their training and evaluation, which stand-ins play."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import covft
from covft.errors import (
    CheckpointError,
    ConfigError,
    LayerIndexError,
    ReentrantCheckpointError,
)
from covft.integrations.codebases import llava as launcher
from covft.integrations.training.reentrant import without_reentrant
from tests.helpers.codebases import SIZE, STANDINS, tokenizer_for
from tests.helpers.llava_code import QUESTIONS, batch_of

transformers = pytest.importorskip("transformers")
CHECKPOINTING = "activation_checkpointing"
if not hasattr(transformers.TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"
CLIP_WARNING = "ignore:.*:UserWarning"  # of transformers, about configs of stand-ins


def run(llava_home, *flags, script="llava.train.train_mem", covft_flags=(), steps=2, **replaced):
    arguments = {
        "model_name_or_path": llava_home / "vicuna",
        "version": "v1",
        "vision_tower": llava_home / "clip",
        "mm_vision_select_layer": -2,
        "data_path": llava_home / "data.json",
        "output_dir": llava_home / "out",
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
        **replaced,
    }
    theirs = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    ours = ["--covft_text_encoder", "hash:16", "--covft_layers", "1-2", *covft_flags]
    launcher.main([*ours, "--", script, *theirs, *flags])


def evaluate(llava_home, *covft_flags, folder="out"):
    torch.manual_seed(9)
    torch.save(torch.randn(1, 3, SIZE, SIZE), llava_home / "image.pt")
    arguments = ["--model-path", llava_home / folder, "--question", QUESTIONS[0]]
    arguments += ["--image-file", llava_home / "image.pt", "--answers-file", llava_home / "answers.pt"]
    launcher.main([*covft_flags, "--", "llava.eval.model_vqa_loader", *map(str, arguments)])
    return torch.load(llava_home / "answers.pt")


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_training_moves_what_should_be_trained(llava_code, llava_home, trainers, monkeypatch):
    reported = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        reported.append(dict(logs))

    monkeypatch.setattr(transformers.trainer_callback.PrinterCallback, "on_log", on_log)
    before = transformers.Trainer.__init__
    run(llava_home, f"--{CHECKPOINTING}", "True", "--logging_steps", "1", steps=3)
    (trainer,) = trainers
    assert transformers.Trainer.__init__ is before
    assert getattr(trainer.args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}
    moved = {name for name in trainer.start if not torch.equal(trainer.start[name], trainer.end[name])}
    encoder = covft.get_encoder(trainer.model)
    prefix = "model.vision_tower.vision_tower."
    trained = {prefix + name for name, p in encoder.vit.named_parameters() if p.requires_grad}
    assert {name for name in moved if name.startswith(prefix)} == trained
    assert {"lm_head.weight", "model.mm_projector.weight"} <= moved
    logged = next(entry for entry in reported if "loss" in entry)
    assert 0 < logged["covft/routing_entropy"] <= math.log(4) + 1e-6
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in encoder.trainable_parameters()} <= in_optimizer


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_a_tower_in_bfloat16_learns_at_their_rate(llava_code, llava_home, trainers, capsys):
    """Their code casts the tower to bfloat16, where nearly all steps of 2e-5 would be rounded away."""
    flags = ["--bf16", "True", "--save_strategy", "no"]
    run(llava_home, *flags, steps=10, learning_rate=2e-5)
    (trainer,) = trainers
    encoder, prefix = covft.get_encoder(trainer.model), "model.vision_tower.vision_tower."
    parts = {"experts": [0, 0], "context": [0, 0], "router": [0, 0], "norms": [0, 0]}
    for name, parameter in encoder.vit.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        if parameter.requires_grad:
            part = parts["context" if ".context." in name else encoder.part_of(name)]
            part[0] += int((trainer.start[prefix + name] != trainer.end[prefix + name]).sum())
            part[1] += parameter.numel()
    assert all(moved >= 0.95 * total for moved, total in parts.values()), parts
    assert "are kept in float32" in capsys.readouterr().out
    saved = load_file(llava_home / "out" / "covft" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    whole = load_file(llava_home / "out" / "model.safetensors")
    assert {tensor.dtype for name, tensor in whole.items() if "vision_tower" in name} == {torch.bfloat16}


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_the_tower_is_saved_everywhere_and_evaluated(llava_code, llava_home, trainers):
    run(llava_home)
    (trainer,) = trainers
    for folder in ("out", "out/checkpoint-1", "out/checkpoint-2"):
        assert (llava_home / folder / "covft" / "covft_config.json").is_file()
    results = evaluate(llava_home)

    # The model in memory says the same as the one that was loaded.
    tokenizer = tokenizer_for("v1")
    import llava.conversation

    batch = batch_of(tokenizer, llava.conversation.conv_templates["v1"], QUESTIONS[:1], [1])
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], images=torch.load(llava_home / "image.pt")).logits
    torch.testing.assert_close(results["logits"], logits, rtol=1e-4, atol=1e-5)
    shutil.rmtree(llava_home / "out" / "covft")
    with pytest.raises(ConfigError, match="was not trained with covft"):
        evaluate(llava_home)


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_llava_next_whose_tower_is_loaded_with_the_model(llava_code, llava_home, trainers):
    """Its checkpoint holds the original tower, so that loading finds every weight of it."""
    parts = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
    flags = ["--mm_tunable_parts", parts, "--mm_vision_tower_lr", "2e-3", "--tower_kind", "next"]
    run(llava_home, *flags, "--image_aspect_ratio", "anyres_max_9", version="v1")
    (trainer,) = trainers
    encoder = covft.get_encoder(trainer.model)
    tower = [group for group in trainer.optimizer.param_groups if group["lr"] == 2e-3]
    assert {id(p) for group in tower for p in group["params"]} == {id(p) for p in encoder.trainable_parameters()}
    frozen = [name for name, p in encoder.vit.named_parameters() if not p.requires_grad]
    assert any("self_attn" in name for name in frozen)

    from llava.model.llava_llama import LlavaQwenForCausalLM
    from transformers import CLIPVisionModel

    config = LlavaQwenForCausalLM.config_class.from_pretrained(llava_home / "out")
    config.delay_load = "weights"
    model = LlavaQwenForCausalLM.from_pretrained(llava_home / "out", config=config).eval()
    original = CLIPVisionModel.from_pretrained(llava_home / "clip").state_dict()
    tower = model.get_vision_tower().vision_tower
    for name, value in tower.state_dict().items():
        torch.testing.assert_close(value, original[name])
    tokenizer = tokenizer_for("v1")
    launcher.attach(model, tokenizer=tokenizer, conversation="vicuna_v1", pretrained=llava_home / "out" / "covft")
    import llava.conversation

    batch = batch_of(tokenizer, llava.conversation.conv_templates["v1"], QUESTIONS[:2], [1, 1])
    images = [torch.randn(3, 3, SIZE, SIZE), torch.randn(1, 3, SIZE, SIZE)]
    expected = trainer.model.eval()(**batch, images=images).logits
    torch.testing.assert_close(model(**batch, images=images).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings(CLIP_WARNING)
def test_an_interrupted_run_ends_where_a_whole_one_does(llava_code, llava_home, trainers):
    run(llava_home, steps=3, output_dir=llava_home / "whole")
    run(llava_home, steps=1, output_dir=llava_home / "cut")
    run(llava_home, steps=3, output_dir=llava_home / "cut")
    whole, _, resumed = trainers
    assert resumed.state.global_step == 3
    for name, value in whole.end.items():
        torch.testing.assert_close(resumed.end[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_a_checkpoint_without_its_tower_is_refused(llava_code, llava_home):
    run(llava_home, steps=1)
    (llava_home / "out" / "checkpoint-1" / "covft" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing or truncated"):
        run(llava_home, steps=2)


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_a_checkpoint_of_other_settings_is_refused(llava_code, llava_home):
    run(llava_home, steps=1)
    with pytest.raises(CheckpointError, match="other settings"):
        run(llava_home, steps=2, covft_flags=["--covft_experts", "3"])


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_a_second_stage_goes_on_with_a_saved_tower(llava_code, llava_home, trainers):
    run(llava_home, steps=1)
    arguments = ["--covft_pretrained", str(llava_home / "out" / "covft")]
    theirs_too = ["--model_name_or_path", str(llava_home / "vicuna")]
    with pytest.raises(ConfigError, match="has its own settings"):
        run(llava_home, output_dir=llava_home / "more", covft_flags=arguments)
    flags = ["--version", "v1", "--vision_tower", llava_home / "clip", "--mm_vision_select_layer", "-2", "--data_path"]
    flags += [llava_home / "data.json", "--output_dir", llava_home / "more", "--max_steps", "1", "--use_cpu", "True"]
    flags += ["--report_to", "none", "--remove_unused_columns", "False", "--disable_tqdm", "True"]
    launcher.main([*arguments, "--", "llava.train.train_mem", *theirs_too, *map(str, flags)])
    first, second = trainers
    for name, value in covft.get_encoder(first.model).adapted_state_dict().items():
        torch.testing.assert_close(second.start[f"model.vision_tower.vision_tower.{name}"], value)


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_blocks_that_nothing_reads_are_refused_before_the_training(llava_code, llava_home):
    with pytest.raises(LayerIndexError, match="after the hidden state that is read"):
        run(llava_home, covft_flags=["--covft_layers", "2-3"])


def test_reentrant_checkpointing_is_refused():
    asked = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ReentrantCheckpointError):
        without_reentrant(asked)
    unsaid = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=None)
    without_reentrant(unsaid)
    assert unsaid.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_a_script_by_its_path(llava_code, llava_home):
    run(llava_home, script=str(STANDINS / "llava" / "train" / "train_mem.py"), steps=1)
    assert (llava_home / "out" / "covft").is_dir()


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_stage_1_saves_the_tower_beside_the_projector(llava_code, llava_home):
    flags = ["--tune_mm_mlp_adapter", "True"]
    with pytest.raises(ConfigError, match=r"Got: +plain, which --version chooses[\s\S]*train stage 1"):
        run(llava_home, *flags, version="plain")
    run(llava_home, *flags, version="plain", covft_flags=["--covft_empty_instruction", "describe the image."])
    for folder in ("out", "out/checkpoint-1", "out/checkpoint-2"):
        assert (llava_home / folder / "covft" / "model.safetensors").is_file()
        assert (llava_home / folder / "mm_projector.bin").is_file()


@pytest.mark.long
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.filterwarnings(CLIP_WARNING)
def test_lora_of_the_language_model(bias, llava_code, llava_home, trainers):
    """A PeftModel saves its adapters alone; the tower is written all the same, and comes back on resume."""
    pytest.importorskip("peft")
    flags = ["--lora_enable", "True", "--lora_bias", bias]
    run(llava_home, *flags, steps=2)
    run(llava_home, *flags, steps=2)  # resumes, and has nothing left to do
    first, resumed = trainers
    for folder in ("out", "out/checkpoint-1", "out/checkpoint-2"):
        assert (llava_home / folder / "covft" / "covft_config.json").is_file()
        assert (llava_home / folder / "adapter_config.json").is_file()
    assert resumed.state.global_step == 2
    # What their loader puts into a model with the original tower: the projector, nothing of the tower.
    others = torch.load(llava_home / "out" / "non_lora_trainables.bin")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in others} == {"mm_projector"}
    for folder in ("out", "out/checkpoint-1", "out/checkpoint-2"):
        adapters = load_file(llava_home / folder / "adapter_model.safetensors")
        assert any("lora_" in name for name in adapters)
        assert any(name.endswith(".bias") for name in adapters) == (bias == "all")
        assert not any("vision_tower" in name for name in adapters)
    encoder = covft.get_encoder(resumed.model)
    moved = 0
    for name, value in covft.get_encoder(first.model).adapted_state_dict().items():
        torch.testing.assert_close(encoder.adapted_state_dict()[name], value, msg=name)
        prefix = next(key for key in first.start if key.endswith(name))
        moved += not torch.equal(value, first.start[prefix])
    assert moved == len(encoder.adapted_state_dict())
    saved = covft.load(
        llava_home / "out" / "covft", vit=transformers.CLIPVisionModel.from_pretrained(llava_home / "clip")
    )
    for name, value in encoder.adapted_state_dict().items():
        torch.testing.assert_close(saved.adapted_state_dict()[name], value)

"""The files for accelerate and DeepSpeed, read as accelerate reads them."""

import copy
import json
import os
import runpy
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted((CONFIGS / "accelerate").glob("*.yaml"))
PROCESSES = {
    "cpu_2_processes": 2,
    "ddp_8xh100": 8,
    "fsdp2": 8,
    "multi_node": 16,
    "single_gpu": 1,
    "zero2": 8,
    "zero3": 8,
}


def test_all_are_there():
    assert {path.stem for path in FILES} == set(PROCESSES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == PROCESSES[path.stem]
    assert str(config.mixed_precision) == ("no" if path.stem.startswith("cpu") else "bf16")
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)


def environment(name):
    """What `accelerate launch` tells the processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command = ["--config_file", str(CONFIGS / "accelerate" / f"{name}.yaml"), "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("name", ["fsdp2", "multi_node"])
def test_fsdp_shards_blocks_and_loads_whole_weights(monkeypatch, name):
    from accelerate.utils import FullyShardedDataParallelPlugin

    for key, value in environment(name).items():
        if key.startswith(("FSDP", "ACCELERATE")):
            monkeypatch.setenv(key, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["CLIPEncoderLayer", "LlamaDecoderLayer"]


def test_the_wrapped_classes_are_the_blocks_of_the_models():
    from accelerate.utils.dataclasses import get_module_class_from_name
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        InternVLVisionConfig,
        InternVLVisionModel,
        LlamaConfig,
        LlamaModel,
        Phi3Config,
        Phi3Model,
    )

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"image_size": [16, 16], "patch_size": [8, 8]}
    written = (Path(__file__).resolve().parents[2] / "examples" / "internvl" / "finetune.py").read_text()
    for model, name in (
        (CLIPVisionModel(CLIPVisionConfig(**small)), "CLIPEncoderLayer"),
        (LlamaModel(LlamaConfig(**small, vocab_size=10)), "LlamaDecoderLayer"),
        (InternVLVisionModel(InternVLVisionConfig(**small, **vision)), "InternVLVisionLayer"),
        (Phi3Model(Phi3Config(**small, vocab_size=10, pad_token_id=0)), "Phi3DecoderLayer"),
    ):
        block = get_module_class_from_name(model, name)
        assert sum(isinstance(module, block) for module in model.modules()) == 2
        fsdp = yaml.safe_load((CONFIGS / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
        assert name in fsdp["fsdp_transformer_layer_cls_to_wrap"] or name in written


@pytest.mark.parametrize(("name", "stage"), [("zero2", "2"), ("zero3", "3")])
def test_zero_shares_out_and_saves_whole_weights(name, stage):
    found = environment(name)
    assert found["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert found["ACCELERATE_DEEPSPEED_ZERO3_INIT"].lower() == "false"
    if stage == "3":
        assert found["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"].lower() == "true"


def test_the_other_machine_gets_its_rank():
    flags = ["--machine_rank", "1", "--main_process_ip", "10.1.2.3"]
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    command = ["--config_file", str(CONFIGS / "accelerate" / "multi_node.yaml"), *flags, "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert (args.machine_rank, args.main_process_ip, args.num_machines) == (1, "10.1.2.3", 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_take_batches_and_types_from_the_trainer(stage):
    config = json.loads((CONFIGS / "deepspeed" / f"zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", stage == 2)
    flat = copy.deepcopy(config)
    flat.pop("zero_optimization")
    values = [v["enabled"] if isinstance(v, dict) else v for v in flat.values()]
    assert set(values) == {"auto"}
    assert {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} <= set(config)


@pytest.mark.parametrize(
    ("script", "data"),
    [("llava", ["--data", "rows.json", "--images", "images"]), ("internvl", ["--meta", "meta.json"])],
)
def test_options_of_the_tower_are_refused_where_it_is_frozen(script, data, monkeypatch, capsys, tmp_path):
    path = Path(__file__).resolve().parents[2] / "examples" / script / "finetune.py"
    arguments = [*data, "--output_dir", str(tmp_path), "--method", "frozen", "--experts", "2", "--bf16", "False"]
    monkeypatch.setattr("sys.argv", [str(path), *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    assert "experts are settings of covft, not of 'frozen'" in capsys.readouterr().err

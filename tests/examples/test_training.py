"""The training scripts as users run them: two processes, small folders, stage 1 to an answer."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.examples.folders import SIZE, write_internvl, write_llava, write_models
from tests.helpers.towers import image_features

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "configs" / "accelerate" / "cpu_2_processes.yaml"
EVERYWHERE = ["--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--logging_steps", "1"]
EVERYWHERE += ["--per_device_train_batch_size", "2", "--global_batch_size", "4", "--disable_tqdm", "True"]
NEVER = ["--save_strategy", "no"]

ADAPTED = ["--layers", "1-2"]

pytestmark = pytest.mark.long


def launch(plan, log, config=CPU, *flags):
    """Run a plan in two processes."""
    log.with_suffix(".json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "examples" / "stages.py")]
    command += [str(log.with_suffix(".json")), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=log.parent, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False, timeout=600
        )
    assert done.returncode == 0, log.read_text()[-6000:]


def script(name, *arguments):
    """A step of a plan."""
    return [str(ROOT / "examples" / name), [str(argument) for argument in arguments]]


def tuning(root):
    """The arguments by which all of LLaVA is tuned here, whatever becomes of its tower."""
    models, llava = root / "models", root / "llava"
    parts = ["--vision", models / "clip", "--language", models / "vicuna", "--text_encoder", models / "bert"]
    parts += ["--data", llava / "train.json", "--images", llava / "images", "--projector", root / "llava-pretrain"]
    return [*parts, "--learning_rate", 5e-3, "--router_lr", 1e-2, "--lr_scheduler_type", "constant", "--max_steps", 4]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Everything that is trained here, in one launch; workers of xdist share it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "examples"
    with FileLock(f"{root}.lock"):
        if not root.is_dir():
            train_everything(root)
    return root


def train_everything(root):
    """Both stages of LLaVA and InternVL below a folder, in two processes."""
    root.mkdir()
    models, llava, internvl = root / "models", root / "llava", root / "internvl"
    write_models(models)
    write_llava(llava)
    write_internvl(internvl)

    parts = ["--vision", models / "clip", "--language", models / "vicuna", "--images", llava / "images", *EVERYWHERE]
    plain = [*tuning(root), *EVERYWHERE]
    tune = [*plain, *ADAPTED]
    small = ["--meta", internvl / "meta.json", "--vision", models / "internvit", "--language", models / "phi"]
    small += [*EVERYWHERE, *NEVER, "--max_tiles", 2, "--max_steps", 4]
    launch(
        [
            script(
                "llava/pretrain.py",
                *(*parts, "--data", llava / "captions.json", "--output_dir", root / "llava-pretrain"),
                *(*NEVER, "--dtype", "float32", "--max_steps", 4, "--learning_rate", 1e-2, "--seed", 7),
            ),
            script("llava/finetune.py", *tune, "--output_dir", root / "llava-covft", "--save_steps", 2),
            ["copy", str(root / "llava-covft" / "checkpoint-2"), str(root / "llava-resumed" / "checkpoint-2")],
            script("llava/finetune.py", *tune, "--output_dir", root / "llava-resumed", "--save_steps", 2, "--resume"),
            script("llava/finetune.py", *tune, "--output_dir", root / "llava-lora", *NEVER, "--lora_r", 4),
            script("llava/finetune.py", *plain, "--output_dir", root / "llava-full", *NEVER, "--method", "full"),
            script("internvl/pretrain.py", *small, "--output_dir", root / "internvl-pretrain", "--dtype", "float32"),
            script(
                "internvl/finetune.py",
                *(*small, "--projector", root / "internvl-pretrain", "--output_dir", root / "internvl-covft"),
                *("--text_encoder", "hash:16", "--learning_rate", 5e-3),
            ),
        ],
        root / "log.txt",
    )


def losses(folder):
    """Losses that a run logged."""
    [state] = folder.glob("checkpoint-4/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def weights(folder):
    """All tensors below a saved folder, by file and name."""
    return {
        f"{file.parent.name if file.parent != folder else ''}/{name}": tensor
        for file in sorted(folder.glob("**/model*.safetensors"))
        if not file.parent.name.startswith("checkpoint") and "checkpoint" not in str(file.relative_to(folder))
        for name, tensor in load_file(file).items()
    }


def test_stage_1_trains_the_projector_alone_and_stage_2_starts_from_it(runs):
    for name in ("llava", "internvl"):
        assert [file.name for file in (runs / f"{name}-pretrain").glob("*.safetensors")] == ["projector.safetensors"]
    log = (runs / "log.txt").read_text()
    assert log.count("Saved ") == 2, "by one process of two"
    first = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", log.split("llava/finetune.py")[0])]
    assert len(first) == 4
    assert first[-1] < first[0]


def test_covft_changes_what_it_should(runs):
    from transformers import AutoModel

    tuned, original = weights(runs / "llava-covft"), AutoModel.from_pretrained(runs / "models" / "clip").vision_model
    stored = {name.split("vision_tower.")[-1]: t for name, t in tuned.items() if "vision_tower." in name}
    assert len(stored) == len(original.state_dict())
    for name, tensor in original.state_dict().items():
        [ours] = [stored[key] for key in stored if key.endswith(name)]
        torch.testing.assert_close(ours, tensor, rtol=0, atol=0, msg=f"the tower's own {name} is saved as it was")
    adapted = [name for name in tuned if name.startswith("covft/")]
    assert sum(".experts." in name for name in adapted) == 2 * 4 * 4  # blocks 1 and 2 of 4, 4 experts, 4 tensors each
    projector = load_file(runs / "llava-pretrain" / "projector.safetensors")
    for name, tensor in projector.items():
        [ours] = [value for key, value in tuned.items() if key.endswith(f"multi_modal_projector.{name}")]
        assert 0 < (ours - tensor).abs().max() < 0.05, "four steps of AdamW at 5e-3 lead no further from stage 1"
    found = losses(runs / "llava-covft")
    assert len(found) == 4
    assert found[-1] < found[0] - 0.3
    settings = json.loads((runs / "llava-covft" / "covft" / "covft_config.json").read_text())["covft"]
    assert (settings["layers"], settings["feature_layer"]) == ([1, 2], -2)


def test_a_run_starts_with_its_hyperparameters(runs):
    from covft.integrations import RECIPES

    ran = (runs / "log.txt").read_text().split("== ")
    [section] = [part for part in ran if "llava/finetune.py" in part and "llava-resumed" in part]
    assert section.count(f"llava-finetune: {RECIPES['llava-finetune'].source}\n") == 1, "by one process of two"
    assert re.search(r"\n  learning_rate +0\.005  \(recipe: 2e-05\)\n", section)
    assert re.search(r"\n  num_train_epochs +1\.0\n", section)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(runs):
    whole, resumed = weights(runs / "llava-covft"), weights(runs / "llava-resumed")
    assert set(whole) == set(resumed)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    ran = (runs / "log.txt").read_text().split("== ")
    [section] = [part for part in ran if "llava-resumed" in part and "--resume" in part]
    assert section.count("'loss'") == 2, "two steps of four; the others are in the checkpoint"
    assert losses(runs / "llava-resumed")[2:] == pytest.approx(losses(runs / "llava-covft")[2:], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "written"), [("fsdp2", "pytorch_model_fsdp.bin"), ("zero2", "global_step2"), ("zero3", "global_step2")]
)
def test_what_shards_ends_where_ddp_does(runs, tmp_path, monkeypatch, name, written):
    """configs/accelerate/NAME.yaml, but with two processes, and none of them with a GPU."""
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "num_processes": 2, "mixed_precision": "no"}))
    gpus = ["--ddp_backend", "gloo", "--dataloader_pin_memory", "False", *EVERYWHERE[2:]]
    step = script(
        "llava/finetune.py", *tuning(runs), *ADAPTED, *gpus, "--output_dir", tmp_path / "tuned", "--save_steps", 2
    )
    flags = ["--as-gpus"] if name == "fsdp2" else []
    launch([step], tmp_path / "log.txt", tmp_path / "config.yaml", *flags)
    assert (tmp_path / "tuned" / "checkpoint-2" / written).exists(), "it was sharded"
    assert losses(tmp_path / "tuned") == pytest.approx(losses(runs / "llava-covft"), rel=1e-3)
    folders = (tmp_path / "tuned", runs / "llava-covft")
    models = [AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in folders]
    towers = [load_file(folder / "covft" / "model.safetensors") for folder in folders]
    for ours, theirs in (models, towers):
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


def test_lora_is_merged_and_leaves_the_embeddings(runs):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(runs / "models" / "vicuna").state_dict()
    tuned = weights(runs / "llava-lora")
    assert not any("lora" in name for name in tuned)

    def ours(name):
        [value] = [value for key, value in tuned.items() if key.endswith(name.removeprefix("model."))]
        return value

    rows = len(base["model.embed_tokens.weight"])
    assert torch.equal(ours("model.embed_tokens.weight")[:rows], base["model.embed_tokens.weight"])
    assert not torch.equal(ours("model.layers.0.mlp.up_proj.weight"), base["model.layers.0.mlp.up_proj.weight"])
    assert any(name.startswith("covft/") for name in tuned)


def test_full_tuning_changes_the_tower(runs):
    from transformers import AutoModel

    original = AutoModel.from_pretrained(runs / "models" / "clip").vision_model.state_dict()
    tuned = weights(runs / "llava-full")
    name = "encoder.layers.0.mlp.fc1.weight"
    [ours] = [value for key, value in tuned.items() if key.endswith(name) and not key.startswith("covft/")]
    assert not torch.equal(ours, original[name])
    assert torch.equal(tuned[f"covft/{name}"], ours), "any loader reads what load_model reads"


# ---------------------------------------------------------------------------------------- answers


def ask(monkeypatch, script, *arguments):
    """Run an infer.py here; the answer, and what generate() was given and returned."""
    from transformers import GenerationMixin

    seen = {}
    generate = GenerationMixin.generate

    def spy(self, **inputs):
        seen.update(inputs, model=self, output=generate(self, **inputs))
        return seen["output"]

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    return runpy.run_path(str(ROOT / "examples" / script))["main"](), seen


def test_llava_answers_as_it_was_trained(runs, monkeypatch, capsys):
    import covft
    from covft.data import ConversationDataset, ImageText, LlavaRows, PadToSquare

    question = "What colour is it?"
    arguments = ["--model", runs / "llava-covft", "--image", runs / "llava" / "images" / "green.png"]
    arguments += ["--question", question, "--max_new_tokens", 6, "--device", "cpu"]
    arguments += ["--text_encoder", runs / "models" / "bert"]
    answer, seen = ask(monkeypatch, "llava/infer.py", *arguments)
    assert capsys.readouterr().out.strip() == answer
    assert covft.get_encoder(seen["model"]).text_encoder.text_dim == 16

    # The prompt is the one of the training data, up to where the answer begins, and so are the pixels.
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(runs / "llava-covft")
    rows = LlavaRows(runs / "llava" / "train.json", runs / "llava" / "images")
    trained = ConversationDataset(
        rows, processor.tokenizer, processor.image_processor, image_text=ImageText(per_tile=4), tiling=PadToSquare()
    )[2]
    assert trained["context_text"] == question
    start = int((trained["labels"] != -100).nonzero()[0])
    assert seen["input_ids"][0].tolist() == trained["input_ids"][:start].tolist()
    torch.testing.assert_close(seen["pixel_values"], trained["pixel_values"])

    # Greedy search, written out on the model as it was saved.
    tokens = seen["input_ids"]
    for _ in range(seen["output"].shape[1] - tokens.shape[1]):
        logits = seen["model"](input_ids=tokens, pixel_values=seen["pixel_values"], context_text=question).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert tokens.tolist() == seen["output"].tolist()
    # The question reaches the tower.
    with torch.no_grad():
        features = [
            torch.stack(tuple(image_features(seen["model"].get_image_features(seen["pixel_values"], context_text=q))))
            for q in (question, "How many are there?")
        ]
    assert (features[0] - features[1]).abs().max() > 1e-6


def test_llava_answers_with_beams_lora_and_without_covft(runs, monkeypatch):
    picture = runs / "llava" / "images" / "red.png"
    for folder in ("llava-lora", "llava-full"):
        arguments = ["--model", runs / folder, "--image", picture, "--question", "What colour is it?"]
        arguments += ["--text_encoder", runs / "models" / "bert"]
        answer, seen = ask(
            monkeypatch, "llava/infer.py", *arguments, "--beams", 3, "--max_new_tokens", 4, "--dtype", "bfloat16"
        )
        assert isinstance(answer, str)
        assert seen["num_beams"] == 3
        assert seen["pixel_values"].dtype == torch.bfloat16


def test_internvl_answers_as_it_was_trained(runs, monkeypatch):
    from transformers import AutoImageProcessor, AutoTokenizer

    from covft.data import ConversationDataset, DynamicTiling, ImageText, InternVLRows

    arguments = ["--model", runs / "internvl-covft", "--image", runs / "internvl" / "images" / "red.png"]
    arguments += ["--question", "What colour is it?", "--max_tiles", 2, "--max_new_tokens", 6, "--beams", 2]
    _, seen = ask(monkeypatch, "internvl/infer.py", *arguments)
    tokenizer = AutoTokenizer.from_pretrained(runs / "internvl-covft")
    trained = ConversationDataset(
        InternVLRows(runs / "internvl" / "meta.json"),
        tokenizer,
        AutoImageProcessor.from_pretrained(runs / "internvl-covft"),
        image_text=ImageText("<IMG_CONTEXT>", per_tile=4, before="<img>", after="</img>"),
        tiling=DynamicTiling(max_tiles=2, tile_size=SIZE),
    )[0]
    assert trained["num_tiles"] == [3]
    start = int((trained["labels"] != -100).nonzero()[0])
    assert seen["input_ids"][0].tolist() == trained["input_ids"][:start].tolist()
    torch.testing.assert_close(seen["pixel_values"], trained["pixel_values"])

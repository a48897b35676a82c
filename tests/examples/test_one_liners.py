"""The one-liners, each as a program of its own; those of libraries that are not here, with a stand-in for them."""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.examples.folders import write_llava_model, write_trl_data

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "one_liners"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(FOLDER / name), run_name="__main__")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA with the chat template of llava-hf, and a picture."""
    return write_llava_model(tmp_path_factory.mktemp("llava"))


def test_no_example_has_the_name_of_a_library():
    """Python puts the folder of a program first on its path: `timm.py` would import itself."""
    names = [path.stem for path in FOLDER.parent.rglob("*.py")]
    assert len(names) == 13
    assert [name for name in names if importlib.util.find_spec(name)] == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_they_are_short(path):
    assert len(path.read_text().splitlines()) <= 38


def test_timm(monkeypatch, capsys):
    run(monkeypatch, "with_timm.py")
    assert "features (2, 64)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning(monkeypatch, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.chdir(tmp_path)
    namespace = run(monkeypatch, "with_lightning.py")
    assert (tmp_path / "covft" / "model.safetensors").is_file()
    assert namespace["model"].trainer.global_step == 2


def test_open_clip(monkeypatch, capsys):
    import open_clip

    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: _small())
    namespace = run(monkeypatch, "with_open_clip.py")
    assert "features (2, 32)" in capsys.readouterr().out
    assert namespace["encoder"].text_encoder.text_dim == 32


def _small():
    """CLIP of open_clip, small: ViT-B-32 is 150 million parameters."""
    import open_clip

    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 4, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(32, vision, text).eval()


def test_hf(monkeypatch, capsys, llava):
    namespace = run(
        monkeypatch,
        "with_hf.py",
        *("--model", llava / "model", "--text_encoder", "hash:16"),
        *("--image", llava / "images" / "red.png", "--question", "what is left of the cup?"),
    )
    assert "trainable params" in capsys.readouterr().out
    import covft

    assert covft.get_encoder(namespace["model"]).routing_weights()


def test_llama_factory(monkeypatch):
    from covft import CoVFTCallback

    given = {}
    tuner = types.ModuleType("llamafactory.train.tuner")
    tuner.run_exp = given.update
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)
    run(monkeypatch, "with_llama_factory.py", "train.yaml")
    [callback] = given["callbacks"]
    assert isinstance(callback, CoVFTCallback)
    assert callback.text_encoder == "bert-base-uncased"


def run_trl(llava, output, *more):
    arguments = ["--model_name_or_path", llava / "model", "--dataset_name", llava / "data", "--text_encoder", "hash:16"]
    arguments += ["--output_dir", output, "--use_cpu", "True", "--bf16", "False", "--report_to", "none"]
    arguments += ["--max_steps", 2, "--save_steps", 1, "--per_device_train_batch_size", 2, "--learning_rate", 1e-3]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "with_trl.py"), *map(str, [*arguments, *more])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for folder in (output, output / "checkpoint-2"):
        assert (folder / "covft" / "model.safetensors").is_file()


@pytest.mark.long
def test_trl(llava):
    pytest.importorskip("trl")
    write_trl_data(llava / "data")
    run_trl(llava, llava / "trl")


@pytest.mark.slow
def test_trl__with_lora_saves_everything_and_resumes(llava, tmp_path):
    pytest.importorskip("trl")
    import covft

    write_trl_data(llava / "data")
    lora = ["--use_peft", "--lora_target_modules", r".*language_model.*_proj"]
    run_trl(llava, tmp_path / "whole", *lora)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "cut" / "checkpoint-1")
    run_trl(llava, tmp_path / "cut", *lora, "--resume_from_checkpoint", tmp_path / "cut" / "checkpoint-1")

    def loaded(folder):
        model, _ = covft.load_model(folder, "hash:16", base=llava / "model")
        return model.state_dict()

    first, whole, cut = (loaded(tmp_path / name) for name in ("whole/checkpoint-1", "whole", "cut"))
    assert sum("lora_" in name for name in whole) == 2 * 2 * 7
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    changed = {name for name, tensor in whole.items() if not torch.equal(tensor, first[name])}
    assert any("experts" in name for name in changed)
    assert any("lora_" in name for name in changed)

"""Uses an installed covft with what one of its extras brings; run by `check.py` in an environment of that extra."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

import covft
from covft.testing import HashTextEncoder, ToyViT

OPTIONAL = (
    "accelerate",
    "datasets",
    "matplotlib",
    "open_clip",
    "peft",
    "pycocoevalcap",
    "sentence_transformers",
    "timm",
    "transformers",
)


def core():
    """Wrap, train a step, save, load and unwrap; the command names its extra."""
    assert [name for name in (*OPTIONAL, "rich", "typer") if importlib.util.find_spec(name)] == []
    works(ToyViT(), torch.rand(2, 3, 16, 16), folder="saved")
    vit = ToyViT()
    untouched = vit.state_dict()
    vit = covft.unwrap(covft.wrap(vit, 8))
    assert all(torch.equal(value, untouched[name]) for name, value in vit.state_dict().items())
    for arguments in ([], ["version"]):
        done = command(*arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert 'pip install "covft[cli]"' in done.stderr


def timm():
    import timm

    works(timm.create_model("test_vit", pretrained=False), torch.rand(2, 3, 160, 160))


def open_clip():
    from open_clip.transformer import VisionTransformer

    size = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 4, "heads": 2, "mlp_ratio": 2.0, "output_dim": 8}
    works(VisionTransformer(**size), torch.rand(2, 3, 16, 16))


def transformers():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    works(CLIPVisionModel(CLIPVisionConfig(**size, image_size=16, patch_size=8)), torch.rand(2, 3, 16, 16))
    from covft.testing import tiny_llava

    tiny = tiny_llava()
    model = covft.attach(tiny.model, HashTextEncoder(32), tokenizer=tiny.tokenizer)
    model(**tiny.batch(["What is left of the cup?"], answers=["A spoon."])).loss.backward()
    assert any(weight.grad is not None for weight in covft.get_encoder(model).trainable_parameters())


def sentence_transformers():
    import sentence_transformers

    assert sentence_transformers.SentenceTransformer
    transformers()


def train():
    import accelerate
    import datasets
    import peft

    assert all([accelerate.Accelerator, datasets.Dataset, peft.LoraConfig])
    covft.CoVFTCallback(HashTextEncoder(32))
    transformers()


def analysis():
    import matplotlib as mpl
    import sklearn

    assert all([mpl.__version__, sklearn.__version__])


def metrics():
    assert covft.metrics.cider(["a red cup", "two dogs"], [["a red cup"], ["two dogs"]]) == [7.5, 5.0]


def cli():
    done = command("version")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert covft.__version__ in done.stdout


def onnx():
    encoder = covft.wrap(ToyViT(), HashTextEncoder(8), layers=[1, 2])
    exported = covft.export(encoder, torch.rand(2, 3, 16, 16), ["a cup?", "a dog?"], "encoder.onnx", format="onnx")
    assert exported.error < 1e-5


def everything():
    for extra in (timm, open_clip, sentence_transformers, train, analysis, metrics, cli):
        extra()


def works(vit, images, folder=None):
    """Wrap a ViT: the same output at the start, gradients, and the same output after saving and loading."""
    vit.eval()
    encoder = covft.wrap(vit, HashTextEncoder(8), layers=[1, 2]).eval()
    questions = ["What is left of the cup?", "Describe the room."]
    before = tensor(encoder(images, questions))
    before.sum().backward()
    assert all(
        torch.isfinite(weight.grad).all() for weight in encoder.trainable_parameters() if weight.grad is not None
    )
    if folder is not None:
        encoder.save_pretrained(folder)
        loaded = covft.load(folder, vit=covft.unwrap(encoder), text_encoder=HashTextEncoder(8)).eval()
        assert torch.equal(tensor(loaded(images, questions)), before)


def tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def command(*arguments):
    """Run the `covft` script of this environment."""
    script = Path(sysconfig.get_path("scripts")) / "covft"
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=False)


if __name__ == "__main__":
    assert Path(covft.__file__).is_relative_to(sys.prefix), covft.__file__
    assert importlib.metadata.version("covft") == covft.__version__
    name = sys.argv[1].replace("-", "_")
    {"all": everything}.get(name, globals().get(name))()
    print(f"good: {sys.argv[1]}")

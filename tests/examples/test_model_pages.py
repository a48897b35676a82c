"""The snippets and commands of `docs/models`, run on small models of their families."""

import contextlib
import importlib.util
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch

import covft
from tests.tiny.folders import QUESTION, TINY, picture, write

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "models"
OTHERS = {"qwen2_5_vl": "qwen2-vl", "glm4v": "glm-4v", "mllama": "llama-3-2-vision"}
OTHERS |= {"idefics3": "smolvlm", "mistral3": "pixtral"}
PAGE_OF = {family: family.replace("_", "-") for family in TINY} | OTHERS
SMALL = {
    "bert-base-uncased": "hash:16",
    "HuggingFaceH4/llava-instruct-mix-vsft": "tiny/data",
    "cup.jpg": "tiny/image.png",
}
ON_A_CPU = ["--max_steps", "2", "--use_cpu", "True", "--bf16", "False", "--report_to", "none"]


def blocks(page, language):
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", text, flags=re.M | re.DOTALL)


def commands(block):
    """Each command of a block, as the words that a shell makes of it."""
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with the examples, as the root of a clone has them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(family, folder):
    if family == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("SmolVLM's processor needs num2words")
    write(family, folder)


def test_every_family_has_a_page():
    from covft.integrations.mllm.families import FAMILIES

    assert {*PAGE_OF.values(), "index"} == {page.stem for page in PAGES.glob("*.md")}
    alike = {"qwen3_vl_moe", "qwen3_5_moe", "llava_next_video"}  # of their pages' families
    assert set(FAMILIES) - alike <= set(TINY)


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # GLM, PaliGemma
@pytest.mark.parametrize("family", TINY)
def test_the_snippet_attaches__and_the_question_reaches_the_tower(family, here):
    from transformers import AutoModelForImageTextToText

    made(family, here / "tiny")
    code = blocks(PAGE_OF[family], "python")[0]
    [name] = re.findall(r"^name = \"(.*?)\"$", code, flags=re.M)
    [[_, cls]] = re.findall(r"import (\w+, )?(\w+ForConditionalGeneration)\n", code)
    code = code.replace(name, "tiny/model").replace(cls, TINY[family].model).replace("bert-base-uncased", "hash:16")
    namespace = {}
    exec(code, namespace)
    model, processor = namespace["model"].eval(), namespace["processor"]
    plain = AutoModelForImageTextToText.from_pretrained("tiny/model").eval()

    if family == "paligemma":
        inputs = processor(picture("red"), processor.image_token + QUESTION, return_tensors="pt")
        told = {"context_text": QUESTION}
    else:
        content = [{"type": "image", "image": picture("red")}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        told = {}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, **told).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)
        for parameter in covft.get_encoder(model).trainable_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        read, said, other = (
            model(**inputs, **text).logits
            for text in (told, {"context_text": QUESTION}, {"context_text": "Who wrote it?"})
        )
    assert torch.equal(read, said)
    assert (read - other).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(set(PAGE_OF.values()) - {"paligemma"}))
def test_the_commands_of_the_page_run(page, here, capsys):
    pytest.importorskip("trl")
    documented, small = map(commands, blocks(page, "bash"))
    assert small[0][:3] == ["python", "-m", "tests.tiny"]
    for words in small:
        run(words)
        capsys.readouterr()
    [name] = [words[words.index("--model_name_or_path") + 1] for words in documented if "--model_name_or_path" in words]
    assert name in (PAGES / f"{page}.md").read_text(encoding="utf-8").partition("## Train it")[0]
    train, ask = ([{**SMALL, name: "tiny/model"}.get(word, word) for word in words] for words in documented)
    assert train[:2] == ["accelerate", "launch"]
    run(["python", *train[2:], *ON_A_CPU])
    run(ask)
    [folder] = (here / "runs").iterdir()
    assert (folder / "covft" / "model.safetensors").is_file()


def run(words):
    """Run a command of Python in this process, where starting it takes no time."""
    assert words[0] == "python"
    arguments = words[1:]
    before = sys.argv
    with warnings.catch_warnings(), contextlib.ExitStack() as restored:
        warnings.simplefilter("ignore")  # of TRL and its libraries; the tests of covft turn them into errors
        restored.callback(setattr, sys, "argv", before)
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__")
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")


@pytest.mark.slow
def test_paligemma_trains_and_answers(here, capsys):
    pytest.importorskip("datasets")
    made("paligemma", here / "tiny")
    code = "\n".join(blocks("paligemma", "python"))
    for name, tiny in {"google/paligemma2-3b-mix-224": "tiny/model", **SMALL}.items():
        code = code.replace(name, tiny)
    options = "max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, "
    code = code.replace("remove_unused_columns", f"{options}remove_unused_columns")
    namespace = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, namespace)
    assert "train_loss" in capsys.readouterr().out
    assert len(covft.get_encoder(namespace["model"]).routing_weights()[1]) == 1

"""Command lines, and where the launcher stands in."""

import dataclasses
import inspect
import sys

import pytest
import torch

import covft
from covft.config import CoVFTConfig
from covft.errors import ConfigError
from covft.integrations.codebases.launch import READING, launch, parse, run
from covft.integrations.mllm.prompt import PromptReader
from tests.helpers.towers import BY_NAME, TEXT_DIM


def test_flags_go_to_whom_they_belong():
    ours = ["--covft_text_encoder", "some/model", "--covft_layers", "11-13,20", "--covft_experts", "3"]
    ours += ["--covft_routing=sparse", "--covft_turns", "first"]
    for separator in (["--"], []):
        flags = parse("program", [*ours, *separator, "train.py", "--version", "v1", "--bf16", "True", "--x=--y"])
        assert flags.script == "train.py"
        assert flags.arguments == ["--version", "v1", "--bf16", "True", "--x=--y"]
        assert flags.text_encoder == "some/model"
        assert flags.settings == {"layers": (11, 12, 13, 20), "experts": 3, "routing": "sparse"}
        assert flags.reading == {"turns": "first"}
        assert (flags.theirs("version"), flags.theirs("x"), flags.theirs("nothing")) == ("v1", "--y", None)


def test_what_deepspeed_puts_first_reaches_the_script():
    for name in ("--local_rank=3", "--local-rank=3"):
        flags = parse("program", [name, "--covft_experts", "2", "--", "train.py", "--bf16", "True"])
        assert flags.arguments == ["--local_rank=3", "--bf16", "True"]


def test_a_second_separator_is_theirs():
    assert parse("program", ["--", "train.py", "--", "rest"]).arguments == ["--", "rest"]


@pytest.mark.parametrize("layers", ["11..22", "", "3-", "a", "3,22-11"])
def test_layers_that_cannot_be_read(layers):
    with pytest.raises(ConfigError, match="cannot be read"):
        parse("program", [f"--covft_layers={layers}", "--", "train.py"])


def test_negative_layers():
    assert parse("program", ["--covft_layers=3,-2", "--", "train.py"]).settings == {"layers": (3, -2)}


FLAGS = {
    "layers": ("1-2", (1, 2)),
    "experts": ("3", 3),
    "routing": ("sparse", "sparse"),
    "top_k": ("1", 1),
    "context": ("text", "text"),
    "train_norms": ("none", "none"),
    "activation": ("quick_gelu", "quick_gelu"),
    "num_heads": ("2", 2),
    "expert_rank": ("8", 8),
    "attention_rank": ("2", 2),
    "expert_init": ("noise", "noise"),
    "expert_init_scale": ("0.2", 0.2),
    "expert_init_seed": ("3", 3),
    "recompute": ("activation", "activation"),
    "feature_layer": ("-1", -1),
    "instructions": ("clean", "clean"),
    "null_text": ("true", True),
    "null_text_rate": ("0.2", 0.2),
    "router_aux_loss_coef": ("0.5", 0.5),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_setting_has_a_flag(name):
    given, wanted = FLAGS[name]
    assert parse("program", [f"--covft_{name}", given, "--", "train.py"]).settings == {name: wanted}


def test_every_reading_option_of_attach_has_a_flag():
    read = {name for name, p in inspect.signature(PromptReader).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert read == set(READING)
    flags = [text for name in READING for text in (f"--covft_{name}", f"a {name}")]
    assert parse("program", [*flags, "train.py"]).reading == {name: f"a {name}" for name in READING}


def test_every_setting_has_a_flag():
    assert {field.name for field in dataclasses.fields(CoVFTConfig)} == set(FLAGS)
    flags = [text for name, (given, _) in FLAGS.items() for text in (f"--covft_{name}", given)]
    encoder = covft.wrap(BY_NAME["timm-clip"].build(), TEXT_DIM, **parse("program", [*flags, "train.py"]).settings)
    assert encoder.covft_config == covft.CoVFTConfig(**{name: wanted for name, (_, wanted) in FLAGS.items()})


@pytest.mark.parametrize(
    ("flag", "value"), [("recompute", "some"), ("expert_rank", "0"), ("routing", "some"), ("experts", "0")]
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_changed(flag, value):
    vit = BY_NAME["timm-clip"].build()
    modules, trained = dict(vit.named_modules()), {name: p.requires_grad for name, p in vit.named_parameters()}
    weights = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    with pytest.raises(ConfigError, match=f"{flag}="):
        covft.wrap(vit, TEXT_DIM, **parse("program", [f"--covft_{flag}", value, "train.py"]).settings)
    assert dict(vit.named_modules()) == modules
    assert {name: p.requires_grad for name, p in vit.named_parameters()} == trained
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vit.state_dict().items())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--covft_nothing", "1", "train.py"],
        ["--covft_experts", "x", "train.py"],
        ["--covft_expert_rank", "x", "train.py"],
    ],
)
def test_what_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit):
        parse("program", arguments)
    assert "usage: python -m program" in capsys.readouterr().err


def test_a_template_from_a_file(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    assert parse("program", ["--covft_chat_template", str(file), "train.py"]).chat_template == "{{ messages }}"


def test_the_script_runs_as_python_would_run_it(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "beside.py").write_text("value = 7\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, pathlib, beside\n"
        "assert __name__ == '__main__'\n"
        "pathlib.Path(sys.argv[1]).write_text(f'{beside.value} {sys.argv[2:]}')\n"
    )
    before, path = list(sys.argv), list(sys.path)
    attach = pytest.fail
    try:
        arguments = ["--", str(script), str(tmp_path / "out.txt"), "--a", "b"]
        launch("program", attach, loader="no_such_package_of_theirs.load", arguments=arguments)
    finally:
        sys.modules.pop("beside", None)
    assert (tmp_path / "out.txt").read_text() == "7 ['--a', 'b']"
    assert (sys.argv, sys.path) == (before, path)


def test_their_own_broken_imports_are_not_hidden(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    package = tmp_path / "broken_package_of_theirs"
    package.mkdir()
    (package / "__init__.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        launch("program", pytest.fail, loader="broken_package_of_theirs.load", arguments=["--", "this"])


def test_an_error_of_covft_is_its_message_alone():
    error = ConfigError("Packed rows.", fix="--use_packed_ds False")

    def refuse():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(refuse)
    assert ended.value.code == f"ConfigError: {error}"  # which Python prints, with exit status 1

    def broken():
        raise ValueError("theirs")

    with pytest.raises(ValueError, match="theirs"):
        run(broken)

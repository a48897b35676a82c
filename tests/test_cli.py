import json
import subprocess
import sys

import pytest
import torch

import covft
from covft.adapters.sources import load_vit
from covft.cli import app, main
from covft.describing import gather
from covft.errors import ConfigError
from covft.utils.options import parse_layers


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command in this process; returns its exit code, output and error output."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def clip_l(tmp_path_factory):
    """The config of CLIP ViT-L/14-336, without weights."""
    from transformers import CLIPVisionConfig

    folder = tmp_path_factory.mktemp("clip-l")
    CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ).save_pretrained(folder)
    return f"hf:{folder}"


def test_describe_clip_l(run, clip_l):
    code, out, err = run("describe", clip_l, "--layers", "11-22", "--experts", "4", "--text-dim", "768")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    # The default blocks of this model are the same, so they must show here as well.
    assert "Wrapped: blocks 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22" in lines
    assert any(line.startswith("Parameters per adapted block: 43,485,188 (experts 33,574,912") for line in lines)
    assert "Parameters in all: 521,822,256" in lines
    assert "Net of the FFNs replaced: 421,097,520" in lines
    assert any(line.endswith("(per image of 577 tokens, forward)") for line in lines)
    rows = [line.split() for line in lines if "CLIPMLP" in line]
    assert rows[0] == ["0", "encoder.layers.0.mlp", "CLIPMLP", "1024", ">", "4096", "8,393,728"]
    assert rows[11] == [
        "11",
        "encoder.layers.11.mlp",
        "CLIPMLP",
        "1024",
        ">",
        "4096",
        "8,393,728",
        "43,485,188",
    ]
    assert [len(row) for row in rows] == [7] * 11 + [8] * 12 + [7]
    assert run("describe", clip_l)[1] == out


def test_describe_as_json(run, clip_l):
    code, out, _ = run("describe", clip_l, "--json")
    facts = json.loads(out)
    assert (code, facts["depth"], facts["num_tokens"], facts["image_size"]) == (0, 24, 577, 336)
    assert facts["adapted_parameters"] == 521_822_256
    assert facts["net_parameters"] == 421_097_520
    # Two norms of 2 x 1024 in each of the blocks 0 to 22.
    assert facts["trained_parameters"] == 521_822_256 + 23 * 2 * 2 * 1024
    # The experts alone add three FFNs to each of the twelve blocks.
    assert facts["net_flops"] > 12 * 3 * 2 * 577 * 2 * 1024 * 4096


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"routing": "sparse", "top_k": 1, "experts": 3},
        {"routing": "uniform"},
        {"context": "concat", "layers": (0, -1)},
        {"context": "image", "train_norms": "none"},
        {"context": "text", "train_norms": "adapted"},
    ],
)
@pytest.mark.parametrize("source", ["timm:test_vit", "timm:test_vit3"])
def test_the_numbers_are_those_of_the_wrapped_model(source, settings):
    facts = gather(source, text_dim=32, **settings)
    vit = load_vit(source, pretrained=False)
    before = sum(p.numel() for p in vit.parameters())
    encoder = covft.wrap(vit, 32, **settings)
    assert facts["parameters"] == before
    assert facts["net_parameters"] == sum(p.numel() for p in vit.parameters()) - before
    assert facts["trained_parameters"] == sum(p.numel() for p in vit.parameters() if p.requires_grad)
    assert [block["index"] for block in facts["blocks"] if block["wrapped"]] == list(encoder.layers)
    for block in facts["blocks"]:
        if block["wrapped"]:
            slot = vit.get_submodule(f"{block['path']}.{block['mlp']}")
            assert sum(block["added"]["parameters"].values()) == sum(p.numel() for p in slot.parameters())


def test_the_flops_are_those_of_the_wrapped_model():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model, *inputs):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*inputs)
        return counter.get_total_flops()

    vit, images = load_vit("timm:test_vit", pretrained=False), torch.rand(1, 3, 160, 160)
    before = flops(vit, images)
    encoder = covft.wrap(vit, 32)
    assert gather("timm:test_vit", text_dim=32)["net_flops"] == flops(encoder, images, torch.rand(1, 32)) - before


def test_a_model_with_stages_has_no_single_number_of_tokens(run):
    code, out, _ = run("describe", "timm:test_vit_relpos", "--tokens", "50")
    assert (code, "per image of 50 tokens" in out) == (0, True)
    code, out, _ = run("describe", "timm:swin_tiny_patch4_window7_224", "--tokens", "50")
    assert (code, "the stages have different tokens" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("timm:test_vit", "--layers", "0-9"), "LayerIndexError: layers=range(0, 10)"),
        (("timm:test_vit", "--layers", "all"), "ConfigError: layers 'all' cannot be read"),
        (("timm:test_vit", "--experts", "0"), "ConfigError: experts=0"),
        (("timm:test_vit", "--routing", "soft"), "ConfigError: routing='soft' is not known"),
        (("timm:test_vit", "--text-dim", "30"), "ConfigError: num_heads=4 does not divide"),
        (("timm:resnet18",), "UnknownViTError"),
        (("timm:tset_vit",), "Known:    test_vit"),
        (("hf:nobody/nothing",), "hf download nobody/nothing"),
        (("vit_base",), "UnknownViTError: 'vit_base' does not say where"),
    ],
)
def test_errors_are_told_without_a_traceback(run, arguments, words):
    code, out, err = run("describe", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--tokens", "-5"), ("--tokens", "0"), ("--tokens", "x"), ("--text-dim", "0"), ("--top-k", "1.5")],
)
def test_numbers_that_cannot_be_used_are_refused_by_name(run, option, value):
    code, out, err = run("describe", "timm:test_vit", option, value)
    assert (code, out) == (2, "")
    assert f"Invalid value for '{option}'" in err


@pytest.mark.parametrize(
    ("annotation", "output", "words"),
    [
        ("https://example.org/rows.json", "table.safetensors", "https://example.org/rows.json"),
        ("none.json", "table.safetensors", "none.json cannot be read"),
        ("folder", "table.safetensors", "it is a folder"),
        ("rows.json", "folder", "CheckpointError: folder is a folder."),
        ("rows.json", "", "path=''"),
        ("rows.json", "a\0b", "cannot use path="),
    ],
)
def test_precompute_tells_what_it_cannot_read_or_write(run, tmp_path, monkeypatch, annotation, output, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a cup"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "0", "conversations": turns}]))
    code, out, err = run("precompute", annotation, output, "--text-encoder", "hash:8")
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "rows.json"]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("11-13", (11, 12, 13)), ("3,5,-2", (3, 5, -2)), ("0-1, 4", (0, 1, 4)), ("-1", (-1,)), ("7-7", (7,))],
)
def test_layers_are_read(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-", "5-3", "1,,2", "1.5", "--2", "-3--1"])
def test_layers_that_cannot_be_read_are_refused(text):
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_layers(text)


def test_version(run):
    code, out, _ = run("version")
    found = dict(line.split() for line in out.splitlines())
    assert code == 0
    assert found["covft"] == covft.__version__
    assert torch.__version__.startswith(found["torch"])
    assert {"timm", "open_clip_torch", "transformers", "sentence-transformers"} <= set(found)


def test_python_m_covft_and_version_import_no_torch():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['covft', 'version']\n"
        "try:\n    runpy.run_module('covft', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'timm', 'study'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"covft {covft.__version__}\n")
    assert done.stdout.endswith("[]\n")


def test_describe_all__prints_what_was_found_for_a_library(run):
    from covft.adapters.coverage import load_coverage

    coverage = load_coverage("transformers")
    code, out, err = run("describe", "--all", "transformers")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith(f"transformers {coverage.version}: {coverage.count()} models with attention, ")
    assert f"{coverage.count('wrapped')} wrapped, {coverage.count('refused')} refused" in lines[0]
    assert any(line.startswith("CLIPVisionModel wrapped 1 ") and " BND clip." in line for line in lines)
    assert any(line.startswith("MobileViTModel wrapped 1 ") and " (BP)ND mobilevit." in line for line in lines)
    assert any(line.startswith("EdgeTamVisionModel refused 1 it has no attention.") for line in lines)
    code, out, _ = run("describe", "--all", "transformers", "--json")
    assert code == 0
    assert len(json.loads(out)["rows"]) == len(coverage.rows)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--all", "keras"), "covft has no table for 'keras'"),
        ((), "takes a model, or --all and a library"),
        (("timm:test_vit", "--all", "timm"), "takes a model, or --all and a library"),
    ],
)
def test_describe__takes_a_model_or_a_library(run, arguments, told):
    code, out, err = run("describe", *arguments)
    assert (code, out) == (2, "")
    assert told in err


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == {
        "chat",
        "describe",
        "diagnose",
        "evaluate",
        "forgetting",
        "paper-table",
        "precompute",
        "report",
        "version",
    }
    names = ("chat", "describe", "diagnose", "evaluate", "forgetting", "paper-table", "precompute", "report", "version")
    for name in names:
        assert name in out


@pytest.mark.parametrize("missing", ["typer", "rich"])
@pytest.mark.parametrize("arguments", [[], ["version"]])
def test_a_missing_library_of_the_command_is_one_sentence_that_names_the_extra(missing, arguments):
    code = (
        f"import runpy, sys\nsys.modules[{missing!r}] = None\nsys.argv = ['covft', *{arguments!r}]\n"
        "runpy.run_module('covft', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'The covft command needs {missing}, which is not installed. Fix: pip install "covft[cli]"\n'


@pytest.mark.long
def test_describe_counts_low_rank_experts(clip_l):
    block = gather(clip_l, text_dim=768, expert_rank=8)["blocks"][11]["added"]
    shared, weights, thin = 8_393_728, 8_388_608, 8 * (1024 + 4096) * 2
    assert block["parameters"]["experts"] == shared + 4 * (thin + 4096 + 1024)  # a bias of their own each
    assert block["flops"]["experts"] == 2 * 577 * (weights + 4 * thin)
    whole = gather(clip_l, text_dim=768)["blocks"][11]["added"]
    for name in ("image_refinement", "text_refinement", "attention", "router"):
        assert block["parameters"][name] == whole["parameters"][name]
        assert block["flops"][name] == whole["flops"][name]


def test_describe_counts_updates_of_attentions(clip_l):
    facts = gather(clip_l, text_dim=768, layers=[11, 12], attention_rank=8)
    plain = gather(clip_l, text_dim=768, layers=[11, 12])
    updates = 4 * 8 * (1024 + 1024)  # queries, keys, values and the output
    for layer in (11, 12):
        added = facts["blocks"][layer]["added"]
        assert added["parameters"]["updates"] == updates
        assert added["flops"]["updates"] == 2 * 577 * updates
    assert facts["trained_parameters"] - plain["trained_parameters"] == 2 * updates
    assert facts["adapted_parameters"] - plain["adapted_parameters"] == 2 * updates


@pytest.mark.long
def test_describe_a_method(run, clip_l):
    code, out, err = run("describe", clip_l, "--method", "lora", "--option", "r=16", "--option", "targets=attention")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    trained = 24 * 4 * 16 * (1024 + 1024)  # queries, keys, values and the output of each block
    assert any(line.startswith("Method: lora (r=16, ") for line in lines)
    assert any(line.startswith(f"Trained parameters: {trained:,} (1.0") for line in lines)
    facts = json.loads(
        run("describe", clip_l, "--method=lora", "--option=r=16", "--option=targets=attention", "--json")[1]
    )
    assert (facts["trained_parameters"], facts["added_parameters"]) == (trained, trained)
    assert facts["forward_flops"] == 2 * 577 * trained
    assert facts["options"]["r"] == 16


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--method", "lora", "--layers", "3"], "layers are settings of covft"),
        (["--method", "lora", "--option", "r"], "has no value"),
        (["--method", "lora", "--option", "rank=3"], "has no option rank"),
        (["--method", "nothing"], "tuning method 'nothing' is not known"),
        (["--option", "r=3"], "cannot be options of covft"),
    ],
)
def test_describe_a_method__wrong_arguments(run, arguments, told):
    code, out, err = run("describe", "timm:test_vit", *arguments)
    assert (code, out) == (2, "")
    assert told in err

"""The fields of `CoVFTConfig` as options: of argparse, of covft's own command line and of the launchers."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from covft.cli import with_settings
from covft.config import CoVFTConfig
from covft.errors import ConfigError
from covft.integrations.codebases.launch import parse
from covft.utils.options import (
    add_options,
    given_options,
    method_options,
    options,
    parse_layers,
    parse_switch,
)

FIELDS = {field.name: field for field in dataclasses.fields(CoVFTConfig)}
# A value for every field, as it is typed and as it is set.
TYPED = {
    "layers": ("1,3-4,-2", (1, 3, 4, -2)),
    "experts": ("7", 7),
    "routing": ("sparse", "sparse"),
    "top_k": ("3", 3),
    "context": ("concat", "concat"),
    "train_norms": ("adapted", "adapted"),
    "activation": ("quick_gelu", "quick_gelu"),
    "num_heads": ("2", 2),
    "expert_rank": ("16", 16),
    "attention_rank": ("4", 4),
    "expert_init": ("noise", "noise"),
    "expert_init_scale": ("0.3", 0.3),
    "expert_init_seed": ("7", 7),
    "recompute": ("activation", "activation"),
    "router_aux_loss_coef": ("0.02", 0.02),
    "feature_layer": ("-2", -2),
    "instructions": ("clean", "clean"),
    "null_text": ("true", True),
    "null_text_rate": ("0.2", 0.2),
}


def parser_with(prefix="", without=()):
    parser = argparse.ArgumentParser()
    add_options(parser, prefix, without)
    return parser


def actions(parser):
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def typed(names, prefix=""):
    return [f"--{prefix}{name}={TYPED[name][0]}" for name in names]


def test_the_table_has_every_field():
    assert TYPED.keys() == FIELDS.keys()


@pytest.mark.parametrize("prefix", ["", "covft_"])
def test_add_options__every_field_with_its_help_and_default(prefix):
    found = actions(parser_with(prefix))
    assert list(found) == [f"{prefix}{name}" for name in FIELDS]
    explained = inspect.getdoc(CoVFTConfig).replace("`", "")
    for name, field in FIELDS.items():
        action = found[f"{prefix}{name}"]
        assert action.option_strings == [f"--{prefix}{name}"]
        shown = action.help.replace("%%", "%")
        if field.default is None:
            assert "default" not in shown
        else:
            assert shown.endswith(f" (default: {field.default})")
        sentence = shown.partition(" (default: ")[0]
        assert sentence.endswith(".")
        assert f"{name}: {sentence}" in " ".join(explained.split())


def test_add_options__words_show_their_choices_and_others_what_they_are():
    found = actions(parser_with())
    for name, action in found.items():
        choices = CoVFTConfig.choices(name)
        shown = {"layers": "11-22", "null_text": "true|false"}.get(name, "N")
        assert action.metavar == ("|".join(choices) if choices else shown)
    assert "--routing dense|sparse|uniform|random" in parser_with().format_help()


def test_add_options__leaves_out_what_it_is_told_to():
    assert actions(parser_with(without=("layers", "experts"))).keys() == FIELDS.keys() - {"layers", "experts"}
    assert [option.name for option in options(without=FIELDS.keys() - {"top_k"})] == ["top_k"]


@pytest.mark.parametrize("prefix", ["", "covft_"])
@pytest.mark.parametrize("name", FIELDS)
def test_given_options__has_only_what_was_given(name, prefix):
    parser = parser_with(prefix)
    assert given_options(parser.parse_args([]), prefix=prefix) == {}
    given = given_options(parser.parse_args(typed([name], prefix)), prefix=prefix)
    assert given == {name: TYPED[name][1]}
    assert getattr(CoVFTConfig(**{"experts": 4, **given}), name) == TYPED[name][1]


def test_given_options__a_default_that_was_typed_counts():
    default = CoVFTConfig().experts
    assert given_options(parser_with().parse_args([f"--experts={default}"])) == {"experts": default}


def test_given_options__takes_several_namespaces_and_ignores_what_is_not_its_own():
    one = argparse.Namespace(covft_experts=2, covft_layers="1-2", experts=9, text_encoder="hash:8")
    other = argparse.Namespace(covft_experts=3)
    assert given_options(one, other, prefix="covft_") == {"experts": 3, "layers": (1, 2)}


def test_a_wrong_word_is_refused_by_the_settings_and_not_by_the_parser():
    given = given_options(parser_with().parse_args(["--routing=densely"]))
    with pytest.raises(ConfigError, match="routing='densely' is not known"):
        CoVFTConfig(**given)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("TRUE", True)])
def test_parse_switch__reads_both_words(text, value):
    assert parse_switch(text) is value


@pytest.mark.parametrize("text", ["", "1", "yes", "truee"])
def test_parse_switch__refuses_the_rest(text):
    with pytest.raises(ConfigError, match="cannot be read") as raised:
        given_options(parser_with().parse_args([f"--null_text={text}"]))
    assert "true or false" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("7", (7,)),
        ("11-14", (11, 12, 13, 14)),
        ("4-4", (4,)),
        ("0,2-3,9", (0, 2, 3, 9)),
        ("-1", (-1,)),
        ("3,-2", (3, -2)),
        ("-2,3", (-2, 3)),
        (" 3, 5 - 6 ", (3, 5, 6)),
    ],
)
def test_parse_layers__reads_indices_and_spans(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("-2-5", "-2-5"),
        ("3--1", "3--1"),
        ("5-3", "5-3"),
        ("1,-4--2", "-4--2"),
        ("1,,2", ""),
        ("", ""),
        ("1-2-3", "1-2-3"),
        ("3,all", "all"),
        ("1.5", "1.5"),
        ("1-99999999999", "1-99999999999"),  # more than memory holds
        ("9" * 5000, "9" * 5000),  # more digits than Python reads
    ],
)
def test_parse_layers__names_what_cannot_be_read(text, part):
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        parse_layers(text)
    assert repr(text) in str(caught.value)
    assert caught.value.got == repr(part)
    with pytest.raises(ConfigError, match="cannot be read"):
        given_options(parser_with().parse_args([f"--layers={text}"]))


def by_argparse(arguments):
    return given_options(parser_with("covft_").parse_args(arguments), prefix="covft_")


def by_launcher(arguments):
    return parse("covft.integrations.codebases.llava", [*arguments, "--", "train.py"]).settings


def by_command(arguments):
    found = []

    @with_settings
    def command(settings: Any = None) -> None:
        found.append(settings)

    app = typer.Typer()
    app.command()(command)
    words = [argument.replace("--covft_", "--").partition("=") for argument in arguments]
    done = CliRunner().invoke(app, [f"{name.replace('_', '-')}={value}" for name, _, value in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return found[0]


READERS = [by_argparse, by_launcher, by_command]


@pytest.mark.parametrize("read", READERS)
def test_the_command_and_the_launchers_read_the_same_settings(read):
    assert read([]) == {}
    assert read(typed(["layers", "top_k"], "covft_")) == {name: TYPED[name][1] for name in ("layers", "top_k")}
    assert read(typed(FIELDS, "covft_")) == {name: value for name, (_, value) in TYPED.items()}


@pytest.mark.parametrize("read", READERS)
def test_the_command_and_the_launchers_refuse_the_same_layers(read):
    with pytest.raises(ConfigError, match=r"layers '-2-5' cannot be read"):
        read(["--covft_layers=-2-5"])


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("r=16", {"r": 16}),
        ("layers=11-13", {"layers": [11, 12, 13]}),
        ("layers=3,5,-2", {"layers": [3, 5, -2]}),
        ("layers=4", {"layers": [4]}),
        ("layers=[2,3]", {"layers": [2, 3]}),
        ("layers=null", {"layers": None}),
        ("deep=false", {"deep": False}),
        ("targets=attention", {"targets": "attention"}),
        ("expert-rank=1-3", {"expert_rank": "1-3"}),
    ],
)
def test_method_options__are_json__blocks_also_as_spans__all_else_text(typed, wanted):
    assert method_options("lora", {}, [typed]) == wanted

"""The settings: accepted and refused values, and their JSON."""

import dataclasses
import inspect
import itertools
import json
import typing
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import covft
from covft import CoVFTConfig
from covft.config import Settings
from covft.errors import ConfigError
from tests.helpers.snapshots import assert_unchanged, snapshot


@st.composite
def configs(draw):
    experts = draw(st.integers(1, 16))
    layers = st.none() | st.lists(st.integers(-48, 47), min_size=1, max_size=48, unique=True)
    return CoVFTConfig(
        layers=draw(layers),
        experts=experts,
        routing=draw(st.sampled_from(["dense", "sparse", "uniform", "random"])),
        top_k=draw(st.integers(1, experts)),
        context=draw(st.sampled_from(["cve", "image", "text", "concat"])),
        train_norms=draw(st.sampled_from(["all", "adapted", "none"])),
        activation=draw(st.sampled_from(["gelu", "quick_gelu"])),
        num_heads=draw(st.integers(1, 32)),
        expert_init=draw(st.sampled_from(["upcycled", "noise", "drop"])),
        expert_init_scale=draw(st.floats(0, 1)),
        expert_init_seed=draw(st.integers(0, 99)),
    )


@given(configs())
def test_json_gives_the_settings_back(config):
    again = CoVFTConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert CoVFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_holds_plain_values_under_the_names_of_the_keywords():
    assert json.loads(CoVFTConfig(layers=range(2, 5), experts=3, routing="sparse").to_json()) == {
        "layers": [2, 3, 4],
        "experts": 3,
        "routing": "sparse",
        "top_k": 2,
        "context": "cve",
        "train_norms": "all",
        "activation": "gelu",
        "num_heads": 4,
        "expert_rank": None,
        "attention_rank": None,
        "expert_init": "upcycled",
        "expert_init_scale": 0.1,
        "expert_init_seed": 0,
        "recompute": "all",
        "router_aux_loss_coef": 0.01,
        "feature_layer": None,
        "instructions": "as_given",
        "null_text": False,
        "null_text_rate": 0.1,
    }


@pytest.mark.parametrize("function", [covft.wrap, covft.attach])
def test_signatures_show_every_field_with_its_type_and_default(function):
    parameters = inspect.signature(function).parameters
    fields, types = dataclasses.fields(CoVFTConfig), typing.get_type_hints(CoVFTConfig)
    assert [parameters[field.name].default for field in fields] == [field.default for field in fields]
    assert {field.name: parameters[field.name].annotation for field in fields} == types
    assert all(parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY for field in fields)
    assert (parameters["experts"].default, parameters["experts"].annotation) == (4, int)
    assert "settings" not in parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert "experts: int = 4" in str(inspect.signature(function))


def test_fields_are_the_keywords_of_wrap():
    keywords = [p for p in inspect.signature(covft.wrap).parameters.values() if p.kind is p.KEYWORD_ONLY]
    shown = {p.name: repr(p.default) for p in keywords if p.name not in ("config", "adapter")}
    assert shown == {field.name: repr(field.default) for field in dataclasses.fields(CoVFTConfig)}


def test_keywords_for_editors_are_the_fields():
    fields, keywords = (typing.get_type_hints(cls) for cls in (CoVFTConfig, Settings))
    assert list(keywords) == list(fields)
    assert not Settings.__required_keys__  # each may be left out
    # Calls take any iterable of layers; a configuration keeps a tuple.
    assert keywords.pop("layers") == Iterable[int] | None
    assert fields.pop("layers") == tuple[int, ...] | None
    assert keywords == fields


def test_defaults_have_the_types_of_their_fields():
    for name, kind in typing.get_type_hints(CoVFTConfig).items():
        default = getattr(CoVFTConfig(), name)
        assert type(default) in (kind, *typing.get_args(kind)), name


@pytest.mark.parametrize("settings", [{"gate": 2}, {"num_experts": 4}, {"settings": {}}, {"Experts": 4}], ids=str)
def test_unknown_settings_of_wrap_are_refused_before_anything_has_changed(settings):
    vit = covft.testing.ToyViT()
    before = snapshot(vit)
    with pytest.raises(ConfigError, match=f"has no setting {next(iter(settings))}"):
        covft.wrap(vit, 4, **settings)
    assert_unchanged(vit, before)


def test_layers_may_be_any_iterable_of_whole_numbers():
    numpy = pytest.importorskip("numpy")
    for layers in (range(1, 4), [1, 2, 3], (1, 2, 3), iter([1, 2, 3]), numpy.arange(1, 4)):
        assert CoVFTConfig(layers=layers).layers == (1, 2, 3)
    assert all(type(layer) is int for layer in CoVFTConfig(layers=numpy.arange(3)).layers)
    assert CoVFTConfig().layers is None


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CoVFTConfig().experts = 8
    with pytest.raises(TypeError):
        CoVFTConfig(range(3))


REFUSED = [
    ({"experts": 0}, "experts=0 cannot be used.", "Expected: a whole number from 1", "Got:      0"),
    ({"experts": -2}, "experts=-2 cannot be used.", "Expected: a whole number from 1", "Got:      -2"),
    ({"experts": True}, "experts=True cannot be used.", "Expected: a whole number from 1", "Got:      True"),
    ({"experts": 2.0}, "experts=2.0 cannot be used.", "Expected: a whole number from 1", "Got:      2.0"),
    ({"experts": "4"}, "experts='4' cannot be used.", "Expected: a whole number from 1", "Got:      '4'"),
    ({"experts": None}, "experts=None cannot be used.", "Expected: a whole number from 1", "Got:      None"),
    ({"top_k": 0}, "top_k=0 cannot be used.", "Expected: a whole number from 1", "Got:      0"),
    ({"num_heads": 0}, "num_heads=0 cannot be used.", "Expected: a whole number from 1", "Got:      0"),
    ({"routing": "top1"}, "routing='top1' is not known.", "dense | sparse | uniform | random", "'top1'"),
    ({"routing": None}, "routing=None is not known.", "dense | sparse | uniform | random", "None"),
    ({"context": "both"}, "context='both' is not known.", "cve | image | text | concat", "Got:      'both'"),
    ({"train_norms": True}, "train_norms=True is not known.", "all | adapted | none", "Got:      True"),
    ({"activation": "relu"}, "activation='relu' is not known.", "gelu | quick_gelu", "Got:      'relu'"),
    ({"layers": 11}, "layers=11 cannot be used.", "an iterable of block indices", "Got:      int"),
    ({"layers": "11"}, "layers='11' cannot be used.", "an iterable of block indices", "Got:      str"),
    ({"layers": []}, "layers is empty", "at least one block index", "Got:      none"),
    ({"layers": [1, 1.5]}, "not a block index: 1.5", "whole numbers", "Got:      float"),
    ({"layers": [True]}, "not a block index: True", "whole numbers", "Got:      bool"),
    ({"layers": range(10**12)}, "names more blocks than any ViT has", "at most 10000 block indices", "range(0, 10000"),
    ({"layers": itertools.count()}, "names more blocks than any ViT has", "at most 10000", "Got:      count("),
    ({"experts": 10**30}, "cannot be used", "a whole number from 1 to 1048576", "Got:      1000000"),
    ({"layers": [3, 1, 3, 1]}, "layers names a block twice.", "each block once", "Got:      1, 3"),
    ({"routing": "sparse", "top_k": 5}, "top_k=5 asks for more", "top_k in [1, 4]  (experts=4)", "5"),
    ({"routing": "random", "experts": 1}, "top_k=2 asks for more", "top_k in [1, 1]  (experts=1)", "2"),
]


@pytest.mark.parametrize(("settings", "problem", "expected", "got"), REFUSED)
def test_impossible_values_are_refused(settings, problem, expected, got):
    with pytest.raises(ConfigError) as caught:
        CoVFTConfig(**settings)
    assert problem in caught.value.problem
    assert expected in str(caught.value)
    assert got in str(caught.value)


def test_a_wrong_name_comes_with_a_fix():
    with pytest.raises(ConfigError) as caught:
        CoVFTConfig(routing="top1")
    assert caught.value.fix == "routing='dense'"
    with pytest.raises(ConfigError) as caught:
        CoVFTConfig(layers=3)
    assert caught.value.fix == "layers=range(11, 23)"


@pytest.mark.parametrize("routing", ["dense", "uniform"])
def test_top_k_counts_only_where_it_is_used(routing):
    assert CoVFTConfig(experts=1, routing=routing).top_k == 2


def test_unknown_settings_are_named():
    with pytest.raises(ConfigError, match="has no setting gate, tok_p") as caught:
        CoVFTConfig.from_dict({"experts": 2, "tok_p": 1, "gate": 2})
    assert caught.value.got == "gate, tok_p"
    assert "experts, routing, top_k" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "is not JSON"), ("", "is not JSON"), ("[1]", "is not a JSON object"), ("3", "object")],
)
def test_other_texts_are_refused(text, problem):
    with pytest.raises(ConfigError, match=problem):
        CoVFTConfig.from_json(text)


def test_a_file_is_checked_like_a_call():
    with pytest.raises(ConfigError, match="experts=0"):
        CoVFTConfig.from_json('{"experts": 0}')


def test_routing_and_context_decide_on_router_and_text():
    table = {
        ("dense", "cve"): (True, True),
        ("dense", "image"): (True, False),
        ("sparse", "text"): (True, True),
        ("sparse", "concat"): (True, True),
        ("sparse", "image"): (True, False),
        ("uniform", "cve"): (False, False),
        ("random", "text"): (False, False),
    }
    for (routing, context), (has_router, needs_text) in table.items():
        config = CoVFTConfig(routing=routing, context=context)
        assert (config.has_router, config.needs_text) == (has_router, needs_text)


def test_reference_is_the_released_implementation():
    config = CoVFTConfig.reference()
    assert config == CoVFTConfig(
        experts=4, routing="dense", context="cve", activation="quick_gelu", num_heads=4, train_norms="all"
    )
    assert config != CoVFTConfig()
    assert CoVFTConfig.reference(layers=range(11, 23), experts=2).to_dict() == {
        **config.to_dict(),
        "layers": list(range(11, 23)),
        "experts": 2,
    }


def test_a_mixture_by_itself_has_the_defaults_of_the_settings():
    from covft.nn import ContextualMoE

    shown = inspect.signature(ContextualMoE).parameters
    for name, value in CoVFTConfig().of_each_block().items():
        assert shown[name].default == value, name
    assert shown["num_experts"].default == CoVFTConfig().experts

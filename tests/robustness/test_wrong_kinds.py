"""Every argument of every public function, with a value of every kind: a CoVFTError, or what the annotation lets in."""

from __future__ import annotations

import pytest

import covft
from covft import adapters, checkpoints, data, integrations, metrics, nn, testing, text
from covft.errors import CoVFTError
from tests.helpers.calls import EVERYTHING
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.worlds import VALUES, Call, World

SECONDS = ("attach", "match", "ConversationDataset", "compress", "diagnose")  # what is built anew for each wrong value
CALLS = [pytest.param(call, marks=pytest.mark.long if str(call) in SECONDS else ()) for call in EVERYTHING]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_wrong_kinds(call: Call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a path such as "nonsense" is a good one
    world = World(tmp_path)
    wrong = []
    for argument, annotation in call.arguments(world).items():
        for name, value in VALUES.items():
            given = {**call.needed(world), argument: value}
            before = [(model, snapshot(model)) for model in world.built()]
            try:
                call.function(world)(**given)
            except CoVFTError:
                for model, state in before:
                    assert_unchanged(model, state)
            except Exception as error:
                wrong.append(f"{argument}={name}: {type(error).__name__}: {error}")
            else:
                if name not in call.accepted(argument, annotation):
                    wrong.append(f"{argument}={name}: accepted")
                world = World(tmp_path)
    assert not wrong, "\n".join(wrong)


# Not called by users: protocols, what functions return, abstract bases, functions without arguments to spoil.
NOT_CALLED = {
    *("Adapter", "TextEncoder", "CachedTextEncoder", "ImageStore", "RowSource", "Tiling", "Router", "ContextExtractor"),
    *(
        "ContextEncoder",
        "ViTSpec",
        "BlockSpec",
        "BrokenRow",
        "DataError",
        "Encoded",
        "Place",
        "Row",
        "Routing",
        "TinyMLLM",
        "Trunk",
    ),
    *("Experts", "QuickGELU", "Recipe", "ViTTower", "given_options", "list_adapters", "whole_weights"),
    *("Averages", "Difference", "Estimate", "ForgettingReport"),
    "export",  # seconds for each graph; its own tests have what it refuses
    "MLLMTrainingArguments",  # most of its fields are those of transformers; ours are tested with it
}


def test_every_public_function_is_called():
    faces = (covft, adapters, checkpoints, text, integrations, data, metrics, testing, nn)
    public = {name for face in faces for name in face.__all__ if callable(getattr(face, name))}
    called = {call.name.partition(".")[0] for call in EVERYTHING}
    assert public - called == NOT_CALLED
    assert len({call.name for call in EVERYTHING}) == len(EVERYTHING)


def test_there_are_enough_calls(tmp_path):
    world = World(tmp_path)
    assert sum(len(call.arguments(world)) for call in EVERYTHING) * len(VALUES) > 3000

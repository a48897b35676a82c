"""Every argument of every public function, with a value of every kind: a CoVFTError, or what the annotation lets in."""

from __future__ import annotations

import pytest

from covft.errors import CoVFTError
from tests.helpers.calls import EVERYTHING, VALUES, Call, World
from tests.helpers.snapshots import assert_unchanged, snapshot

# A refused call may have made transformers install the hooks of a first call, which are not ours.
NOT_OURS = ("own_hooks",)


@pytest.mark.parametrize("call", EVERYTHING, ids=str)
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


def test_there_are_many():
    assert sum(len(VALUES) * len(call.arguments(World(None))) for call in EVERYTHING[:1]) > 0

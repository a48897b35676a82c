"""The diagnosis of the miniature runs; what it finds is measured by the command."""

from __future__ import annotations

import pytest

from covft.errors import ConfigError
from study.diagnosis import diagnose_tasks
from study.runs.settings import RunSettings

TINY = {"first_steps": 1, "train_scenes": 40, "batch": 8, "text_encoder": "bag_of_words"}


@pytest.mark.long
def test_tasks_and_halves_are_diagnosed_on_different_pictures() -> None:
    settings = RunSettings(tasks=("grounding", "caption"), **TINY)
    found = diagnose_tasks(settings, 16, steps=1, batch=4, rate=1e-4, permutations=19)
    assert list(found) == ["grounding and caption", "halves of grounding", "halves of caption"]
    assert found["grounding and caption"].kinds == {"caption": 8, "grounding": 8}
    assert found["halves of caption"].kinds == {"one half": 8, "other half": 8}
    blocks = found["grounding and caption"].conflict
    assert blocks.cosines[:-2].any((1, 2)).all()
    assert not blocks.cosines[-2].any(), "LLaVA does not read the last block"
    with pytest.raises(ConfigError, match="too few pictures"):
        diagnose_tasks(settings, 41)

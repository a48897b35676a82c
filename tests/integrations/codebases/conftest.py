"""Fixtures of tests with the stand-ins of LLaVA's and InternVL's own code."""

import pytest

from tests.helpers.codebases import STANDINS, forget, rows, save_clip, save_llm, tokenizer_for, write_json


@pytest.fixture
def llava_code(monkeypatch):
    """Their package on the path, and gone afterwards."""
    monkeypatch.syspath_prepend(str(STANDINS))
    forget("llava")
    yield
    forget("llava")


@pytest.fixture
def internvl_code(monkeypatch):
    """Their package on the path, and gone afterwards; what covft learned of its tower, too."""
    from covft.adapters import registry

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.syspath_prepend(str(STANDINS))
    forget("internvl")
    yield
    forget("internvl")


@pytest.fixture
def llava_home(tmp_path):
    """A language model, a tower and data."""
    save_clip(tmp_path / "clip")
    save_llm(tmp_path / "vicuna", tokenizer_for("v1"))
    questions = ["what is left of the cup?", "~who are you?", "how many people are there?", "~and where?"]
    write_json(tmp_path / "data.json", rows(*questions))
    return tmp_path


@pytest.fixture
def trainers(monkeypatch):
    """Every Trainer that is made, to look at afterwards."""
    import transformers

    made = []
    train = transformers.Trainer.train

    def spy(self, *args, **kwargs):
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        made.append(self)
        result = train(self, *args, **kwargs)
        self.end = {name: value.clone() for name, value in self.model.state_dict().items()}
        return result

    monkeypatch.setattr(transformers.Trainer, "train", spy)
    return made

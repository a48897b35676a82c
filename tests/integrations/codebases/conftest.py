"""Fixtures of tests with the stand-ins of LLaVA's and InternVL's own code, and of ms-swift."""

import importlib
import sys
from pathlib import Path

import pytest

from tests.helpers import ms_swift
from tests.helpers.codebases import STANDINS, forget, rows, save_clip, save_llm, tokenizer_for, write_json
from tests.helpers.mllms import BY_NAME


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


@pytest.fixture
def swift_tuners(monkeypatch):
    """What `--external_plugins` does with the plug-in: the tuners by the value of `--tuner_type`."""
    import transformers

    import covft.integrations.codebases.ms_swift as plugin

    stand_ins = ms_swift.modules()
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    for cls, name in [(ms_swift.Template, "pre_forward_hook"), (transformers.Trainer, "__init__")]:
        monkeypatch.setattr(cls, name, getattr(cls, name))  # patched until the process ends
    monkeypatch.setenv("COVFT_FLAGS", "--covft_text_encoder hash:16 --covft_layers 1-2")
    file = Path(plugin.__file__).parent / "covft_plugin.py"
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.delitem(sys.modules, "covft_plugin", raising=False)
    importlib.import_module("covft_plugin")
    plugins = stand_ins["swift.tuner_plugin"]
    assert all(issubclass(tuner, plugins.Tuner) for tuner in plugins.tuners_map.values())
    return plugins.tuners_map


@pytest.fixture
def swift_llava(monkeypatch):
    """A LLaVA of transformers, and its processor, wherever that is asked for."""
    import transformers

    kind = BY_NAME["llava"]
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *args, **kwargs: kind.tokenizer)
    return kind

"""LLaMA-Factory: the launcher calls `run_exp`, which a stand-in plays with a Trainer of transformers."""

import sys
from types import ModuleType

import pytest

import covft
from covft.errors import ConfigError, MissingDependencyError, ReentrantCheckpointError

transformers = pytest.importorskip("transformers", minversion="5.0")


@pytest.fixture
def factory(monkeypatch, tmp_path):
    """`llamafactory.train.tuner` with a `run_exp` that makes a Trainer as LLaMA-Factory's workflows do."""
    from tests.helpers.mllms import MLLMS

    kind = next(entry for entry in MLLMS if entry.name == "llava")
    made = []

    def read_args():
        return {"model_name_or_path": "tiny", **dict(override.split("=") for override in sys.argv[2:])}

    def run_exp(args=None, callbacks=None):
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
        model = kind.build()
        trainer = transformers.Trainer(
            model=model, args=arguments, processing_class=kind.tokenizer, callbacks=[*callbacks]
        )
        made.append((trainer, list(sys.argv), args))

    names = ("llamafactory", "llamafactory.train", "llamafactory.train.tuner")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].run_exp = run_exp
    sys.modules[names[-1]].read_args = read_args
    return made


def test_the_model_is_attached_and_the_yaml_file_is_read(factory):
    from covft.integrations.codebases.llama_factory import main

    before = list(sys.argv)
    flags = ["--covft_text_encoder", "hash:16", "--covft_layers", "1-2", "--covft_empty_instruction", "nothing"]
    main([*flags, "--", "train.yaml", "learning_rate=1e-5"])
    ((trainer, argv, settings),) = factory
    assert argv[1:] == ["train.yaml", "learning_rate=1e-5"]
    assert sys.argv == before
    assert settings == {"model_name_or_path": "tiny", "learning_rate": "1e-5", "use_reentrant_gc": False}
    assert covft.get_encoder(trainer.model).layers == (1, 2)
    assert trainer.model.forward.attachment.reader.empty_instruction == "nothing"


def test_a_chat_template_has_no_effect(factory):
    from covft.integrations.codebases.llama_factory import main

    with pytest.raises(ConfigError, match="has no effect"):
        main(["--covft_chat_template", "chatml", "--", "train.yaml"])
    assert factory == []


@pytest.mark.parametrize("key", ["use_reentrant_gc", "use_unsloth_gc"])
def test_reentrant_checkpointing_that_the_file_asks_for_is_refused(factory, key):
    from covft.integrations.codebases.llama_factory import main

    before = list(sys.argv)
    with pytest.raises(ReentrantCheckpointError, match=f"Fix: +{key}: false in train.yaml"):
        main(["--covft_text_encoder", "hash:16", "--", "train.yaml", f"{key}=true"])
    assert factory == []
    assert sys.argv == before
    main(["--covft_text_encoder", "hash:16", "--", "train.yaml", f"{key}=true", "disable_gradient_checkpointing=true"])
    assert factory[0][2][key] == "true"


def test_not_installed():
    from covft.integrations.codebases.llama_factory import main

    with pytest.raises(MissingDependencyError, match="not installed"):
        main(["--", "train.yaml"])

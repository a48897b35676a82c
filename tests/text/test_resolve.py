"""Everything that can be passed as a text encoder."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from covft.errors import CheckpointError, MissingDependencyError, TextEncoderError
from covft.testing import HashTextEncoder
from covft.text import (
    CallableTextEncoder,
    HFTextEncoder,
    OpenCLIPTextEncoder,
    PrecomputedFeatures,
    SentenceTransformersEncoder,
    as_text_encoder,
)

TEXTS = ["What is left of the cup?", "a cat"]


@pytest.fixture
def without_sentence_transformers(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sentence_transformers" else real(name)
    )


def test_an_int_is_a_width():
    encoder = as_text_encoder(768)
    assert isinstance(encoder, PrecomputedFeatures)
    assert encoder.text_dim == 768


def test_a_function_is_called():
    assert isinstance(as_text_encoder(lambda texts: torch.ones(len(texts), 4)), CallableTextEncoder)


def test_a_module_of_the_users_own_is_called():
    class Model(nn.Module):
        def forward(self, texts):
            return torch.ones(len(texts), 4)

    assert isinstance(as_text_encoder(Model()), CallableTextEncoder)


def test_a_text_encoder_is_returned_as_it_is():
    class Own:
        name = "own"
        text_dim = 3

        def encode(self, texts):
            return torch.ones(len(texts), 3)

    for encoder in (Own(), HashTextEncoder(4)):
        assert as_text_encoder(encoder) is encoder


def test_models_are_recognised_by_their_library(make_bert, bert_tokenizer, minilm_folder):
    from open_clip.model import CLIP
    from sentence_transformers import SentenceTransformer

    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 32}
    clip = CLIP(8, vision, {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1})
    assert isinstance(as_text_encoder(clip), OpenCLIPTextEncoder)
    assert isinstance(as_text_encoder(SentenceTransformer(minilm_folder)), SentenceTransformersEncoder)

    class Mine(type(make_bert())):
        """Users subclass."""

    mine = Mine(make_bert().config)
    assert isinstance(as_text_encoder(mine), HFTextEncoder)
    pair = as_text_encoder((mine, bert_tokenizer), pooling="mean")
    assert pair.pooling == "mean"
    assert pair.encode(TEXTS).shape == (2, 16)


def test_a_folder_of_sentence_transformers_gives_its_features(minilm_folder):
    encoder = as_text_encoder(Path(minilm_folder))
    assert isinstance(encoder, SentenceTransformersEncoder)
    torch.testing.assert_close(encoder.encode(TEXTS).norm(dim=-1), torch.ones(2))


def test_the_same_features_without_that_library(minilm_folder, without_sentence_transformers):
    encoder = as_text_encoder(minilm_folder)
    assert isinstance(encoder, HFTextEncoder)
    expected = SentenceTransformersEncoder(minilm_folder)
    torch.testing.assert_close(encoder.encode(TEXTS), expected.encode(TEXTS), rtol=0, atol=1e-6)
    assert encoder.max_length == expected.max_length == 256


def test_a_folder_that_needs_that_library_says_so(minilm_folder, tmp_path, without_sentence_transformers):
    folder = tmp_path / "dense"
    shutil.copytree(minilm_folder, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(MissingDependencyError, match=r"covft\[sentence-transformers\]"):
        as_text_encoder(str(folder))


def test_pooling_asks_for_the_transformer_itself(minilm_folder):
    encoder = as_text_encoder(minilm_folder, pooling="cls")
    assert isinstance(encoder, HFTextEncoder)
    assert encoder.pooling == "cls"


@pytest.mark.parametrize("other", [768, len, HashTextEncoder(4)])
def test_pooling_is_refused_by_encoders_without_a_choice(other):
    with pytest.raises(TextEncoderError, match="does not apply"):
        as_text_encoder(other, pooling="mean")


@pytest.mark.parametrize("made", [PrecomputedFeatures(5), HashTextEncoder(7)])
def test_names_give_the_encoder_back(made):
    again = as_text_encoder(made.name)
    assert (type(again), again.name, again.text_dim) == (type(made), made.name, made.text_dim)


@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"normalize": True, "max_length": 9}, {}])
def test_a_name_gives_the_same_features_back(minilm_folder, options):
    from transformers import AutoModel

    # Without its settings the folder would mean sentence-transformers: other features, of the same width.
    made = HFTextEncoder(AutoModel.from_pretrained(minilm_folder), **options)
    again = as_text_encoder(made.name)
    assert (again.name, again.max_length) == (made.name, made.max_length)
    assert torch.equal(again.encode(TEXTS), made.encode(TEXTS))
    assert not torch.allclose(again.encode(TEXTS), as_text_encoder(minilm_folder).encode(TEXTS), atol=1e-2)


def test_a_folder_may_have_a_question_mark_in_its_name(make_bert, bert_tokenizer, tmp_path):
    folder = tmp_path / "which?one=this"
    make_bert().save_pretrained(folder)
    bert_tokenizer.save_pretrained(folder)
    assert as_text_encoder(folder).encode(TEXTS).shape == (2, 16)


@pytest.mark.parametrize(
    "name", ["callable:embed", "transformers:BertModel?pooling=cls", "open_clip:CLIP()", "local:bert"]
)
def test_names_that_cannot_give_it_back_say_so(name):
    with pytest.raises(TextEncoderError, match="pass it again"):
        as_text_encoder(name)


@pytest.mark.parametrize("other", [None, True, 1.5, ["text"], HashTextEncoder, {"a": 1}])
def test_anything_else_is_refused_with_what_is_accepted(other):
    with pytest.raises(TextEncoderError, match=r"a model id or folder.*callable.*int C"):
        as_text_encoder(other)


def test_an_id_that_is_not_cached_says_what_to_do():
    with pytest.raises(TextEncoderError, match="hf download"):
        as_text_encoder("nobody/no-such-model")


@pytest.mark.long
def test_importing_and_using_it_imports_no_model_library():
    code = (
        "import sys, torch\n"
        "from covft.text import as_text_encoder\n"
        "as_text_encoder(4)\n"
        "as_text_encoder(lambda texts: torch.ones(len(texts), 4)).encode(['a'])\n"
        "libraries = {'transformers', 'open_clip', 'timm', 'sentence_transformers'}\n"
        "print(sorted(libraries & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


EVIL_MODULES = [
    "evil.Model",
    "os.system",
    "torch",
    "sentence_transformers.util.torch",
    "sentence_transformers.models.Router",
    "sentence_transformers.models.WordEmbeddings",
    "sentence_transformers.models.Transformer.evil",
    " sentence_transformers.models.Pooling",
]


@pytest.mark.parametrize("name", EVIL_MODULES)
def test_classes_of_a_repository_are_not_loaded(name, minilm_folder, tmp_path):
    folder = tmp_path / "evil"
    shutil.copytree(minilm_folder, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "", "type": name})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(TextEncoderError, match="does not load from a file"):
        as_text_encoder(str(folder))
    with pytest.raises(TextEncoderError, match="does not load from a file"):
        SentenceTransformersEncoder(str(folder))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("file", ["sentence_bert_config.json", "sentence_xlnet_config.json"])
@pytest.mark.parametrize("arguments", [{"weights_only": False}, {"trust_remote_code": True}])
def test_arguments_of_a_repository_cannot_ask_for_code(file, arguments, minilm_folder, tmp_path):
    folder = tmp_path / "evil"
    shutil.copytree(minilm_folder, folder)
    (folder / file).write_text(json.dumps({"max_seq_length": 64, "model_args": arguments}))
    with pytest.raises(CheckpointError, match="asks for code"):
        as_text_encoder(str(folder))


@pytest.mark.parametrize("text", ["{", "3", "[1]", '[{"path": ""}]', "\ufeff[]"])
def test_a_damaged_list_of_modules_is_an_error(text, minilm_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(minilm_folder, folder)
    (folder / "modules.json").write_text(text, encoding="utf-8")
    with pytest.raises(TextEncoderError, match=r"modules\.json of .* cannot be read"):
        as_text_encoder(str(folder))


def test_pickled_weights_are_not_unpickled(make_bert, bert_tokenizer, tmp_path):
    """Weights of a repository whose pickle calls a function leave no trace."""
    model = make_bert()
    model.config.save_pretrained(tmp_path / "evil")
    bert_tokenizer.save_pretrained(tmp_path / "evil")
    torch.save({**model.state_dict(), "x": Evil(tmp_path / "trace")}, tmp_path / "evil" / "pytorch_model.bin")
    with pytest.raises(TextEncoderError):
        as_text_encoder(str(tmp_path / "evil"))
    assert not (tmp_path / "trace").exists()


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")

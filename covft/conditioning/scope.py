"""Carries the text of a call to the FFNs that run in it, and in every recomputation of it.

Shapes: B images, S texts, C text_dim, N tokens of an image.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from covft.adapters.input_format import InputFormat
from covft.conditioning.draws import Draws
from covft.conditioning.open_scopes import Generator, OpenScopes
from covft.conditioning.tower_call import TowerCall
from covft.errors import MissingContextError, ReentrantCheckpointError, ShapeError
from covft.nn.segments import Segments
from covft.utils.torch_internals import (
    check_torch,
    checkpoint_frames,
    graph_task,
    in_backward,
    inside_autograd_function,
)


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


class Conditioning:
    """Carries the text of one encoder's calls to its FFNs.

    One object per encoder, shared by reference with its FFNs. Copies and pickles of it are empty: open scopes belong
    to the calls that are running, not to the model.

    Attributes:
        reentrant_key: What switches reentrant checkpointing off, for the error; a trainer's callback knows better.

    Args:
        format: How images reach the ViT.
        needs_text: Whether text is read, so that a call without text is an error.
        has_null_text: Whether a call without text is no error, because a null text stands for it.
        draws_seeds: Whether runs of the tower get a seed (random routing).
        has_batch_norm: Whether the ViT has batch norms, whose statistics are kept as they are.

    Raises:
        UnsupportedVersionError: If activation checkpointing of this torch cannot be followed.
    """

    reentrant_key = "gradient_checkpointing_kwargs={'use_reentrant': False}"

    def __init__(
        self,
        format: InputFormat | None = None,
        *,
        needs_text: bool = True,
        draws_seeds: bool = False,
        has_batch_norm: bool = False,
        has_null_text: bool = False,
    ) -> None:
        check_torch()
        self.format = InputFormat() if format is None else format
        self.needs_text = needs_text
        self.draws_seeds = draws_seeds
        self.has_batch_norm = has_batch_norm
        self.has_null_text = has_null_text
        self._open = OpenScopes()
        self._draws = Draws()
        self._noted: weakref.WeakKeyDictionary[Any, Scope] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        settings = (self.needs_text, self.draws_seeds, self.has_batch_norm, self.has_null_text)
        return (_rebuild, (self.format, *settings))

    def enter(
        self,
        text_features: Tensor | None,
        index: Tensor | None = None,
        *,
        shared: bool = False,
        generator: Generator | None = None,
        text_mask: Tensor | None = None,
        without_text: Tensor | None = None,
    ) -> Scope:
        """Open a scope; `leave` must follow, whatever happens in between.

        Args:
            text_features: Shape `(S, C)` or `(S, L, C)`; None where the routing needs no text.
            index: Which text each image has, shape `(B,)`.
            shared: Whether the one text is for all images.
            generator: The generator that may be suspended before `leave`; None if there is none.
            text_mask: Which token states are not padding, shape `(S, L)`.
            without_text: Which rows of the features stand for no text, shape `(S,)`.
        """
        scope = Scope(
            text_features,
            index,
            shared=shared,
            seed=self.new_seed(),
            text_mask=text_mask,
            without_text=without_text,
        )
        scope.generator = generator
        self._open.open(scope)
        return scope

    def leave(self, scope: Scope) -> None:
        """Close a scope, and no other one."""
        self._open.close(scope)

    def scope(self) -> Scope | None:
        """Return the scope that the running code belongs to; None if there is none.

        During backward that is the scope of the original forward. Finding it also notes it for the checkpoint frames
        around the caller, so that their recomputation finds it again.
        """
        if torch.compiler.is_compiling():
            return self._open.innermost()
        frames = checkpoint_frames()
        for scope in self._open.inside_out():
            if scope.holds_in(frames):
                self._note(scope, frames)
                return scope
        for frame in frames:
            scope = self._noted.get(frame)
            if scope is not None:
                return scope
        return None

    def require(self) -> Scope | None:
        """Return the scope of the caller, checked.

        Raises:
            MissingContextError: If the routing needs text and there is none.
        """
        scope = self.scope()
        missing = scope is None or scope.text_features is None
        if missing and self.needs_text and not self.has_null_text:
            raise self._missing()
        return scope

    def enter_tower(self, vit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Check the batch before any compute and open the run's scope; a forward pre-hook of the ViT.

        Raises:
            MissingContextError: If no text was given.
            ShapeError: If the text is for another number of images, or images are packed in a way that is not known.
        """
        parent = self.require()
        call = TowerCall.read(self.format, vit, args, kwargs)
        if parent is not None and call.num_images is not None:
            parent.text_for(call.num_images)
        if self.has_batch_norm and vit.training:
            freeze_batch_norms(vit)
        seed = self.new_seed(replaces_texts=vit.training)
        if parent is None:
            scope = Scope(None, seed=seed, call=call)
        else:
            text, index = parent.text_features, parent.index
            mask = parent.text_mask
            scope = Scope(text, index, shared=parent.shared, seed=seed, call=call, parent=parent, text_mask=mask)
            scope.groups, scope.without_text = parent.groups, parent.without_text
        self._open.open(scope)

    def leave_tower(self, vit: nn.Module, args: tuple, output: Any) -> None:
        """Close the run's scope; a forward hook of the ViT, called even when it raised."""
        scope = self._open.innermost(lambda scope: scope.call is not None)
        if scope is not None:
            self._open.close(scope)
            if scope.parent is not None:
                scope.parent.ran = scope.call

    def segments_after(self, scope: Scope, x: Tensor) -> Segments | None:
        """Return which tokens that a packed tower has computed belong to which image; None for other towers.

        Args:
            scope: The scope of what reads them, in the tower or after it.
            x: Tokens `(T, D)` or `(1, T, D)`, equally many neighbours of each image merged into one, or none.

        Raises:
            ShapeError: If the tower is packed and has not run.
        """
        if not self.format.is_packed:
            return None
        call = scope.ran if scope.call is None else scope.call
        if call is None or call.segments is None:
            raise ShapeError(
                "What reads the tokens of a packed tower runs alone, so where each image begins is not known.",
                expected=f"a call of the tower before it, with {self.format.sizes_argument}=",
                got="a call of the connector",
            )
        return call.segments.merged(x.shape[-2]).to(x.device)

    def segments_of(self, scope: Scope | None, x: Tensor) -> Segments | None:
        """Return which tokens of a packed tower's FFN belong to which image; None for other towers.

        Args:
            scope: The scope of the FFN that runs.
            x: Tokens as the FFN gets them.

        Raises:
            ShapeError: If the tower is packed and this is not a run of it.
        """
        if not self.format.is_packed:
            return None
        if scope is None or scope.call is None or scope.call.segments is None:
            raise ShapeError(
                "A block of a packed tower runs alone, so where each image begins is not known.",
                expected=f"a call of the tower, with {self.format.sizes_argument}=",
                got="a call of the block",
            )
        return scope.call.segments_for(x)

    def check_gradients(self, scope: Scope | None, *, training: bool) -> None:
        """Refuse to run without gradients inside a run of the tower that has them, whose backward would miss them.

        A run that is without gradients as a whole is fine, unless reentrant checkpointing has switched them off.

        Args:
            scope: The scope of the FFN that runs.
            training: Whether that FFN is in training mode.

        Raises:
            ReentrantCheckpointError: If gradients would be lost silently.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        in_tower = scope is not None and scope.call is not None
        if inside_autograd_function() or (training and in_tower and scope.grad_enabled):  # type: ignore[union-attr]
            raise ReentrantCheckpointError(
                "A context-aware ViT in training runs without gradients, so its experts would get none.",
                expected="non-reentrant activation checkpointing, and no torch.no_grad() inside the ViT",
                got="reentrant activation checkpointing, or blocks that run under torch.no_grad()",
                fix=f"{self.reentrant_key}; for evaluation, encoder.eval()",
            )

    def _note(self, scope: Scope, frames: list[Any]) -> None:
        opened_in = scope.frame
        with self._lock:
            for frame in frames:
                if frame is opened_in:
                    return
                self._noted[frame] = scope

    def new_seed(self, *, replaces_texts: bool = False) -> int | None:
        """Draw a seed, the same in a recomputation as in its forward; None where nothing is drawn with it.

        Args:
            replaces_texts: Whether texts are about to be replaced by the null text, if there is one.
        """
        return self._draws.next() if self.draws_seeds or (self.has_null_text and replaces_texts) else None

    def _missing(self) -> MissingContextError:
        problem, fix = "A context-aware ViT was called without text.", "encoder(images, ['the question', ...]), or "
        if in_backward():
            problem = "A context-aware ViT is recomputed during backward, and its forward left no text for that."
        elif self._open.has_suspended():
            problem = "A context-aware ViT was called beside a generator that holds a text, but is suspended."
            fix = "contextlib.contextmanager around that generator; or encoder(images, texts), or "
        return MissingContextError(
            problem,
            expected="text features for every image",
            got="none",
            fix=fix + "`with encoder.condition(texts):` around the call",
        )


def _rebuild(
    format: InputFormat, needs_text: bool, draws_seeds: bool, has_batch_norm: bool, has_null_text: bool
) -> Conditioning:
    return Conditioning(
        format,
        needs_text=needs_text,
        draws_seeds=draws_seeds,
        has_batch_norm=has_batch_norm,
        has_null_text=has_null_text,
    )


def freeze_batch_norms(module: nn.Module) -> None:
    """Keep the statistics of batch norms: they belong to the frozen ViT, as weights do.

    Args:
        module: A ViT or a part of it, in training mode.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            part.training = False


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

"""Carries the text of a call to the FFNs that run in it, and in every recomputation of it.

Shapes: B images, S texts, C text_dim, T tokens of a packed batch, D embed_dim.
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
from covft.conditioning.scope import Scope
from covft.conditioning.tower_call import TowerCall
from covft.errors import MissingContextError, ReentrantCheckpointError, ShapeError
from covft.nn.segments import Segments
from covft.utils.modes import freeze_batch_norms
from covft.utils.torch_internals import check_torch, checkpoint_frames, in_backward, inside_autograd_function


class Conditioning:
    """Carries the text of one encoder's calls to its FFNs.

    One object per encoder, shared by reference with its FFNs. Copies and pickles of it are empty: open scopes belong
    to the calls that are running, not to the model.

    Attributes:
        reentrant_key: What switches reentrant checkpointing off, for the error; a trainer's callback knows better.

    Args:
        format: How images reach the ViT.
        needs_text: Whether text is read, so that a call without text is an error.
        has_null_text: Whether a null text stands for a missing one, so that a call may have no text.
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
            scope: The scope of the module that reads these tokens, in the tower or after it.
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

"""How the text of a call reaches the FFNs, in the forward pass and in every recomputation of it.

A ViT's blocks pass tokens and nothing else to their FFNs, so the text has to come by another way. Two
things make that hard, and this module owns both.

**Scopes.** `Conditioning.open(...)` puts a `Scope` (text features, an index from images to texts) on a
stack that belongs to one encoder and one thread; each run of the tower adds a scope of its own with
what only that run knows (the padding mask, where each image of a packed batch begins, the seed of random
routing). An FFN reads the top one.

**Recomputation.** Activation checkpointing runs an FFN again during backward: after the scope was
closed, after a second forward with other texts, with yet another scope open, or on another thread.
Whatever is on the stack then is not evidence. What is: torch keeps one *frame* object for every
checkpointed region and shows it, in the original forward and in the recomputation alike, to
whoever looks at the stack of saved-tensor hooks. So an FFN that runs inside a frame notes its scope
for that frame, weakly, and a recomputation asks the frame. A scope on the stack counts during
backward only if it was opened inside the very recomputation that is running, which is what happens
when a checkpoint encloses the whole encoder call.

Reentrant checkpointing has no frames. It runs the forward without gradients and would leave a frozen
tower's experts without any, in silence: it is recognised and refused.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

from covft.errors import MissingContextError, ReentrantCheckpointError, ShapeError
from covft.nn.segments import Segments


class Scope:
    """What holds for the FFNs that run inside it.

    Attributes:
        text_features: Shape `(S, C)`, one row per text; None where no text was given.
        index: Which text each image belongs to, shape `(B,)`; None where image i has text i.
        shared: Whether the one text is for all images, however many.
        mask_BN: True where a token counts, shape `(B, N)`; None where all do.
        segments: Which tokens belong to which image, in a run of a packed tower; None elsewhere.
        num_images: Images in a run of the tower; None where its input does not tell.
        seed: Of random routing in training mode.
        per_row: Images per row of a batch whose rows may all be repeated before the ViT runs, as `generate` does for
            beams; None where nothing is repeated.
        grad_enabled: Whether gradients were on where the text was given.
        is_run: Whether this is one run of the tower, rather than a text that was given.
    """

    __slots__ = (
        "__weakref__",
        "_frame",
        "_graph_task",
        "grad_enabled",
        "index",
        "is_run",
        "mask_BN",
        "num_images",
        "per_row",
        "seed",
        "segments",
        "shared",
        "text_features",
    )

    def __init__(
        self,
        text_features: Tensor | None,
        index: Tensor | None = None,
        mask_BN: Tensor | None = None,
        seed: int | None = None,
        *,
        segments: Segments | None = None,
        shared: bool = False,
    ) -> None:
        self.text_features = text_features
        self.index = index
        self.shared = shared
        self.mask_BN = mask_BN
        self.segments = segments
        self.num_images: int | None = None
        self.per_row: int | None = None
        self.seed = seed
        self.grad_enabled = torch.is_grad_enabled()
        self.is_run = False
        self._graph_task = -1
        self._frame = None
        if not torch.compiler.is_compiling():
            self._graph_task = torch._C._current_graph_task_id()
            innermost = next(iter(_checkpoint_frames()), None)
            self._frame = None if innermost is None else weakref.ref(innermost)

    @property
    def frame(self) -> Any:
        """The innermost checkpoint frame that the scope was opened in; None outside of any."""
        return None if self._frame is None else self._frame()

    def holds_in(self, frames: list[Any]) -> bool:
        """Whether code that runs now, inside `frames`, runs inside this scope."""
        if self._graph_task != torch._C._current_graph_task_id():
            return False
        return self._frame is None or self.frame in frames

    def text_for(self, num_images: int) -> Tensor | None:
        """The text features of each image, shape `(num_images, C)`.

        Raises:
            ShapeError: If the text is for another number of images.
        """
        if self.text_features is None:
            return None
        if self.shared:
            return self.text_features.expand(num_images, -1)
        index, expected = self.index, len(self.text_features) if self.index is None else len(self.index)
        if self.per_row and expected and num_images > expected and num_images % expected == 0:
            each = torch.arange(expected, device=self.text_features.device) if index is None else index
            index = each.view(-1, self.per_row).repeat_interleave(num_images // expected, dim=0).flatten()
        elif expected != num_images:
            raise ShapeError(
                f"The ViT sees {num_images} images, but the text is for {expected}.",
                expected=f"one text per image, or index= of shape ({num_images},) that says which text each has",
                got=f"{len(self.text_features)} texts, "
                + ("no index" if self.index is None else f"index of shape {tuple(self.index.shape)}"),
                fix="encoder(images, texts, index=torch.tensor([...]))",
            )
        return self.text_features if index is None else self.text_features[index]


class Conditioning:
    """Carries the text of one encoder's calls to its FFNs.

    One object per encoder, shared by reference with its FFNs. Copies and pickles of it are empty:
    what is open belongs to the calls that are running, not to the model.

    Args:
        needs_text: Whether a call without text is an error.
        draws_seeds: Whether runs of the tower get a seed (random routing).
        mask_argument: Name of the ViT's argument that marks real tokens, shape `(B, N)`, or None.
        mask_unit: Where an entry of the mask stands for a tile: how many of its tokens are real, those behind them
            being padding. None where it stands for a token.
        image_axes: How many leading axes of the ViT's input, and of the mask, count images.
        sizes_argument: Name of the argument of a packed ViT that has the sides of each image, or None.
        sizes_unit: The length of a side that makes one token.
        mask_padding: Where the mask's argument tells several numbers of each token: what all are for padding.
        sizes_square: Where sides count squares of tokens: how many tokens such a square is high and wide.
        merges: Whether tokens of a packed ViT are merged on the way, equally many into one.
        mask_prefix: Tokens of an image before those that the mask, or its sides, are about; they all count.
        has_batch_norm: Whether the ViT has batch norms, whose statistics are kept as they are.
    """

    def __init__(
        self,
        *,
        needs_text: bool = True,
        draws_seeds: bool = False,
        mask_argument: str | None = None,
        mask_unit: int | None = None,
        image_axes: int = 1,
        sizes_argument: str | None = None,
        sizes_unit: int = 1,
        mask_padding: int | None = None,
        sizes_square: int = 1,
        merges: bool = False,
        mask_prefix: int = 0,
        has_batch_norm: bool = False,
    ) -> None:
        self.needs_text = needs_text
        self.draws_seeds = draws_seeds
        self.mask_argument = mask_argument
        self.mask_unit = mask_unit
        self.image_axes = image_axes
        self.sizes_argument = sizes_argument
        self.sizes_unit = sizes_unit
        self.mask_padding = mask_padding
        self.sizes_square = sizes_square
        self.merges = merges
        self.mask_prefix = mask_prefix
        self.has_batch_norm = has_batch_norm
        self._local = _Local()
        self._noted: weakref.WeakKeyDictionary[Any, Scope] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return (_rebuild, ({name: getattr(self, name) for name in _SETTINGS},))

    @contextlib.contextmanager
    def open(
        self, text_features: Tensor | None, index: Tensor | None = None, *, shared: bool = False
    ) -> Iterator[Scope]:
        """Hold text features for the calls made inside.

        Args:
            text_features: Shape `(S, C)`; None where the routing needs no text.
            index: Which text each image belongs to, shape `(B,)`.
            shared: Whether the one text is for all images.
        """
        scope = self.enter(text_features, index, shared=shared)
        try:
            yield scope
        finally:
            self.leave(scope)

    def enter(self, text_features: Tensor | None, index: Tensor | None = None, *, shared: bool = False) -> Scope:
        """Open a scope; `leave` must follow, whatever happens in between."""
        scope = Scope(text_features, index, seed=self._new_seed(), shared=shared)
        self._local.stack.append(scope)
        return scope

    def leave(self, scope: Scope) -> None:
        """Close a scope, and whatever an exception left open inside it."""
        stack = self._local.stack
        while stack and stack.pop() is not scope:
            pass

    def scope(self) -> Scope | None:
        """The scope that the code running now belongs to; None if there is none.

        During backward that is the scope of the original forward. Finding it also notes it for the
        checkpoint frames around the caller, so that their recomputation will find it again.
        """
        stack = self._local.stack
        if torch.compiler.is_compiling():
            return stack[-1] if stack else None
        frames = _checkpoint_frames()
        for scope in reversed(stack):
            if scope.holds_in(frames):
                self._note(scope, frames)
                return scope
        for frame in frames:
            scope = self._noted.get(frame)
            if scope is not None:
                return scope
        return None

    def require(self) -> Scope | None:
        """The scope of the caller, checked.

        Raises:
            MissingContextError: If the routing needs text and there is none.
        """
        scope = self.scope()
        if self.needs_text and (scope is None or scope.text_features is None):
            raise MissingContextError(
                "A context-aware ViT was called without text."
                if torch._C._current_graph_task_id() == -1
                else "A context-aware ViT is run again during backward, and its forward left no text for that.",
                expected="text features for every image",
                got="none",
                fix="encoder(images, ['the question', ...]), or `with encoder.condition(texts):` around the call",
            )
        return scope

    def enter_tower(self, vit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the ViT: check the batch before any compute and open the run's scope.

        Raises:
            MissingContextError: If no text was given.
            ShapeError: If the text is for another number of images, or images are packed in a way that is not known.
        """
        parent = self.require()
        images = _images(vit, args, kwargs)
        if (
            self.sizes_argument is None
            and isinstance(images, Tensor)
            and images.is_floating_point()
            and images.dim() == 2
        ):
            raise ShapeError(
                f"{type(vit).__name__} is given patches as one sequence, so which image each belongs to is not known.",
                expected="images (B, 3, H, W), or tokens (B, N, D)",
                got=f"shape {tuple(images.shape)}",
                fix="one call per size of image; or adapter=ViTFamily(..., layout='TD', sizes_argument=...)",
            )
        segments = self._segments(vit, args, kwargs, images)
        num_images = self._count(images) if segments is None else len(segments)
        if parent is not None and num_images is not None:
            parent.text_for(num_images)
        if self.has_batch_norm and vit.training:
            _keep_statistics(vit)
        scope = Scope(
            None if parent is None else parent.text_features,
            None if parent is None else parent.index,
            self._mask(vit, args, kwargs),
            self._new_seed(),
            segments=segments,
            shared=parent is not None and parent.shared,
        )
        scope.is_run = True
        scope.num_images = num_images
        if parent is not None:
            scope.grad_enabled = parent.grad_enabled
            scope.per_row = parent.per_row
        self._local.stack.append(scope)

    def leave_tower(self, vit: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the ViT, called even when it raised: close the run's scope."""
        stack = self._local.stack
        if stack and stack[-1].is_run:
            stack.pop()

    def mask_of(self, scope: Scope | None, num_tokens: int) -> Tensor | None:
        """Which of an FFN's tokens count, shape `(B, num_tokens)`; None where all do.

        Args:
            scope: The scope of the FFN that runs.
            num_tokens: Tokens of each image N.

        Raises:
            ShapeError: If the mask is for another number of tokens.
        """
        mask = None if scope is None else scope.mask_BN
        if mask is None:
            return None
        if self.mask_unit is None:
            return self._with_prefix(mask, num_tokens)
        in_tile = torch.arange(num_tokens // mask.shape[1], device=mask.device) < self.mask_unit
        mask = mask | ~mask.any(dim=1, keepdim=True)  # an image that is all padding has to have some context
        return (mask[..., None] & in_tile).flatten(1)

    def images_of(self, scope: Scope | None, num_rows: int, *, folded: bool) -> int:
        """How many images the rows that an FFN sees are of.

        Args:
            scope: The scope of the FFN that runs.
            num_rows: Rows of what it sees.
            folded: Whether an image may be several rows.

        Raises:
            ShapeError: If that cannot be known.
        """
        if not folded:
            return num_rows
        if scope is not None and scope.num_images is not None:
            return scope.num_images
        if scope is None or scope.text_features is None or scope.shared:
            raise ShapeError(
                "A block whose rows are parts of images runs by itself, so how many images there are is not known.",
                expected="a call of the tower, or one text per image",
                got=f"{num_rows} rows",
            )
        return len(scope.text_features if scope.index is None else scope.index)

    def check_rows(self, scope: Scope, num_images: int) -> None:
        """Refuse an FFN that sees other images than the tower, so that no text meets another's image.

        Args:
            scope: The scope of the FFN that runs.
            num_images: How many images it sees.

        Raises:
            ShapeError: If the tower sees another number.
        """
        if scope.num_images not in (None, num_images) and not scope.shared:
            raise ShapeError(
                "An FFN sees other rows than the images of the batch, so whose text belongs to them is not known.",
                expected=f"{scope.num_images} rows, one per image",
                got=f"{num_images} rows",
                fix="switch off stochastic depth that leaves out images of a batch; if a row is a part of an image, "
                "say so: adapter=ViTFamily(..., folded=('mlp',))",
            )

    def segments_of(self, scope: Scope | None, x: Tensor) -> Segments | None:
        """Which tokens of a packed tower's FFN belong to which image; None for other towers.

        Args:
            scope: The scope of the FFN that runs.
            x: What it gets.

        Raises:
            ShapeError: If the tower is packed and this is no run of it.
        """
        if self.sizes_argument is None:
            return None
        if scope is None or scope.segments is None:
            raise ShapeError(
                "A block of a packed tower runs by itself, so where each image begins is not known.",
                expected=f"a call of the tower, with {self.sizes_argument}=",
                got="a call of the block",
            )
        segments = scope.segments.merged(x.shape[-2]) if self.merges else scope.segments
        return segments.to(x.device)

    def check_gradients(self, scope: Scope | None, *, training: bool) -> None:
        """Refuse a run without gradients whose results a backward pass would be missing.

        Args:
            scope: The scope of the FFN that runs.
            training: Whether that FFN is in training mode.

        Raises:
            ReentrantCheckpointError: If gradients would be lost in silence.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if _inside_autograd_function() or (training and scope is not None and scope.grad_enabled):
            raise ReentrantCheckpointError(
                "A context-aware ViT in training runs without gradients, so its experts would get none.",
                expected="non-reentrant activation checkpointing, and no torch.no_grad() around the ViT alone",
                got="reentrant activation checkpointing, or a call under torch.no_grad() inside condition(...)",
                fix="gradient_checkpointing_kwargs={'use_reentrant': False}; for evaluation, encoder.eval()",
            )

    def _note(self, scope: Scope, frames: list[Any]) -> None:
        opened_in = scope.frame
        with self._lock:
            for frame in frames:
                if frame is opened_in:
                    return
                self._noted[frame] = scope

    def _new_seed(self) -> int | None:
        if not self.draws_seeds:
            return None
        # From torch's own generator, whose state a checkpoint restores before it recomputes.
        return int(torch.randint(2**31, ()).item())

    def _count(self, images: Any) -> int | None:
        """How many images a call of the ViT is about; None if its input does not tell."""
        if isinstance(images, Mapping):
            images = images.get("patches")
        if isinstance(images, Tensor) and (images.dim() in (3, 4) or self.image_axes > 1):
            return math.prod(images.shape[: self.image_axes])
        return None

    def _with_prefix(self, mask_BN: Tensor, num_tokens: int) -> Tensor:
        if mask_BN.shape[1] == num_tokens:
            return mask_BN
        if mask_BN.shape[1] + self.mask_prefix != num_tokens:
            raise ShapeError(
                f"{self.mask_argument} is not about the tokens that an FFN sees.",
                expected=f"{num_tokens} entries per image, or that less {self.mask_prefix} prefix tokens",
                got=f"{mask_BN.shape[1]} entries",
            )
        return torch.nn.functional.pad(mask_BN, (self.mask_prefix, 0), value=True)

    def _mask(self, vit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        if self.mask_argument is None:
            return None
        mask = _argument(vit, args, kwargs, self.mask_argument)
        if mask is None and args and isinstance(args[0], Mapping):
            mask = args[0].get(self.mask_argument)
        if mask is not None and self.mask_padding is not None:
            mask = (mask != self.mask_padding).any(dim=-1)
        return None if mask is None else mask.flatten(0, self.image_axes - 1).flatten(1).bool()

    def _segments(self, vit: nn.Module, args: tuple, kwargs: dict[str, Any], images: Any) -> Segments | None:
        if self.sizes_argument is None or not isinstance(images, Tensor):
            return None
        sizes = _argument(vit, args, kwargs, self.sizes_argument)
        if sizes is None:
            if images.dim() != 4:
                return None  # the ViT itself says what is missing
            sizes = [images.shape[-2:]] * len(images)
        extra = self.mask_prefix
        return Segments.of_sizes(sizes, self.sizes_unit, images.device, square=self.sizes_square, extra=extra)


class _Local(threading.local):
    """The open scopes of one encoder on one thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Scope] = []


_SETTINGS = (
    "needs_text",
    "draws_seeds",
    "mask_argument",
    "mask_unit",
    "image_axes",
    "sizes_argument",
    "sizes_unit",
    "mask_padding",
    "sizes_square",
    "merges",
    "mask_prefix",
    "has_batch_norm",
)


def _rebuild(settings: dict[str, Any]) -> Conditioning:
    return Conditioning(**settings)


def _keep_statistics(vit: nn.Module) -> None:
    """Leave the statistics of batch norms as they are: they belong to the frozen ViT, as weights do."""
    for module in vit.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            module.training = False


def _images(vit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The images of a call of the ViT, wherever they stand; None if they are not found."""
    if args:
        return args[0]
    name = getattr(vit, "main_input_name", "pixel_values")
    return kwargs[name] if name in kwargs else kwargs.get(next(iter(inspect.signature(vit.forward).parameters), ""))


def _argument(vit: nn.Module, args: tuple, kwargs: dict[str, Any], name: str) -> Any:
    """An argument of a call of the ViT, wherever it stands; None if it was not given."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    position = list(inspect.signature(vit.forward).parameters).index(name)
    return args[position] if position < len(args) else None


def _checkpoint_frames() -> list[Any]:
    """The frames of the non-reentrant checkpoints around the caller, the innermost first.

    torch pushes a pair of saved-tensor hooks for each checkpointed region, both when it first runs
    and when it is recomputed. Only the top of that stack can be read, so it is taken down and put
    back; nothing runs in between.
    """
    autograd: Any = torch._C._autograd  # type: ignore[attr-defined]
    hooks: list[tuple] = []
    frames: list[Any] = []
    if not autograd._saved_tensors_hooks_is_enabled():
        return frames  # then there can be no checkpoint around the caller, and nothing could be put back
    try:
        while (top := autograd._top_saved_tensors_default_hooks(False)) is not None:
            hooks.append(top)
            autograd._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
    for pack, _ in hooks:
        for cell in getattr(inspect.unwrap(pack), "__closure__", None) or ():
            value = cell.cell_contents
            value = value() if isinstance(value, weakref.ref) else value
            if isinstance(value, torch_checkpoint._CheckpointFrame):
                frames.append(value)
    return frames


def _inside_autograd_function() -> bool:
    """Whether the caller runs inside the forward of a `torch.autograd.Function`.

    That is where reentrant checkpointing runs the region that it will repeat, gradients switched off.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames[:1] == ("ctx",):
            if isinstance(frame.f_locals.get("ctx"), torch.autograd.function.FunctionCtx):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False

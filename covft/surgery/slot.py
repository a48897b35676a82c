"""The module that replaces a block's FFN, and a record of what it replaced."""

from __future__ import annotations

import contextlib
import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from covft.conditioning import Conditioning
from covft.conditioning.scope import Scope, images_in
from covft.nn.functional import HALF, autocasts
from covft.nn.moe import ContextualMoE
from covft.nn.router import Routing
from covft.surgery.layout import TokenLayout
from covft.surgery.save_guard import refuse_runtime_names
from covft.utils.modes import freeze_batch_norms
from covft.utils.torch_internals import in_backward


@dataclass
class Original:
    """Originals that `unwrap` restores; not part of any state dict.

    Attributes:
        ffns: The modules that were replaced, by dotted path: FFNs, and both halves of split ones.
        values: Values of the other parameters that covft changes (norms), by name.
        requires_grad: Whether each parameter was trainable, by name.
        widened: Whether `widen` has cast trained parameters to float32 since.
    """

    ffns: dict[str, nn.Module] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    widened: bool = False

    def type_in(self, vit: nn.Module) -> torch.dtype | None:
        """Return the ViT's type in half precision, if its trained parameters are wider; else None."""
        if not self.widened:
            return None
        changed = (*(f"{path}." for path in self.ffns), *self.values)
        rest = (p.dtype for name, p in vit.named_parameters() if not name.startswith(changed))
        return next((dtype for dtype in rest if dtype in HALF), None)


class RoutingRecord(NamedTuple):
    """The decision of an adapted block in the last forward.

    Attributes:
        routing: The decision; its logits keep their graph where an auxiliary loss can use it.
        context_BW: Context vectors, shape `(B, W)`, without gradient; None where there are none.
    """

    routing: Routing
    context_BW: Tensor | None


class AdaptedFFN(ContextualMoE):
    """A contextual mixture of experts that takes its text from the running call.

    It is called like the FFN that it replaces. Attributes that foreign code reads off an FFN (`fc1`, `c_fc`, ...) are
    those of expert 0, or of the FFN that low-rank experts share.

    Attributes:
        keeps_record: Whether the last decision is kept; not in an exported graph, which can keep nothing.

    Args:
        ffn: The pretrained FFN to copy; not changed.
        conditioning: Carries the text of a call; shared with the encoder.
        layout: Axes of the tensor that the FFN gets, as in `BlockSpec`.
        layer: Index of its block when the ViT was wrapped.
        **settings: As for `ContextualMoE`.
    """

    keeps_record: bool = True

    def __init__(
        self, ffn: nn.Module, conditioning: Conditioning, *, layout: str = "BND", layer: int = 0, **settings: Any
    ) -> None:
        super().__init__(ffn, **settings)
        self.layer = layer
        self.conditioning = conditioning
        self.layout = TokenLayout(layout)
        self.record: RoutingRecord | None = None
        self.beside: Any = None  # the FFN that was here, which runs too at a strength below 1
        self.__dict__["null_text"] = None  # past nn.Module: the ViT has it, once for all blocks

    def train(self, mode: bool = True) -> AdaptedFFN:
        """Switch to training, except for batch norms: an image must not depend on its batch."""
        super().train(mode)
        freeze_batch_norms(self)
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Route and mix; tokens in and out in the block's layout, further arguments go to every expert.

        Raises:
            MissingContextError: If no text was given.
            ShapeError: If the text is for another number of images, or the tokens are not those of the images.
            ReentrantCheckpointError: If the experts' gradients would be lost silently.
        """
        with self._computing_like(x):
            mixed = self._forward(x, *args, **kwargs)
        return mixed if self.beside is None else self.beside.mix(mixed, x, *args, **kwargs)

    def _computing_like(self, x: Tensor) -> AbstractContextManager[Any]:
        """Compute in the type of the tokens, if trained weights are kept wider for the optimizer."""
        kind = x.device.type
        if x.dtype not in HALF or autocasts(kind):
            return contextlib.nullcontext()
        parts = (self.router, self.experts)
        if not any(p.dtype == torch.float32 for part in parts for p in itertools.islice(part.parameters(), 1)):
            return contextlib.nullcontext()
        return torch.autocast(kind, x.dtype)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Route and mix; None where the mixture is not needed."""
        scope = self.conditioning.require()
        self.conditioning.check_gradients(scope, training=self.training)
        segments = self.conditioning.segments_of(scope, x)
        tokens, num_images = x, x.shape[0] if segments is None else len(segments)
        if not self.layout.is_plain:
            num_images = images_in(scope, x.shape[0], folded=self.layout.is_folded)
            tokens = self.layout.tokens(x, num_images)
        text_BC = None
        if scope is not None and self.needs_text:
            scope.check_rows(num_images)
            text_BC = scope.text_for(num_images)
        if self.null_text is not None:
            text_BC = self._with_null_text(scope, text_BC, num_images)
        mask_BN = None
        if scope is not None and scope.call is not None and tokens.dim() > 2:
            mask_BN = scope.call.mask_for(tokens.shape[1])
        if scope is not None:
            seed = scope.seed
        else:
            seed = self.conditioning.new_seed() if self.training else None
        routing, context_BW = self.route(tokens, text_BC, mask_BN=mask_BN, segments=segments, seed=seed)
        self._remember(routing, context_BW)
        if self.layout.is_folded:
            routing = routing.per_token(self.layout.image_of_rows(x, num_images))
        if self.beside is not None and not self.beside.needs_trained:
            return None
        return self.mix(x, routing, segments, *args, **kwargs)

    def _with_null_text(self, scope: Scope | None, text_BC: Tensor | None, num_images: int) -> Tensor:
        """Return the text features of each image, with the null text where there is none."""
        without_text_B = None if scope is None else scope.without_text_for(num_images)
        seed = None if scope is None else scope.seed
        if seed is None:  # of a block that runs without the tower
            seed = self.conditioning.new_seed(replaces_texts=self.training and text_BC is not None)
        return self.null_text(text_BC, num_images, without_text_B, seed)

    @property
    def _tied_weights_keys(self) -> None:
        # transformers asks every module for these right before it writes a file.
        refuse_runtime_names(self)

    def _remember(self, routing: Routing, context_BW: Tensor | None) -> None:
        if not self.keeps_record:
            return
        if not torch.compiler.is_compiling() and in_backward():
            return  # a recomputation during backward is not a new decision
        logits_BE = routing.logits_BE
        if routing.expert_ids_BK is None and logits_BE is not None:
            logits_BE = logits_BE.detach()
        self.record = RoutingRecord(
            Routing(routing.weights_BE.detach(), routing.expert_ids_BK, logits_BE),
            None if context_BW is None else context_BW.detach(),
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts = self.__dict__.get("_modules", {}).get("experts")
            if experts is None or name.startswith("_"):
                raise
            return getattr(experts.prototype, name)

    def __getstate__(self) -> dict[str, Any]:
        # A record may hold tensors with a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "record": None}

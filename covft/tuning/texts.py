"""New modules inside a tower that read the text of the running call.

Shapes: B images, N tokens of an image, L tokens of a text, D embed_dim, C text_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from covft.conditioning import Conditioning
from covft.conditioning.scope import Scope
from covft.errors import ConfigError, ShapeError, UnsupportedViTError
from covft.nn.segments import Segments
from covft.tuning.method import Tower


class ImageTokens(NamedTuple):
    """Tokens of a batch with an axis for images, and the text of each image.

    Attributes:
        tokens_BND: Tokens; zeros in places that a shorter image does not fill.
        text: Features `(B, C)`, or states `(B, L, C)`.
        text_mask_BL: Which states are not padding; None if all are.
        segments: Where each image is in a packed batch; None elsewhere.
        shape: Shape of the tensor that they came from.
    """

    tokens_BND: Tensor
    text: Tensor
    text_mask_BL: Tensor | None
    segments: Segments | None
    shape: torch.Size

    def restore(self, tokens_BND: Tensor) -> Tensor:
        """Return tokens in the form in which they came."""
        if self.segments is None:
            return tokens_BND.reshape(self.shape)
        flat = tokens_BND.flatten(0, 1)
        mask = self.segments.mask_BN
        if mask is not None:
            lengths = torch.tensor(self.segments.lengths, device=flat.device)
            places = (torch.arange(tokens_BND.shape[1], device=flat.device) < lengths[:, None]).flatten()
            flat = flat[places.nonzero().squeeze(-1)]
        return flat.reshape(self.shape)


class ReadsText(nn.Module):
    """Base of new modules that read the text.

    Args:
        conditioning: Carries the text; shared by all new modules of a tower.
    """

    def __init__(self, conditioning: Conditioning) -> None:
        super().__init__()
        self.conditioning = conditioning

    def scope(self) -> Scope:
        """Return the running call, whose text is read.

        Raises:
            MissingContextError: If there is no text.
            ReentrantCheckpointError: If gradients would be lost silently.
        """
        scope = self.conditioning.require()
        assert scope is not None, "methods that read text need it"
        self.conditioning.check_gradients(scope, training=self.training)
        return scope

    def images_of(self, x: Tensor) -> ImageTokens:
        """Return the tokens of each image, and its text.

        Args:
            x: Tokens `(B, ..., D)`, or packed ones `(T, D)` or `(1, T, D)`.

        Raises:
            MissingContextError: If there is no text.
            ShapeError: If the text is for another number of images.
            ReentrantCheckpointError: If gradients would be lost silently.
        """
        scope = self.scope()
        segments = self.conditioning.segments_of(scope, x)
        if segments is None:
            num_images, tokens = len(x), x.flatten(1, -2)
            scope.check_rows(num_images)
        else:
            num_images, tokens = len(segments), segments.per_image(x.reshape(-1, x.shape[-1]))
        text, mask = scope.text_for(num_images), scope.text_mask_for(num_images)
        assert text is not None
        return ImageTokens(tokens, text, mask, segments, x.shape)


def conditioning_of(tower: Tower, *, needs_text: bool = True) -> Conditioning:
    """Make what carries the text, and knowledge of each run of the tower, to its new modules."""
    batch_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in tower.vit.modules())
    return Conditioning(tower.spec.input, needs_text=needs_text, has_batch_norm=batch_norms)


def text_width(tower: Tower, name: str) -> int:
    """Return the width C of the text features.

    Raises:
        ConfigError: If there is no text.
    """
    if tower.text_dim is None:
        raise ConfigError(
            f"{name!r} reads the text, and there is none.",
            expected="a text encoder, or the width of the text features that you bring",
            got="text_encoder=None",
            fix=f'covft.tune(vit, {name!r}, text_encoder="bert-base-uncased")',
        )
    return tower.text_dim


def check_plain_layout(tower: Tower, layers: tuple[int, ...], name: str) -> None:
    """Refuse blocks whose rows are parts of images, or whose tokens are maps.

    Raises:
        UnsupportedViTError: If there are such blocks.
    """
    other = [layer for layer in layers if tower.spec.blocks[layer].layout not in ("BND", "TD", "1TD")]
    if other:
        raise UnsupportedViTError(
            f"{name!r} needs blocks that see the tokens of an image together.",
            expected="tokens (B, N, D), or packed ones",
            got=f"{tower.spec.blocks[other[0]].layout} in blocks {', '.join(map(str, other[:8]))} of {tower.spec}",
            fix='covft.tune(vit, "covft"), which knows this layout',
        )


def first_tensor(output: Any) -> Tensor:
    """Return the tokens in what a block or an attention returns: a tensor, or a tuple that begins with one."""
    tokens = output[0] if isinstance(output, tuple) else output
    if not isinstance(tokens, Tensor):
        raise ShapeError("A block returned no tokens.", expected="a tensor, or a tuple that begins with one")
    return tokens


def with_tensor(output: Any, tokens: Tensor) -> Any:
    """Return an output with other tokens."""
    return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


def like(parameter: nn.Parameter, module: nn.Module) -> nn.Module:
    """Move a new module to the device and floating-point type of a parameter."""
    return module.to(parameter.device, parameter.dtype)

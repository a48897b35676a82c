"""What the router looks at: the context vector, one per image.

Tokens come as `(B, N, D)`, or packed as `(T, D)` with the segments that say where each image begins. They are refined
as they come; only the attention, or the mean, over an image's tokens needs an axis for images.

Shapes: B images, N tokens of an image (prefix tokens included), T tokens of all images of a packed batch,
D embed_dim (width of the tokens), C text_dim (width of the text features), H heads, A = C / H (width of a head),
W context_dim (width of the context vector).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from typing_extensions import Unpack

from covft.errors import ConfigError
from covft.nn.functional import Place, autocasts, in_type_of, masked_mean, wide_softmax, without_autocast
from covft.nn.fused import mix, weights_to_mix
from covft.nn.plan import FFNPlan, identity_of, run_ffn
from covft.nn.segments import Segments
from covft.utils.arguments import check_kinds, check_sizes


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, the approximation of GELU that OpenAI's CLIP uses."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it; any shape."""
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}
_PLAN = FFNPlan(
    first=("up",), last="down", activation="act", kind="plain",
    functions=((identity_of(nn.GELU()), "gelu"), (identity_of(QuickGELU()), "quick_gelu")),
)  # fmt: skip


class RefinementOptions(Place, total=False):
    """The keywords of `ResidualRefinement`."""

    activation: str


class ResidualRefinement(nn.Module):
    """LayerNorm of a residual two-layer block: $LN(r(v))$, $r(v) = v + W_{down} GELU(W_{up} v)$.

    Eq. 7 of the CoVFT paper, followed by the norm of its eq. 8. The inner width is twice the outer.

    Args:
        dim: Width of the input and the output.
        activation: `"gelu"` or `"quick_gelu"`.
        **place: `device` and `dtype` of the parameters.

    Attributes:
        recompute: What backward recomputes of the two layers, as in `Experts`.

    Example:
        >>> ResidualRefinement(8)(torch.rand(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    @check_kinds
    def __init__(self, dim: int, *, activation: str = "gelu", **place: Unpack[Place]) -> None:
        super().__init__()
        check_sizes(dim=dim)
        if activation not in _ACTIVATIONS:
            known = " | ".join(_ACTIVATIONS)
            raise ConfigError(f"activation={activation!r} is not known.", expected=known, got=repr(activation))
        self.recompute, self.kernels = "none", "auto"
        self.up = nn.Linear(dim, 2 * dim, **place)
        self.act = _ACTIVATIONS[activation]()
        self.down = nn.Linear(2 * dim, dim, **place)
        self.norm = nn.LayerNorm(dim, **place)

    def forward(self, v: Tensor) -> Tensor:
        """Refine and normalise; shape `(..., dim)` in and out."""
        weights = None if self.recompute == "none" else weights_to_mix(_PLAN, [self])
        if weights is None:
            hidden = self.act(self.up(in_type_of(v, self.up.weight)))
            return self._normalised(v + self.down(in_type_of(hidden, self.down.weight)))
        # A mixture of one.
        v = in_type_of(v, self.up.weight)
        alone_B1 = torch.ones(len(v), 1, device=v.device, dtype=v.dtype)
        keep = self.recompute == "activation"
        mixed = mix(v, alone_B1, [self], _PLAN, weights, keep_pre_activations=keep, kernels=self.kernels)
        return self._normalised(v + mixed)

    def _normalised(self, refined: Tensor) -> Tensor:
        wide = in_type_of(refined, self.norm.weight)
        return self.norm(refined) if wide is refined else self.norm(wide).to(refined.dtype)


class TextRefinement(ResidualRefinement):
    """The refinement of text features, which float16 may not have the range for: there, it runs in float32."""

    def forward(self, v: Tensor) -> Tensor:
        """Refine and normalise; shape `(..., dim)` in and out."""
        kind = v.device.type
        types = (self.up.weight.dtype, torch.get_autocast_dtype(kind) if autocasts(kind) else None)
        if torch.float16 not in types or not _PLAN.applies_to(self):
            return super().forward(v)
        with without_autocast(kind):
            v, norm = v.float(), self.norm
            weights = [tensor.float() for tensor in _PLAN.weights(self)]
            refined = v + run_ffn(v, weights, self.act)
            return layer_norm(refined, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


class SingleQueryAttention(nn.Module):
    r"""Cross-attention of one query per image over its tokens, without per-token keys and values.

    Equal to `nn.MultiheadAttention(C, H, kdim=D + C, vdim=D + C)` whose query is `text` and whose
    n-th key and value is `[tokens_n, text]`, joined along channels (eq. 8 of the CoVFT paper). Three
    identities make it cheap and are exact:

    - The scores are $q_h \cdot (W_{k,h} z_n)= (W_{k,h}^T q_h) \cdot z_n$: $W_k$ is folded into the query.
    - The text half of a key and the key bias add the same number to every token's score, so they
      cancel in the softmax; those parameters do not exist here.
    - Values are linear in the tokens, so tokens are averaged first and $W_v$ is applied once.

    Args:
        embed_dim: Width D of the tokens.
        text_dim: Width C of the text features and of the result.
        num_heads: Heads H; must divide C.
        **place: `device` and `dtype` of the parameters.
    """

    @check_kinds
    def __init__(self, embed_dim: int, text_dim: int, num_heads: int = 4, **place: Unpack[Place]) -> None:
        super().__init__()
        check_sizes(embed_dim=embed_dim, text_dim=text_dim, num_heads=num_heads)
        if text_dim % num_heads:
            raise ConfigError(
                f"num_heads={num_heads} does not divide the width of the text features.",
                expected=f"a divisor of text_dim={text_dim}",
                got=num_heads,
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.q_proj = nn.Linear(text_dim, text_dim, **place)
        self.k_proj_weight = nn.Parameter(torch.empty(text_dim, embed_dim, **place))
        self.v_proj_image_weight = nn.Parameter(torch.empty(text_dim, embed_dim, **place))
        self.v_proj_text = nn.Linear(text_dim, text_dim, **place)
        self.out_proj = nn.Linear(text_dim, text_dim, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.MultiheadAttention` of the same sizes does: Xavier uniform, biases zero."""
        text_dim, embed_dim = self.k_proj_weight.shape
        joint_bound = math.sqrt(6 / (text_dim + embed_dim + text_dim))
        nn.init.xavier_uniform_(self.q_proj.weight)
        for weight in (self.k_proj_weight, self.v_proj_image_weight, self.v_proj_text.weight):
            nn.init.uniform_(weight, -joint_bound, joint_bound)
        for linear in (self.q_proj, self.v_proj_text, self.out_proj):
            nn.init.zeros_(linear.bias)

    def forward(self, tokens_BND: Tensor, text_BC: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            tokens_BND: Refined, normalised tokens, shape `(B, N, D)`.
            text_BC: Refined, normalised text features, shape `(B, C)`.
            mask_BN: True where a token counts, shape `(B, N)`; None where all do.

        Returns:
            The context vectors, shape `(B, C)`.
        """
        heads, like = self.num_heads, tokens_BND
        mean_BHD = self.weights(tokens_BND, text_BC, mask_BN) @ tokens_BND
        value_HAD = in_type_of(self.v_proj_image_weight, like).unflatten(0, (heads, -1))
        image_BHA = (mean_BHD.transpose(0, 1) @ value_HAD.mT).transpose(0, 1)
        of_text_BC = self.v_proj_text(in_type_of(text_BC, self.v_proj_text.weight))
        value_BC = image_BHA.flatten(1) + in_type_of(of_text_BC, like)
        return self.out_proj(in_type_of(value_BC, self.out_proj.weight))

    def weights(self, tokens_BND: Tensor, text_BC: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Return how much each head looks at each token, shape `(B, H, N)`; rows sum to 1.

        Args:
            tokens_BND: As for calling it.
            text_BC: As for calling it.
            mask_BN: As for calling it.
        """
        heads, like = self.num_heads, tokens_BND
        query_BC = in_type_of(self.q_proj(in_type_of(text_BC, self.q_proj.weight)), like)
        query_BHA = query_BC.unflatten(-1, (heads, -1))
        query_BHA = query_BHA * query_BHA.shape[-1] ** -0.5
        key_HAD = in_type_of(self.k_proj_weight, like).unflatten(0, (heads, -1))
        folded_BHD = (query_BHA.transpose(0, 1) @ key_HAD).transpose(0, 1)
        scores_BHN = folded_BHD @ tokens_BND.mT
        if mask_BN is not None:
            scores_BHN = scores_BHN.masked_fill(~mask_BN[:, None], -torch.inf)
        return wide_softmax(scores_BHN).to(tokens_BND.dtype)

    @torch.no_grad()
    def load_multihead_attention(self, state: dict[str, Tensor]) -> None:
        """Copy the weights of an `nn.MultiheadAttention(C, H, kdim=D + C, vdim=D + C)`.

        Args:
            state: Its state dict: `q_proj_weight` `(C, C)`, `k_proj_weight` and `v_proj_weight`
                `(C, D + C)` with the image columns first, `in_proj_bias` `(3C,)`, `out_proj.weight`,
                `out_proj.bias`. The text columns of the keys and the key bias change no output and are left out.
        """
        embed_dim = self.embed_dim
        q_bias, _, v_bias = state["in_proj_bias"].chunk(3)
        self.q_proj.weight.copy_(state["q_proj_weight"])
        self.q_proj.bias.copy_(q_bias)
        self.k_proj_weight.copy_(state["k_proj_weight"][:, :embed_dim])
        self.v_proj_image_weight.copy_(state["v_proj_weight"][:, :embed_dim])
        self.v_proj_text.weight.copy_(state["v_proj_weight"][:, embed_dim:])
        self.v_proj_text.bias.copy_(v_bias)
        self.out_proj.weight.copy_(state["out_proj.weight"])
        self.out_proj.bias.copy_(state["out_proj.bias"])


class ContextExtractor(Protocol):
    """What a context is: tokens and text features in, one vector per image out."""

    context_dim: int
    needs_text: bool

    def __call__(
        self, tokens: Tensor, text_BC: Tensor | None, mask_BN: Tensor | None = None, segments: Segments | None = None
    ) -> Tensor:
        """Return the context vectors, shape `(B, W)`, of tokens `(B, N, D)`, or `(T, D)` with segments."""
        ...


class CrossAttentionContext(nn.Module):
    """Text-guided aggregation of the image tokens, eqs. 7 and 8 of the CoVFT paper; its CVE.

    Args:
        embed_dim: Width D of the tokens.
        text_dim: Width C of the text features.
        num_heads: Attention heads; must divide C.
        activation: Of the refinement, `"gelu"` or `"quick_gelu"`.
        **place: `device` and `dtype` of the parameters.

    Example:
        >>> CrossAttentionContext(6, 8)(torch.rand(2, 5, 6), torch.rand(2, 8)).shape
        torch.Size([2, 8])
    """

    needs_text = True

    @check_kinds
    def __init__(
        self, embed_dim: int, text_dim: int, *, num_heads: int = 4, activation: str = "gelu", **place: Unpack[Place]
    ) -> None:
        super().__init__()
        self.context_dim = text_dim
        self.image = ResidualRefinement(embed_dim, activation=activation, **place)
        self.text = TextRefinement(text_dim, activation=activation, **place)
        self.attention = SingleQueryAttention(embed_dim, text_dim, num_heads, **place)

    def forward(
        self, tokens: Tensor, text_BC: Tensor, mask_BN: Tensor | None = None, segments: Segments | None = None
    ) -> Tensor:
        """Return the context vectors, shape `(B, C)`."""
        tokens_BND, mask_BN = _per_image(self.image(tokens), mask_BN, segments)
        return self.attention(tokens_BND, self.text(text_BC), mask_BN)


class ImageContext(nn.Module):
    """Mean over tokens of the refined image tokens; the text is not looked at."""

    needs_text = False

    @check_kinds
    def __init__(self, embed_dim: int, **options: Unpack[RefinementOptions]) -> None:
        super().__init__()
        self.context_dim = embed_dim
        self.image = ResidualRefinement(embed_dim, **options)

    def forward(
        self,
        tokens: Tensor,
        text_BC: Tensor | None = None,
        mask_BN: Tensor | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Return the context vectors, shape `(B, D)`."""
        return masked_mean(*_per_image(self.image(tokens), mask_BN, segments))


class TextContext(nn.Module):
    """The refined text features; the image is not looked at."""

    needs_text = True

    @check_kinds
    def __init__(self, text_dim: int, **options: Unpack[RefinementOptions]) -> None:
        super().__init__()
        self.context_dim = text_dim
        self.text = TextRefinement(text_dim, **options)

    def forward(
        self, tokens: Tensor, text_BC: Tensor, mask_BN: Tensor | None = None, segments: Segments | None = None
    ) -> Tensor:
        """Return the context vectors, shape `(B, C)`."""
        return self.text(text_BC)


class ConcatContext(nn.Module):
    """The image context and the text context side by side."""

    needs_text = True

    @check_kinds
    def __init__(self, embed_dim: int, text_dim: int, **options: Unpack[RefinementOptions]) -> None:
        super().__init__()
        self.context_dim = embed_dim + text_dim
        self.image = ResidualRefinement(embed_dim, **options)
        self.text = TextRefinement(text_dim, **options)

    def forward(
        self, tokens: Tensor, text_BC: Tensor, mask_BN: Tensor | None = None, segments: Segments | None = None
    ) -> Tensor:
        """Return the context vectors, shape `(B, D + C)`."""
        image_BD = masked_mean(*_per_image(self.image(tokens), mask_BN, segments))
        return torch.cat([image_BD, self.text(text_BC)], dim=-1)


def make_context(
    kind: str, embed_dim: int, text_dim: int | None, *, num_heads: int = 4, **options: Unpack[RefinementOptions]
) -> nn.Module:
    """Build the context that a setting names.

    Args:
        kind: `"cve"`, `"image"`, `"text"` or `"concat"`.
        embed_dim: Width D of the tokens.
        text_dim: Width C of the text features; may be None for `"image"`.
        num_heads: Heads of `"cve"`.
        **options: As for `ResidualRefinement`.
    """
    if kind == "image":
        return ImageContext(embed_dim, **options)
    assert text_dim is not None, "checked by wrap()"
    if kind == "text":
        return TextContext(text_dim, **options)
    if kind == "concat":
        return ConcatContext(embed_dim, text_dim, **options)
    return CrossAttentionContext(embed_dim, text_dim, num_heads=num_heads, **options)


def _per_image(tokens: Tensor, mask_BN: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor | None]:
    """Return the tokens with an axis for images, and which of them count."""
    return (tokens, mask_BN) if segments is None else (segments.per_image(tokens), segments.mask_BN)

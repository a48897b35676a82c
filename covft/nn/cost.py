"""Counts the parameters and the arithmetic of an adapted block.

Shapes: N tokens of an image (prefix tokens included), D embed_dim, C text_dim, W context_dim, H heads, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """A count per part of one adapted block: parameters, or floating-point operations for one image.

    Attributes:
        experts: The FFNs.
        image_refinement: Residual refinement and norm of the tokens (eq. 7).
        text_refinement: Residual refinement and norm of the text features (eq. 7).
        attention: Attention of the text over the tokens (eq. 8).
        router: From the context vector to the routing weights (eq. 9).
    """

    experts: int
    image_refinement: int = 0
    text_refinement: int = 0
    attention: int = 0
    router: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def count_parameters(
    *,
    embed_dim: int,
    text_dim: int,
    ffn_parameters: int,
    num_experts: int = 4,
    routing: str = "dense",
    context: str = "cve",
) -> BlockCost:
    """Count the parameters of one adapted block.

    Args:
        embed_dim: Width D of the tokens.
        text_dim: Width C of the text features.
        ffn_parameters: Parameters of the FFN that the experts are copies of.
        num_experts: Number of experts E.
        routing: `"dense"`, `"sparse"`, `"uniform"` or `"random"`.
        context: `"cve"`, `"image"`, `"text"` or `"concat"`.

    Example:
        >>> count_parameters(embed_dim=1024, text_dim=768, ffn_parameters=8_393_728).total  # CLIP-L, BERT
        43485188
    """
    width, sees_image, sees_text = _context(routing, context, embed_dim, text_dim)
    # q, v_text and out are C x C with a bias; the image halves of k and v are C x D without.
    attention = 3 * (text_dim**2 + text_dim) + 2 * text_dim * embed_dim
    return BlockCost(
        experts=num_experts * ffn_parameters,
        image_refinement=_refinement(embed_dim) if sees_image else 0,
        text_refinement=_refinement(text_dim) if sees_text else 0,
        attention=attention if sees_image and sees_text and context == "cve" else 0,
        router=width * num_experts + num_experts if width else 0,
    )


def count_flops(
    *,
    embed_dim: int,
    text_dim: int,
    ffn_weights: int,
    num_tokens: int,
    num_experts: int = 4,
    routing: str = "dense",
    top_k: int = 2,
    context: str = "cve",
    num_heads: int = 4,
) -> BlockCost:
    """Count the floating-point operations of one adapted block, forward, for one image with its own text.

    Matrix products only, a multiply-add counted as 2; a backward pass costs about twice as much.

    Args:
        embed_dim: Width D of the tokens.
        text_dim: Width C of the text features.
        ffn_weights: Elements of the FFN's weight matrices, biases and norms not counted.
        num_tokens: Tokens per image N.
        num_experts: Number of experts E.
        routing: `"dense"`, `"sparse"`, `"uniform"` or `"random"`.
        top_k: Experts per image for sparse and random routing.
        context: `"cve"`, `"image"`, `"text"` or `"concat"`.
        num_heads: Heads of the attention H.

    Example:
        >>> cost = count_flops(embed_dim=1024, text_dim=768, ffn_weights=8_388_608, num_tokens=577)
        >>> f"{cost.total / 1e9:.1f} GFLOPs, of which experts {cost.experts / 1e9:.1f}"
        '43.6 GFLOPs, of which experts 38.7'
    """
    width, sees_image, sees_text = _context(routing, context, embed_dim, text_dim)
    running = num_experts if routing in ("dense", "uniform") else top_k
    # Per image: project query, text value and output (C x C each), fold the key weights into the query and
    # apply the value weights to the average (C x D each). Per token and head: one score, one weighted sum.
    attention = 2 * (3 * text_dim**2 + 2 * text_dim * embed_dim + 2 * num_heads * num_tokens * embed_dim)
    return BlockCost(
        experts=running * 2 * num_tokens * ffn_weights,
        image_refinement=8 * embed_dim**2 * num_tokens if sees_image else 0,
        text_refinement=8 * text_dim**2 if sees_text else 0,
        attention=attention if sees_image and sees_text and context == "cve" else 0,
        router=2 * width * num_experts,
    )


def _context(routing: str, context: str, embed_dim: int, text_dim: int) -> tuple[int, bool, bool]:
    """Return the width W of the context vector, and whether it sees the image and the text."""
    if routing in ("uniform", "random"):
        return 0, False, False
    width = {"cve": text_dim, "image": embed_dim, "text": text_dim, "concat": embed_dim + text_dim}
    return width[context], context != "text", context != "image"


def _refinement(dim: int) -> int:
    """Count two biased linears of inner width 2 x dim, and a norm."""
    return 4 * dim**2 + 5 * dim

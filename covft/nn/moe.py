"""The contextual mixture of experts that stands where a block's FFN stood.

Shapes: B images, N tokens of an image, T tokens of all images of a packed batch, D embed_dim, C text_dim,
W context_dim, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from covft.config import CoVFTConfig
from covft.errors import ConfigError, ShapeError
from covft.nn.context import RefinementOptions, ResidualRefinement, make_context
from covft.nn.experts import Experts
from covft.nn.functional import Place, in_type_of
from covft.nn.low_rank import LowRankExperts
from covft.nn.router import Routing, make_router
from covft.nn.segments import Segments
from covft.nn.starts import start_apart
from covft.utils.arguments import check_kinds, check_sizes


class ContextualMoE(nn.Module):
    r"""Mix upcycled FFNs, one set of weights per image.

    $y = \sum_e g_e(c)\, E_e(x)$, eq. 10 of the CoVFT paper; its CoMoE, with the context vector $c$ (its CVE) inside.
    All experts start equal to the pretrained FFN and the weights sum to 1, so at the start the output is the FFN's,
    unless `expert_init` asks for another start.

    Args:
        ffn: The pretrained FFN to copy; not changed.
        embed_dim: Width D of the tokens.
        text_dim: Width C of the text features; None where no text is used.
        num_experts: Number of experts E.
        routing: `"dense"`, `"sparse"`, `"uniform"` or `"random"`.
        top_k: Experts per image for `"sparse"` and `"random"`.
        context: `"cve"`, `"image"`, `"text"` or `"concat"`.
        activation: Of the refinements, `"gelu"` or `"quick_gelu"`.
        num_heads: Heads of the context attention.
        eval_seed: Index of the block: seed of `"random"` in eval mode, and part of the seed of `expert_init`.
        expert_rank: None copies the FFN for every expert; a number makes them share it and differ at that rank.
        expert_init: `"upcycled"`, `"noise"` or `"drop"`, as in `CoVFTConfig`; only the first starts from the FFN's
            output.
        expert_init_scale: Relative standard deviation of the noise, or share of the units.
        expert_init_seed: Seed of the noise, or of the units.
        recompute: What backward recomputes of the experts and of the context: `"none"`, `"activation"` or `"all"`.
        plans: As for `Experts.upcycled`.

    Raises:
        ConfigError: If a value cannot work.

    Example:
        >>> ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> moe = ContextualMoE(ffn, embed_dim=8, text_dim=4)
        >>> moe(torch.rand(2, 5, 8), torch.rand(2, 4)).shape
        torch.Size([2, 5, 8])
    """

    @check_kinds
    def __init__(
        self,
        ffn: nn.Module,
        *,
        embed_dim: int,
        text_dim: int | None,
        num_experts: int = 4,
        routing: str = "dense",
        top_k: int = 2,
        context: str = "cve",
        activation: str = "gelu",
        num_heads: int = 4,
        eval_seed: int = 0,
        expert_rank: int | None = None,
        expert_init: str = "upcycled",
        expert_init_scale: float = 0.1,
        expert_init_seed: int = 0,
        recompute: str = "all",
        plans: dict[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        settings = CoVFTConfig(
            experts=num_experts, routing=routing, top_k=top_k, context=context, activation=activation,
            num_heads=num_heads, expert_rank=expert_rank, expert_init=expert_init,
            expert_init_scale=expert_init_scale, expert_init_seed=expert_init_seed, recompute=recompute,
        )  # fmt: skip
        check_sizes(embed_dim=embed_dim, text_dim=text_dim)
        if settings.needs_text and text_dim is None:
            fix = "context='image', or a routing that does not need text"
            raise ConfigError("This routing needs text.", expected="text_dim=C", got="text_dim=None", fix=fix)
        like = next((p for p in ffn.parameters() if p.is_floating_point()), None)
        place: Place = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.embed_dim = embed_dim
        self.context = None
        if routing in ("dense", "sparse"):
            options: RefinementOptions = {"activation": activation, **place}
            self.context = make_context(context, embed_dim, text_dim, num_heads=num_heads, **options)
        width: Any = None if self.context is None else self.context.context_dim
        self.router = make_router(routing, num_experts, context_dim=width, top_k=top_k, eval_seed=eval_seed, **place)
        self.experts: Experts | LowRankExperts
        if expert_rank is None:
            self.experts = Experts.upcycled(ffn, num_experts, plans=plans)
        else:
            self.experts = LowRankExperts(ffn, num_experts, expert_rank)
        start_apart(self.experts, expert_init, expert_init_scale, seed=expert_init_seed, layer=eval_seed)
        self.set_recompute(recompute)
        self.train(ffn.training)

    def set_recompute(self, recompute: str) -> None:
        """Choose what backward recomputes instead of keeping it.

        Args:
            recompute: `"none"`, `"activation"` or `"all"`.
        """
        for module in {self.experts, *self._fusible()}:
            module.recompute = recompute

    def set_kernels(self, kernels: str) -> None:
        """Choose what runs between the matrix products of full experts and of the context.

        Args:
            kernels: `"auto"`, `"eager"` or `"triton"`, as for `ContextEncoder.set_kernels`.
        """
        for module in self._fusible():
            module.kernels = kernels

    def _fusible(self) -> list[Experts | ResidualRefinement]:
        modules = (self.experts, getattr(self.context, "image", None))
        return [module for module in modules if isinstance(module, Experts | ResidualRefinement)]

    def extra_repr(self) -> str:
        """Say how the experts run, for `print`."""
        return self.experts.summary

    @property
    def needs_text(self) -> bool:
        """Whether `forward` needs text features."""
        return self.context is not None and bool(self.context.needs_text)

    def route(
        self,
        x: Tensor,
        text_BC: Tensor | None = None,
        *,
        mask_BN: Tensor | None = None,
        segments: Segments | None = None,
        seed: int | None = None,
    ) -> tuple[Routing, Tensor | None]:
        """Decide the weight of each expert for each image.

        Args:
            x: Tokens, shape `(B, N, D)` or `(B, ..., D)`; `(T, D)` or `(..., T, D)` with segments.
            text_BC: Text features, shape `(B, C)`.
            mask_BN: True where a token counts, shape `(B, N)`; None where all do.
            segments: Which tokens belong to which image, where they are packed.
            seed: Of random routing in training mode.

        Returns:
            The routing, and the context vectors, shape `(B, W)`; None where nothing is learned.

        Raises:
            ShapeError: If tokens, text features and segments do not fit together.
        """
        tokens, num_images = x, x.shape[0]
        if segments is not None:
            tokens, num_images = _packed(x, segments), len(segments)
        if self.context is None:
            wide = torch.promote_types(x.dtype, torch.float32)
            return self.router(None, num_images, device=x.device, dtype=wide, seed=seed), None
        if self.needs_text:
            if text_BC is None or text_BC.dim() != 2 or text_BC.shape[0] != num_images:
                raise ShapeError(
                    "Tokens and text features do not fit together.",
                    expected=f"text features of shape ({num_images}, C), one row per image",
                    got="none" if text_BC is None else tuple(text_BC.shape),
                )
            # Features beyond the range of float16 are refined before they are cast.
            text_BC = text_BC.to(device=x.device, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
        if segments is None and x.dim() != 3:
            tokens = x.flatten(1, -2)
        context_BW = self.context(tokens, text_BC, mask_BN, segments)
        return self.router(context_BW, num_images, device=x.device), context_BW

    def mix(self, x: Tensor, routing: Routing, segments: Segments | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the experts and mix them as decided.

        Args:
            x: Tokens, as for `route`.
            routing: One decision per image.
            segments: Which tokens belong to which image, where they are packed.
            *args: Passed to every expert.
            **kwargs: Passed to every expert.

        Returns:
            Tokens, same shape as `x`, in the type of the FFN's output.
        """
        weights = [*self.experts.parameters()]  # next() has no graph in torch 2.8's compiler
        tokens = in_type_of(x, weights[0] if weights else x)
        if segments is None:
            mixed = self.experts(tokens, routing, *args, **kwargs)
        else:
            mixed = self.experts(_packed(tokens, segments), routing.per_token(segments.ids_T), *args, **kwargs)
            mixed = mixed.reshape(*x.shape[:-1], -1)
        return mixed if tokens is x else mixed.to(x.dtype)

    def forward(
        self,
        x: Tensor,
        text_BC: Tensor | None = None,
        *,
        mask_BN: Tensor | None = None,
        segments: Segments | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Route and mix.

        Args:
            x: Tokens after the block's norm, shape `(B, N, D)`, N including prefix tokens; `(T, D)` with segments.
            text_BC: Text features, shape `(B, C)`.
            mask_BN: True where a token counts, shape `(B, N)`; None where all do.
            segments: Which tokens belong to which image, where they are packed.
            seed: Of random routing in training mode.

        Returns:
            Tokens, same shape as `x`, in the type of the FFN's output.

        Raises:
            ShapeError: If tokens, text features and segments do not fit together.
        """
        routing, _ = self.route(x, text_BC, mask_BN=mask_BN, segments=segments, seed=seed)
        return self.mix(x, routing, segments)


def _packed(x: Tensor, segments: Segments) -> Tensor:
    """Drop the leading axes of packed tokens, shape `(T, D)`."""
    tokens_TD = x.flatten(0, -2)
    if len(tokens_TD) != segments.num_tokens:
        raise ShapeError(
            "The tokens are not those of the images.",
            expected=f"{segments.num_tokens} tokens, of {len(segments)} images",
            got=f"{len(tokens_TD)} tokens",
        )
    return tokens_TD

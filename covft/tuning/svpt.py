"""Prompts that start as prototypes of the tower's own tokens.

Shapes: B images, N tokens of an image, P prompts, D embed_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from covft.errors import ConfigError, ShapeError
from covft.tuning.change import Change
from covft.tuning.method import Tower, check_choice
from covft.tuning.vpt import VPT, Prompts, tokens_of
from covft.utils.arguments import check_kinds
from covft.utils.extras import import_library
from covft.utils.modes import in_eval_mode

_SAMPLE = 4096
"""Tokens of each block that prototypes are made of, at most."""
_BATCH = 16
"""Images of a tensor that run through the tower at once."""


@check_kinds
@dataclass(frozen=True, kw_only=True)
class SVPT(VPT):
    r"""Start the prompts of `VPT` as prototypes of the tokens that the user's images give: self-prompt tuning.

    $P_i = \operatorname{kmeans}_P(\{x_{i-1}\})$: the centres of P clusters of the patch tokens that enter block $i$ of
    the plain tower, or P of these tokens drawn at random. The rest is that of `VPT`. Wang et al., "Revisiting the Power
    of Prompt for Visual Tuning", arXiv 2402.02382.

    Approximate: the tokens are those of the tower without prompts, for all blocks; and at most 4,096 tokens of a block
    are clustered, a uniform sample over all images. Differs from the paper in that its mean and maximum pooling are
    left out.

    Images are given to `covft.tune(vit, "svpt", images=...)` and not kept: a tensor `(n, 3, H, W)`, or a finite
    iterable of such tensors or of single images, as the tower takes them. A batch of the training data is enough. The
    tower runs once, in eval mode, and is left in the mode that it had.

    Attributes:
        start: `"kmeans"`, by scikit-learn; or `"sample"`, at no cost, which the paper finds satisfactory.
        seed: Seed of the sample and of the clusters, so that the same images give the same prompts.
    """

    start: str = "kmeans"
    seed: int = 0
    name: ClassVar[str] = "svpt"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("start", self.start, "kmeans", "sample")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} cannot be used.", expected="0 <= seed < 2**32", got=self.seed)

    def initialise(self, tower: Tower, change: Change, images: Any) -> None:
        """Run images through the tower, and start the prompts as prototypes of its tokens.

        Raises:
            ConfigError: If there are no images, or fewer tokens than prompts.
            ShapeError: If what is given is not images.
            MissingDependencyError: If scikit-learn is not installed.
        """
        places = {path: m for path, m in change.added.items() if isinstance(m, Prompts) and not m.prompts.is_meta}
        if not places:
            return  # a tower without values: nothing can run, and nothing has to start
        if images is None:
            raise ConfigError(
                f"{self.name!r} starts its prompts from the tokens of images, and there are none.",
                expected="a tensor of images, or an iterable of batches",
                got="images=None",
                fix=f"covft.tune(vit, {self.name!r}, images=next(iter(loader)))",
            )
        if self.start == "kmeans":
            import_library("sklearn", "analysis", needed_by='covft.tune(vit, "svpt", start="kmeans")')
        prompts = {path.rpartition(".")[0]: module for path, module in places.items()}
        samples = _tokens(tower, list(prompts), images, self.seed)
        few = min(len(rows) for rows in samples.values())
        if few < self.prompts:
            raise ConfigError(
                f"The images give fewer tokens than prompts={self.prompts}.",
                expected=f"at least {self.prompts} patch tokens",
                got=few,
                fix="more images, or fewer prompts",
            )
        starts = {path: self._prototypes(rows) for path, rows in samples.items()}
        with torch.no_grad():
            for path, module in prompts.items():
                module.prompts.copy_(starts[path])

    def _prototypes(self, tokens: Tensor) -> Tensor:
        """Return P vectors for a sample of tokens in random order."""
        if self.start == "sample":
            return tokens[: self.prompts]
        from sklearn.cluster import KMeans

        found = KMeans(self.prompts, max_iter=100, random_state=self.seed).fit(tokens.numpy())
        return torch.from_numpy(found.cluster_centers_)


class _Sample:
    """Keeps a uniform sample of all rows that it is given, in random order.

    Each row gets a random number, and the rows with the smallest stay.
    """

    def __init__(self, prefix: int, seed: int) -> None:
        self.prefix, self.generator = prefix, torch.Generator().manual_seed(seed)
        self.keys, self.rows = torch.empty(0), torch.empty(0)

    def keep(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take patch tokens that enter a block; a forward pre-hook."""
        tokens_BND = tokens_of(args, kwargs)[1]
        rows = tokens_BND[:, self.prefix :].flatten(0, 1)
        keys = torch.rand(len(rows), generator=self.generator)
        size = min(_SAMPLE, len(keys))
        keys, order = keys.topk(size, largest=False)  # of these rows alone, so that few leave the device
        rows = rows[order.to(rows.device)].to("cpu", torch.float32)
        keys, rows = torch.cat([self.keys, keys]), torch.cat([self.rows.reshape(-1, rows.shape[1]), rows])
        self.keys, order = keys.topk(min(_SAMPLE, len(keys)), largest=False)
        self.rows = rows[order]


def _tokens(tower: Tower, blocks: list[str], images: Any, seed: int) -> dict[str, Tensor]:
    """Return a sample of the patch tokens that enter each block, shape `(n, D)`."""
    vit, like = tower.vit, next(tower.vit.parameters())
    samples = {path: _Sample(tower.spec.input.prefix_tokens or 0, seed) for path in blocks}
    handles = [
        vit.get_submodule(path).register_forward_pre_hook(sample.keep, with_kwargs=True)
        for path, sample in samples.items()
    ]
    try:
        with in_eval_mode(vit), torch.no_grad():
            for batch in _batches(images):
                vit(batch.to(like.device, like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return {path: sample.rows for path, sample in samples.items()}


def _batches(images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield batches of images.

    Raises:
        ShapeError: If something else is among them.
    """
    given = images.split(_BATCH) if isinstance(images, Tensor) and images.dim() == 4 else images
    given = [images] if isinstance(images, Tensor) and images.dim() == 3 else given
    for batch in given:
        if not isinstance(batch, Tensor) or batch.dim() not in (3, 4):
            raise ShapeError(
                "The prompts start from images.",
                expected="a tensor (n, 3, H, W), or an iterable of such tensors or of single images",
                got=tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__,
                fix="images=(batch['pixel_values'] for batch in loader)",
            )
        yield batch[None] if batch.dim() == 3 else batch

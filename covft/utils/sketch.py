r"""Random projections of gradients to a fixed width, in one pass and without a projection matrix.

A gradient $x$ of $n$ weights becomes $k$ numbers, $(Sx)_j = \sum_{i:\, h(i) = j} s(i)\, x_i$, with a random bucket
$h(i)$ and a random sign $s(i)$ of each weight: feature hashing (Weinberger et al., arXiv 0902.2206), a sparse form of
the random projections of Johnson and Lindenstrauss. Inner products are kept on average, and by Lemma 2 there

$$\operatorname{Var}\,\langle Sx, Sy \rangle = \frac1k \sum_{i \ne j} \left(x_i^2 y_j^2 + x_i y_i x_j y_j\right)
\le \frac{\|x\|^2 \|y\|^2 + \langle x, y \rangle^2}{k} \le \frac{2}{k} \|x\|^2 \|y\|^2,$$

so that by Chebyshev's inequality $|\langle Sx, Sy \rangle - \langle x, y \rangle| \le \varepsilon \|x\| \|y\|$ with
probability $1 - \delta$ if $k \ge 2 / (\varepsilon^2 \delta)$. The cosine of two sketches deviates from the cosine
$\rho$ of the two gradients by $(1 - \rho^2) / \sqrt{k}$, to first order: 0.022 at most with 2048 buckets.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from covft.errors import ConfigError
from covft.utils.arguments import check_kinds

WIDTH = 2048
_MOST = 1 << 14  # bucket and sign of a weight fit into 16 bits
_AT_ONCE = 1 << 20  # weights


class GradientSketch:
    """Projects gradients to a fixed width, with the same random buckets and signs for a name at every call.

    Beside a gradient it holds two bytes per weight, the bucket and sign of each.

    Args:
        width: Numbers k that a gradient becomes.
        seed: Of the buckets and signs.

    Raises:
        ConfigError: If the width cannot be used.

    Example:
        >>> sketch = GradientSketch(64)
        >>> sketch({"weight": torch.ones(30, 40)}).shape
        torch.Size([64])
    """

    @check_kinds
    def __init__(self, width: int = WIDTH, seed: int = 0) -> None:
        if not 1 <= width <= _MOST:
            raise ConfigError(f"width={width} cannot be used.", expected=f"a whole number from 1 to {_MOST}", got=width)
        self.width, self.seed = width, seed
        self._drawn: dict[str, Tensor] = {}

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Project the gradients of some weights, taken together as one vector.

        Args:
            gradients: By name of the weight.

        Returns:
            Their projection, `(k,)`, float32, on the CPU.
        """
        total = torch.zeros(self.width)
        for name, gradient in gradients.items():
            total += self._of_one(name, gradient.detach().reshape(-1)).cpu()
        return total

    def _of_one(self, name: str, values: Tensor) -> Tensor:
        drawn = self._draw(name, values)
        summed = torch.zeros(self.width, dtype=torch.float32, device=values.device)
        for start in range(0, values.numel(), _AT_ONCE):
            chosen = drawn[start : start + _AT_ONCE].int()
            signed = values[start : start + _AT_ONCE].float() * (1 - 2 * (chosen & 1))
            summed.index_add_(0, chosen >> 1, signed)
        return summed

    def _draw(self, name: str, values: Tensor) -> Tensor:
        known = self._drawn.get(name)
        if known is None or known.numel() != values.numel():
            seed = zlib.crc32(f"{self.seed}/{name}".encode())
            generator = torch.Generator().manual_seed(seed)
            known = torch.randint(2 * self.width, (values.numel(),), generator=generator, dtype=torch.int16)
        self._drawn[name] = known = known.to(values.device)
        return known


def along_first_direction(rows: np.ndarray) -> tuple[np.ndarray, float]:
    r"""Return the cosines of vectors with their first principal direction, and its share of their squared length.

    The direction is the unit vector $v$ that maximises $\sum_i \langle x_i, v \rangle^2$, signed so that the mean
    cosine is not negative.

    Args:
        rows: The vectors, `(N, n)`, not all zero; one of zero has cosine 0.
    """
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    along = np.sqrt(max(values[-1], 0.0)) * vectors[:, -1]
    cosines = np.divide(along, norms, out=np.zeros_like(along), where=norms > 0)
    return cosines if cosines.sum() >= 0 else -cosines, float(values[-1] / values.sum())

import numpy as np
import pytest
import torch

from covft.errors import ConfigError
from covft.utils.sketch import GradientSketch

SIZE, WIDTH, DRAWS = 1500, 128, 150


def pair_of(cosine):
    """Two vectors of other lengths, at a known angle."""
    x, y = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, 2)))[0].T
    return 3 * x, 0.5 * (cosine * x + np.sqrt(1 - cosine**2) * y)


def sketched(vector, seed):
    return GradientSketch(WIDTH, seed)({"weight": torch.from_numpy(vector).float()}).double().numpy()


@pytest.mark.parametrize("cosine", [0.0, 0.6, -0.9])
def test_inner_products_and_cosines_deviate_as_stated(cosine):
    x, y = pair_of(cosine)
    pairs = [(sketched(x, seed), sketched(y, seed)) for seed in range(DRAWS)]
    found = np.array([a @ b for a, b in pairs])
    same = x**2 @ y**2
    variance = ((x @ x) * (y @ y) - same + (x @ y) ** 2 - same) / WIDTH
    assert variance <= 2 / WIDTH * (x @ x) * (y @ y)
    assert found.mean() == pytest.approx(x @ y, abs=4 * np.sqrt(variance / DRAWS))
    assert found.var() == pytest.approx(variance, rel=0.5)
    chance = 0.1  # by Chebyshev's inequality
    error = np.sqrt(2 / (WIDTH * chance)) * np.linalg.norm(x) * np.linalg.norm(y)
    assert (np.abs(found - x @ y) > error).mean() <= chance
    cosines = np.array([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    assert cosines.std() == pytest.approx((1 - cosine**2) / np.sqrt(WIDTH), rel=0.25)


def test_several_weights_are_one_vector_and_it_is_linear():
    sketch = GradientSketch(64)
    one, two = torch.randn(20, 30), torch.randn(7)
    both = sketch({"a": one, "b": two})
    torch.testing.assert_close(both, sketch({"a": one}) + sketch({"b": two}))
    torch.testing.assert_close(sketch({"a": 2 * one}), 2 * sketch({"a": one}))
    assert not torch.equal(sketch({"a": two}), sketch({"b": two})), "each name has its own buckets"
    torch.testing.assert_close(GradientSketch(64)({"b": two, "a": one}), both)


def test_large_weights_are_read_in_parts(monkeypatch):
    weight = {"weight": torch.randn(1000)}
    at_once = GradientSketch(32)(weight)
    monkeypatch.setattr("covft.utils.sketch._AT_ONCE", 64)
    torch.testing.assert_close(GradientSketch(32)(weight), at_once)


def test_every_width_fits_and_wider_ones_are_refused():
    assert GradientSketch(1 << 14)({"a": torch.randn(100_000)}).count_nonzero() > 16_000
    for width in (0, (1 << 14) + 1):
        with pytest.raises(ConfigError, match="width="):
            GradientSketch(width)

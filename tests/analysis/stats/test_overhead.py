"""Costs are those of formulas, and what is timed is what the row says."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.analysis.plots.overhead import plot_overhead
from covft.analysis.stats.overhead import overhead
from covft.nn.cost import count_flops, count_parameters
from covft.testing import ToyViT


@pytest.mark.long
def test_costs_of_a_block_are_those_of_the_formulas():
    vit, asked = ToyViT(), []

    def encode(texts):
        asked.extend(texts)
        return torch.zeros(len(texts), 8)

    before = {name: value.clone() for name, value in vit.state_dict().items()}
    found = overhead(vit, layers=[1], text_encoder=encode, images=torch.randn(2, 3, 16, 16), repeats=3)
    plain, tuned, text = found
    ffn = 2 * 16 * 64
    block = count_parameters(embed_dim=16, text_dim=8, ffn_parameters=ffn + 16 + 64)
    assert tuned.parameters - plain.parameters == block.total - (ffn + 16 + 64)
    flops = count_flops(embed_dim=16, text_dim=8, ffn_weights=ffn, num_tokens=5)
    assert tuned.flops - plain.flops == flops.total - 2 * ffn * 5
    assert tuned.kept_bytes == covft.budget(vit, "covft", text_dim=8, layers=[1]).kept_bytes > plain.kept_bytes == 0
    assert text.parameters is None
    assert min(cost.seconds for cost in found) > 0
    runs = [one for one in asked if one.startswith("what is left of the cup?")]
    assert len(set(runs)) == 4  # one that does not count, and three; none of them cached
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())
    written = [text.get_text() for axes in plot_overhead(found).axes for text in axes.texts]
    assert "not counted" in written


@pytest.mark.long
def test_a_width_leaves_out_the_text_encoder():
    rows = overhead(ToyViT(), "lora", r=2, text_encoder=8, images=torch.randn(1, 3, 16, 16), repeats=1)
    assert [row.name for row in rows] == ["tower", "tower with lora"]
    assert rows[1].trained == covft.budget(ToyViT(), "lora", r=2).parameters


def test_a_method_that_is_not_known_is_refused():
    with pytest.raises(covft.errors.ConfigError, match="nothing"):
        overhead(ToyViT(), "nothing", text_encoder=8, images=torch.randn(1, 3, 16, 16))

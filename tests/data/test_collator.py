"""Batches: nothing is lost in padding, every tile finds its row, and dummies change nothing but the graph."""

import pytest
import torch
from torch import nn

from covft.data import Collator, drop_dummies
from covft.errors import ConfigError, ShapeError


def sample(length, tiles=0, size=4, text="Why?"):
    ids = torch.randint(5, 99, (length,))
    labels = torch.where(torch.rand(length) < 0.5, ids, -100)
    pixels = torch.rand(tiles, 3, size, size) if tiles else None
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "num_tiles": [tiles], "context_text": text}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_padding(side, multiple):
    samples = [sample(length, 1) for length in (3, 7, 5)]
    batch = Collator(0, padding_side=side, pad_to_multiple_of=multiple)(samples)
    assert batch["input_ids"].shape == (3, 7 if multiple == 1 else 8)
    for row, one in enumerate(samples):
        kept = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][kept], one["input_ids"])
        assert torch.equal(batch["labels"][row][kept], one["labels"])
        assert (batch["input_ids"][row][~kept] == 0).all()
        assert (batch["labels"][row][~kept] == -100).all()
        assert kept[0 if side == "right" else -1]


def test_every_tile_finds_its_row():
    samples = [sample(3, 2, text="a"), sample(4, text="b"), sample(2, 1, text="c"), sample(2, 3, text="d")]
    batch = Collator(0)(samples)
    assert batch["context_index"].tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch["image_flags"].tolist() == [1, 1, 0, 1, 1, 1, 1]
    assert batch["context_text"] == ["a", "b", "c", "d"]
    assert batch["num_tiles"] == [[2], [0], [1], [3]]
    for row, one in enumerate(samples):
        tiles = batch["pixel_values"][batch["context_index"] == row]
        assert torch.equal(tiles, torch.zeros(1, 3, 4, 4) if one["pixel_values"] is None else one["pixel_values"])


def test_dummies_of_a_batch():
    mixed, text = [sample(3), sample(3, 1), sample(3)], [sample(3), sample(3)]
    collate = Collator(0, image_shape=(3, 4, 4), dummies="batch")
    assert collate(mixed)["context_index"].tolist() == [1]
    assert (collate(text)["context_index"].tolist(), collate(text)["image_flags"].tolist()) == ([0], [0])
    assert Collator(0, image_shape=(3, 4, 4))(text)["context_index"].tolist() == [0, 1]
    none = Collator(0, dummies="none")
    assert none(mixed)["context_index"].tolist() == [1]
    assert "pixel_values" not in none(text)


def test_dummies_change_nothing_but_the_graph():
    tower = nn.Conv2d(3, 2, 4)
    for samples in ([sample(3, 2), sample(3)], [sample(3), sample(3)]):
        batch = Collator(0, image_shape=(3, 4, 4))(samples)
        tower.zero_grad(set_to_none=True)
        features, zero = drop_dummies(tower(batch["pixel_values"]), batch["image_flags"])
        real = samples[0]["pixel_values"]
        assert len(features) == (0 if real is None else 2)
        assert zero.item() == 0
        loss = zero + (features.sum() if len(features) else 0)  # a model without image tokens reads no features
        loss.backward()
        want = torch.zeros(2, 3, 4, 4) if real is None else real.sum(0).expand(2, -1, -1, -1)
        torch.testing.assert_close(tower.weight.grad, want)
        assert torch.equal(tower.bias.grad, torch.full((2,), float(len(features))))


def test_no_dummies_are_fine_too():
    features, zero = drop_dummies(torch.ones(3, 2, requires_grad=True), torch.tensor([1, 1, 1]))
    assert features.shape == (3, 2)
    assert zero.item() == 0
    with pytest.raises(ShapeError, match="one flag per tile"):
        drop_dummies(torch.ones(3, 2), torch.tensor([1, 1]))


def test_batches_that_cannot_be_made():
    with pytest.raises(ShapeError, match="differ in size") as error:
        Collator(0)([sample(3, 1, size=4), sample(3, 1, size=5)])
    assert "(3, 4, 4) and (3, 5, 5)" in str(error.value)
    with pytest.raises(ShapeError, match="size of a dummy image is unknown"):
        Collator(0)([sample(3)])


@pytest.mark.parametrize(
    "options",
    [
        {"pad_token_id": None},
        {"pad_token_id": 0, "dummies": "some"},
        {"pad_token_id": 0, "padding_side": "top"},
        {"pad_token_id": 0, "pad_to_multiple_of": 0},
    ],
)
def test_settings_that_cannot_work(options):
    with pytest.raises(ConfigError):
        Collator(**options)

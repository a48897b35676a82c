"""What a call of the tower tells about its images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from covft.adapters import InputFormat
from covft.conditioning import TowerCall
from covft.errors import ShapeError

PADDED = InputFormat(mask_argument="valid", prefix_tokens=1)
PACKED = InputFormat(layout="TD", sizes_argument="valid", sizes_unit=10)


class Tower(nn.Module):
    def forward(self, images: Any, valid: Tensor | None = None) -> Any:
        return images


def read(*args: Any, form: InputFormat = PADDED, **kwargs: Any) -> TowerCall:
    return TowerCall.read(form, Tower(), args, kwargs)


def test_images__are_found_by_position_and_by_name():
    images = torch.randn(3, 3, 8, 8)
    assert read(images).num_images == 3
    assert read(images=images).num_images == 3
    assert read(pixel_values=images).num_images == 3
    tower = Tower()
    tower.main_input_name = "photographs"
    assert TowerCall.read(PADDED, tower, (), {"photographs": images}).num_images == 3
    assert read({"patches": torch.randn(2, 5, 4)}).num_images == 2
    assert read().num_images is None
    assert read([images[0]]).num_images is None


def test_images__may_have_several_axes():
    form = InputFormat(image_axes=2)
    assert read(torch.randn(2, 5, 4, 3, 8, 8), form=form).num_images == 10
    assert read(torch.randn(2, 5, 4, 3, 8, 8)).num_images is None


def test_mask__is_found_wherever_it_stands():
    images, mask = torch.randn(2, 2, 4), torch.tensor([[1, 0], [1, 1]])
    for call in (read(images, mask), read(images, valid=mask), read({"patches": images, "valid": mask})):
        assert torch.equal(call.mask_BN, mask.bool())
    assert read(images).mask_BN is None
    assert read(images).mask_for(7) is None


def test_mask__comes_from_positions_where_padding_has_one_of_its_own():
    form = InputFormat(mask_argument="valid", mask_padding=-1)
    positions = torch.tensor([[[0, 0], [0, 1], [-1, -1]]])
    assert read(torch.randn(1, 3, 4), positions, form=form).mask_BN.tolist() == [[True, True, False]]


def test_mask__covers_prefix_tokens_and_refuses_other_numbers():
    call = read(torch.randn(1, 2, 4), torch.tensor([[True, False]]))
    assert call.mask_for(3).tolist() == [[True, True, False]]
    assert call.mask_for(2).tolist() == [[True, False]]
    with pytest.raises(ShapeError, match="valid does not cover the tokens"):
        call.mask_for(4)


def test_mask__of_tiles_is_spread_over_their_tokens():
    form = InputFormat(mask_argument="valid", mask_unit=2)
    call = read(torch.randn(2, 2, 4), torch.tensor([[1, 0], [0, 0]]), form=form)
    # Two tokens of each tile, one of padding; an image of padding alone counts all its tiles.
    assert call.mask_for(6).int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0]]


def test_packed__one_image_for_each_size():
    call = read(torch.randn(5, 4), torch.tensor([[20], [30]]), form=PACKED)
    assert (call.num_images, len(call.segments)) == (2, 2)
    assert read(torch.randn(5, 4), form=PACKED).segments is None  # the tower itself says what is missing
    assert call.segments_for(torch.randn(5, 4)).lengths == (2, 3)


def test_packed__patches_as_one_sequence_are_refused_for_other_towers():
    with pytest.raises(ShapeError, match="Tower was given patches as one sequence"):
        read(torch.randn(24, 192))
    assert read(torch.ones(24, 2, dtype=torch.long)).num_images is None  # token ids, not patches


def test_mask__of_an_image_that_is_all_padding_counts_all_its_tokens():
    call = read(torch.randn(2, 2, 4), torch.tensor([[False, False], [True, False]]))
    assert call.mask_for(3).tolist() == [[True, True, True], [True, True, False]]
    assert call.mask_for(2).tolist() == [[True, True], [True, False]]

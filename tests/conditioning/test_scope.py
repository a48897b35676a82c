"""Which text each image has."""

import pytest
import torch

import covft
from covft.conditioning import Scope
from covft.errors import ShapeError
from tests.helpers.conditioning import Case
from tests.helpers.towers import TEXT_DIM


def test_one_text_for_all_images():
    case = Case("timm-clip")
    encoder = case.encoder.eval()
    encoder.set_text_encoder(covft.testing.HashTextEncoder(TEXT_DIM))
    alone = encoder(case.images, "what is left of the cup?")
    spread = encoder(case.images, ["what is left of the cup?"] * 3)
    assert torch.equal(alone, spread)
    with pytest.raises(ShapeError, match="3 images, but the text is for 1"):
        encoder(case.images, ["what is left of the cup?"])


def test_scopes__groups_may_be_repeated_where_it_was_said():
    texts = torch.randn(6, 3)
    scope = Scope(texts)
    with pytest.raises(ShapeError, match="12 images, but the text is for 6"):
        scope.text_for(12)
    scope.groups = [2, 2, 2]
    assert torch.equal(scope.text_for(6), texts)
    assert torch.equal(scope.text_for(12), texts[[0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]])
    with pytest.raises(ShapeError, match="8 images, but the text is for 6"):
        scope.text_for(8)
    scope = Scope(texts[:2], torch.tensor([1, 0, 1, 1]))
    scope.groups = [2, 2]
    assert torch.equal(scope.text_for(8), texts[[1, 0, 1, 0, 1, 1, 1, 1]])
    scope.groups = [1, 0, 3]
    assert torch.equal(scope.text_for(8), texts[[1, 1, 0, 1, 1, 0, 1, 1]])

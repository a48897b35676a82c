"""What the tests of this folder share."""

import copy

import pytest

from tests.helpers.checkpoints import clip_vit, trained, wrapped


@pytest.fixture
def saved(tmp_path):
    """A trained encoder, the base that it was made from, and the folder that it was saved in."""
    base = clip_vit().eval()
    encoder = trained(wrapped(copy.deepcopy(base)).train()).eval()
    encoder.save_pretrained(tmp_path / "run")
    return encoder, base, tmp_path / "run"

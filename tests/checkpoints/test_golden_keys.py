"""Names and shapes of the tensors in a saved folder, against those of folders that users have."""

import json
from pathlib import Path

import pytest

from covft.checkpoints.folder import read_folder
from tests.helpers.checkpoints import TOWERS, wrapped

GOLDEN = Path(__file__).parent / "golden"


GOLDENS = {
    "timm_cve_dense": ("timm", {}),
    "timm_image_dense": ("timm", {"context": "image", "train_norms": "none"}),
    "timm_uniform": ("timm", {"routing": "uniform", "train_norms": "adapted"}),
    "clip_cve_dense": ("clip", {}),
    "clip_text_dense": ("clip", {"context": "text", "train_norms": "none"}),
    "clip_concat_sparse": ("clip", {"context": "concat", "routing": "sparse", "train_norms": "adapted"}),
}


@pytest.mark.parametrize("golden", GOLDENS)
def test_names_and_shapes_are_those_of_existing_folders(golden, tmp_path):
    """A renamed parameter makes every saved folder unreadable: if this fails, load() needs a migration."""
    tower, settings = GOLDENS[golden]
    wrapped(TOWERS[tower](), **settings).save_pretrained(tmp_path)
    found = {name: list(tensor.shape) for name, tensor in read_folder(tmp_path)[0].items()}
    assert found == json.loads((GOLDEN / f"keys_{golden}.json").read_text(encoding="utf-8"))

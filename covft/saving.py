"""What of a wrapped ViT is saved, and with what it belongs to."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import covft
from covft.adapters.sources import source_of
from covft.errors import CheckpointError
from covft.fingerprint import fingerprint
from covft.folder import write_folder
from covft.model_card import model_card

if TYPE_CHECKING:
    from covft.encoder import ContextEncoder


def adapted_state_dict(encoder: ContextEncoder) -> dict[str, Tensor]:
    """What was added or trained, by the names it has in the ViT.

    Args:
        encoder: A wrapped ViT.
    """
    vit, slots = encoder.vit, _slot_prefixes(encoder)
    trained = {name for name, parameter in vit.named_parameters() if parameter.requires_grad} | set(encoder.norms)
    return {name: t for name, t in vit.state_dict().items() if name.startswith(slots) or name in trained}


def base_state_dict(encoder: ContextEncoder) -> dict[str, Tensor]:
    """The ViT's weights as they were before wrapping, by the names they had.

    Parameters that the caller trained beside covft's are as they are now.

    Args:
        encoder: A wrapped ViT.
    """
    slots, original = _slot_prefixes(encoder), encoder.original
    state = {name: t for name, t in encoder.vit.state_dict().items() if not name.startswith(slots)}
    state.update({name: value for name, value in original.values.items() if name in state})
    for path, ffn in original.ffns.items():
        state.update({f"{path}.{name}": tensor for name, tensor in ffn.state_dict().items()})
    return state


def save(encoder: ContextEncoder, folder: str | Path) -> None:
    """Write a saved folder; see `ContextEncoder.save_pretrained`.

    Args:
        encoder: A wrapped ViT.
        folder: Made if it does not exist.

    Raises:
        CheckpointError: If the folder is a file, or weights are on the meta device.
    """
    tensors = adapted_state_dict(encoder)
    if meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise CheckpointError("Weights on the meta device have no values to save.", got=", ".join(meta[:5]))
    write_folder(folder, tensors, _config(encoder, set(tensors)), model_card(encoder))


def push(encoder: ContextEncoder, repo_id: str, **kwargs: Any) -> str:
    """Save to a repository of the Hugging Face Hub; see `ContextEncoder.push_to_hub`.

    Args:
        encoder: A wrapped ViT.
        repo_id: Such as `name/repository`.
        **kwargs: Options of the Hub's client.
    """
    from huggingface_hub import HfApi

    private = kwargs.pop("private", None)
    api = HfApi(token=kwargs.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save(encoder, folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))


def _config(encoder: ContextEncoder, saved: set[str]) -> dict[str, Any]:
    base = base_state_dict(encoder)
    extra = sorted(name for name in saved & set(base) if name not in encoder.norms)
    return {
        "library_version": covft.__version__,
        "covft": encoder.covft_config.to_dict(),
        "base": {
            "source": source_of(encoder.vit),
            "revision": getattr(getattr(encoder.vit, "config", None), "_commit_hash", None),
            "library": encoder.spec.library,
            "class_name": encoder.spec.class_name,
            "fingerprint": fingerprint((name, tensor) for name, tensor in base.items() if name not in extra),
        },
        "text": {
            "source": encoder.text_name,
            "width": encoder.context_dim,
            "revision": getattr(encoder.text_encoder, "revision", None),
        },
        "extra": extra,
    }


def _slot_prefixes(encoder: ContextEncoder) -> tuple[str, ...]:
    return tuple(f"{encoder.spec.blocks[layer].mlp_path}." for layer in encoder.layers)

"""Loading what was saved, and importing the checkpoints that the paper's authors released."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from covft.adapters.sources import load_vit
from covft.config import CoVFTConfig
from covft.encoder import ContextEncoder
from covft.errors import CheckpointError
from covft.fingerprint import difference, fingerprint
from covft.folder import CONFIG_NAME, WEIGHTS_NAME, compare_tensors, read_folder
from covft.reference import import_reference
from covft.saving import adapted_tensors, base_state_dict
from covft.sharding import assign, full, in_engine, shape_of, unpartitioned
from covft.slot import AdaptedFFN
from covft.text import as_text_encoder
from covft.wrapping import unwrap, wrap

__all__ = ["import_reference", "load"]


def load(folder_or_repo_id: str | Path, vit: nn.Module | None = None, text_encoder: Any = None) -> ContextEncoder:
    """Load a saved encoder: wrap the base ViT again and put the trained weights in.

    Args:
        folder_or_repo_id: What `save_pretrained` wrote, or a repository of the Hugging Face Hub.
        vit: The base ViT, changed in place; None builds it from the id that was saved.
        text_encoder: The text encoder; None builds it from the id that was saved.

    Returns:
        The encoder, with the outputs of the one that was saved.

    Raises:
        CheckpointError: If the folder is incomplete or damaged, if it was made for other base weights,
            or if tensors are missing, unexpected or of another shape; the ViT is then as it was.

    Example:
        >>> encoder = load("runs/covft", vit=vit, text_encoder=bert)  # doctest: +SKIP
    """
    tensors, saved = read_folder(_local(folder_or_repo_id))
    settings = CoVFTConfig.from_dict(saved["covft"])
    if vit is None:
        vit = _build_base(saved["base"])
    if text_encoder is None:
        text_encoder = _build_text(saved["text"], settings)
    extra = set(saved.get("extra", ()))
    _check_base(vit, saved["base"], extra)
    encoder = wrap(vit, text_encoder, config=settings)
    try:
        _fill(encoder, tensors, extra)
    except CheckpointError:
        unwrap(encoder)
        raise
    _warn_other_text(saved["text"]["source"], encoder.text_name)
    return encoder


def load_into(encoder: ContextEncoder, folder: str | Path) -> None:
    """Put saved weights into an encoder that is wrapped already.

    Args:
        encoder: Wrapped with the settings, and around the base weights, of the one that was saved.
        folder: What `save_pretrained` wrote.

    Raises:
        CheckpointError: If the folder is incomplete or damaged, if it was made with other settings or for other base
            weights, or if tensors are missing, unexpected or of another shape; the encoder is then as it was.
    """
    tensors, saved = read_folder(folder)
    settings, extra = CoVFTConfig.from_dict(saved["covft"]), set(saved.get("extra", ()))
    if not settings.is_same_model(encoder.covft_config):
        raise CheckpointError(
            f"{folder} was saved with other settings than those of this encoder.",
            expected=encoder.covft_config,
            got=settings,
        )
    base = {name: tensor for name, tensor in base_state_dict(encoder).items() if name not in extra}
    apart = difference(saved["base"]["fingerprint"], fingerprint(base.items()))
    if apart is not None:
        raise CheckpointError(f"{folder} was made for other base weights than those of this encoder.", got=apart)
    _fill(encoder, tensors, extra)


def _local(folder_or_repo_id: str | Path) -> Path:
    folder = Path(folder_or_repo_id)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder_or_repo_id)):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        patterns = [CONFIG_NAME, WEIGHTS_NAME, "README.md"]
        return Path(snapshot_download(str(folder_or_repo_id), allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{folder_or_repo_id} is no folder here, and cannot be had from the Hugging Face Hub.",
            expected="a folder that save_pretrained wrote, or a repository that can be reached",
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix=f"hf download {folder_or_repo_id}, where there is a network",
        ) from error


def _build_base(base: dict[str, Any]) -> nn.Module:
    if base["source"] is None:
        raise CheckpointError(
            f"The folder does not say where its base ViT ({base['library']} {base['class_name']}) comes from.",
            expected="the ViT as an argument",
            fix="covft.load(folder, vit=...)",
        )
    revision = {} if base.get("revision") is None else {"revision": base["revision"]}
    return load_vit(base["source"], **revision)


def _build_text(text: dict[str, Any], settings: CoVFTConfig) -> Any:
    source = text["source"]
    if source is None and not settings.needs_text:
        return None
    if source is not None and source.startswith("features:"):
        return text["width"]
    if source is None or source.startswith("callable:"):
        raise CheckpointError(
            f"The text encoder of this folder ({source}) cannot be built from its name.",
            expected=f"a text encoder of width {text['width']}, or that width if you bring features",
            fix=f"covft.load(folder, text_encoder={text['width']})",
        )
    revision = None if "revision=" in source else text.get("revision")
    with unpartitioned():
        return as_text_encoder(source, revision=revision)


def _check_base(vit: nn.Module, base: dict[str, Any], extra: set[str]) -> None:
    if any(isinstance(module, AdaptedFFN) for module in vit.modules()):
        return  # wrap() says what is wrong with that
    found = fingerprint((n, t) for n, t in vit.state_dict(keep_vars=True).items() if n not in extra)
    apart = difference(base["fingerprint"], found)
    if apart is not None:
        raise CheckpointError(
            "The folder was made for other base weights than those of this ViT.",
            expected=f"{base['library']} {base['class_name']}, {base['source'] or 'of unknown source'}",
            got=f"{type(vit).__name__}: {apart}",
            fix="load the base ViT that the encoder was trained from",
        )


def _fill(encoder: ContextEncoder, tensors: dict[str, Tensor], extra: set[str]) -> None:
    if in_engine(encoder.vit):
        raise CheckpointError(
            "The encoder is inside a DeepSpeed engine, whose optimizer would put its own values back.",
            expected="an encoder that no engine was made for yet",
            got=type(encoder.vit).__name__,
            fix="load first, then deepspeed.initialize(...); or engine.load_checkpoint(folder) of a training",
        )
    state = encoder.vit.state_dict(keep_vars=True)
    extra = extra & set(state)
    wanted = {name: shape_of(t) for name, t in adapted_tensors(encoder).items()}
    wanted.update({name: shape_of(state[name]) for name in extra})
    compare_tensors(wanted, {name: tuple(t.shape) for name, t in tensors.items()}, "the folder")
    for name in sorted(extra):
        encoder.original.values[name] = full(state[name]).clone()
        if isinstance(state[name], nn.Parameter):
            state[name].requires_grad_(True)
    for name, tensor in tensors.items():
        assign(state[name], tensor)


def _warn_other_text(saved: str | None, found: str | None) -> None:
    """Say that the router now sees features it was not trained on, where names can tell."""
    if saved is None or found is None or any(name.startswith(("features:", "callable:")) for name in (saved, found)):
        return
    if Path(saved).name != Path(found).name:  # a folder may have been moved
        warnings.warn(
            f"The encoder was trained with the text encoder {saved!r} and is loaded with {found!r}; "
            "its router does not know those features.",
            UserWarning,
            stacklevel=3,
        )

"""Reads a saved encoder, and fills its weights into a wrapped ViT."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from covft.adapters.sources import load_vit
from covft.checkpoints.fingerprint import difference, fingerprint
from covft.checkpoints.folder import CONFIG_NAME, WEIGHTS_NAME, compare_tensors, read_folder
from covft.checkpoints.saving import adapted_tensors, base_state_dict
from covft.config import CoVFTConfig
from covft.errors import CheckpointError
from covft.surgery.wrapped import WrappedViT
from covft.text import as_text_encoder
from covft.utils.sharding import assign, full, in_engine, shape_of, unpartitioned


@dataclass(frozen=True)
class SavedEncoder:
    """The contents of a saved folder.

    Attributes:
        folder: Where it was read.
        tensors: The weights by their names in the ViT, on the CPU.
        config: The settings.
        base: What is known of the base ViT: source, library, class, fingerprint.
        text: What is known of the text encoder: source, text_dim, revision.
        extra: Names of parameters of the base ViT that the caller had trained too.
    """

    folder: Path
    tensors: dict[str, Tensor]
    config: CoVFTConfig
    base: dict[str, Any]
    text: dict[str, Any]
    extra: frozenset[str]

    @classmethod
    def read(cls, folder_or_repo_id: str | Path) -> SavedEncoder:
        """Read a folder, or a repository of the Hugging Face Hub.

        Raises:
            CheckpointError: If it is incomplete or damaged, or cannot be reached.
        """
        folder = _local(folder_or_repo_id)
        tensors, saved = read_folder(folder)
        config, extra = CoVFTConfig.from_dict(saved["covft"]), frozenset(saved.get("extra", ()))
        return cls(folder, tensors, config, saved["base"], saved["text"], extra)

    def build_vit(self) -> nn.Module:
        """Build the base ViT from its source.

        Raises:
            CheckpointError: If the folder does not name a source.
        """
        base = self.base
        if base["source"] is None:
            raise CheckpointError(
                f"The folder does not name the source of its base ViT ({base['library']} {base['class_name']}).",
                expected="the ViT as an argument",
                fix="covft.load(folder, vit=...)",
            )
        revision = {} if base.get("revision") is None else {"revision": base["revision"]}
        return load_vit(base["source"], **revision)

    def build_text_encoder(self) -> Any:
        """Build the text encoder from its source; None where none is needed.

        Raises:
            CheckpointError: If it cannot be built from its name.
        """
        source, text_dim = self.text["source"], self.text["text_dim"]
        if source is None and not self.config.needs_text:
            return None
        if source is not None and source.startswith("features:"):
            return text_dim
        if source is None or source.startswith("callable:"):
            raise CheckpointError(
                f"The text encoder of this folder ({source}) cannot be built from its name.",
                expected=f"a text encoder of width {text_dim}, or that width if you bring features",
                fix=f"covft.load(folder, text_encoder={text_dim})",
            )
        revision = None if "revision=" in source else self.text.get("revision")
        with unpartitioned():
            return as_text_encoder(source, revision=revision)

    def check_base(self, vit: nn.Module) -> None:
        """Refuse a ViT with other weights than those that the encoder was trained from.

        Raises:
            CheckpointError: If its fingerprint is another.
        """
        base = self.base
        found = fingerprint((n, t) for n, t in vit.state_dict(keep_vars=True).items() if n not in self.extra)
        apart = difference(base["fingerprint"], found)
        if apart is not None:
            raise CheckpointError(
                "The folder was made for other base weights than those of this ViT.",
                expected=f"{base['library']} {base['class_name']}, {base['source'] or 'of unknown source'}",
                got=f"{type(vit).__name__}: {apart}",
                fix="load the base ViT that the encoder was trained from",
            )

    def fill(self, wrapped: WrappedViT) -> None:
        """Put the weights into a wrapped ViT.

        Args:
            wrapped: Wrapped with these settings, around these base weights.

        Raises:
            CheckpointError: If tensors are missing, unexpected or of another shape; it is then as it was.
        """
        if in_engine(wrapped.vit):
            raise CheckpointError(
                "The encoder is inside a DeepSpeed engine, whose optimizer would overwrite the loaded values.",
                expected="an encoder without an engine so far",
                got=type(wrapped.vit).__name__,
                fix="load first, then deepspeed.initialize(...); or engine.load_checkpoint(folder) of a training",
            )
        state = wrapped.vit.state_dict(keep_vars=True)
        extra = self.extra & set(state)
        wanted = {name: shape_of(t) for name, t in adapted_tensors(wrapped).items()}
        wanted.update({name: shape_of(state[name]) for name in extra})
        compare_tensors(wanted, {name: tuple(t.shape) for name, t in self.tensors.items()}, "the folder")
        for name in sorted(extra):
            wrapped.original.values[name] = full(state[name]).clone()
            if isinstance(state[name], nn.Parameter):
                state[name].requires_grad_(True)
        for name, tensor in self.tensors.items():
            assign(state[name], tensor)
        self._warn_other_text(wrapped.text_name)

    def _warn_other_text(self, found: str | None) -> None:
        """Warn that the router gets features it was not trained on, where names can tell."""
        saved = self.text["source"]
        if saved is None or found is None or any(n.startswith(("features:", "callable:")) for n in (saved, found)):
            return
        if Path(saved).name != Path(found).name:  # a folder may have been moved
            warnings.warn(
                f"The encoder was trained with the text encoder {saved!r} and is loaded with {found!r}; "
                "its router does not know those features.",
                UserWarning,
                stacklevel=4,
            )


def load_into(wrapped: WrappedViT, folder: str | Path) -> None:
    """Put saved weights into a ViT that is wrapped already.

    Args:
        wrapped: Wrapped with the settings, and around the base weights, of the saved one.
        folder: What `save_pretrained` wrote.

    Raises:
        CheckpointError: If the folder is incomplete or damaged, if it was made with other settings or for other base
            weights, or if tensors are missing, unexpected or of another shape; the ViT is then as it was.
    """
    saved = SavedEncoder.read(folder)
    if not saved.config.is_same_model(wrapped.covft_config):
        raise CheckpointError(
            f"{folder} was saved with other settings than those of this encoder.",
            expected=wrapped.covft_config,
            got=saved.config,
        )
    base = {name: tensor for name, tensor in base_state_dict(wrapped).items() if name not in saved.extra}
    apart = difference(saved.base["fingerprint"], fingerprint(base.items()))
    if apart is not None:
        raise CheckpointError(f"{folder} was made for other base weights than those of this encoder.", got=apart)
    saved.fill(wrapped)


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
            f"{folder_or_repo_id} is not a folder here, and cannot be fetched from the Hugging Face Hub.",
            expected="a folder that save_pretrained wrote, or a repository that can be reached",
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix=f"hf download {folder_or_repo_id}, where there is a network",
        ) from error

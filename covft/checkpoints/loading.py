"""Reads a saved encoder, and fills its weights into a wrapped ViT."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from covft.adapters.sources import load_vit
from covft.checkpoints.fingerprint import difference, fingerprint
from covft.checkpoints.folder import CONFIG_NAME, WEIGHTS_NAME, check_finite, compare_tensors, read_config, read_folder
from covft.checkpoints.saving import adapted_tensors, base_state_dict
from covft.checkpoints.schema import check_fields
from covft.checkpoints.sources import LOCAL, is_hub_id, public_source, text_source, vit_source
from covft.config import CoVFTConfig
from covft.errors import CheckpointError
from covft.surgery.wrapped import WrappedViT
from covft.text import as_text_encoder
from covft.text.cleaning import RULES_VERSION
from covft.utils.sharding import assign, full, in_engine, shape_of, unpartitioned
from covft.utils.transformers_names import saved_names


@dataclass(frozen=True)
class Saved:
    """What every saved folder has.

    Attributes:
        folder: Where it was read.
        tensors: The weights, on the CPU, by the names that `saved_names` gives those of the ViT.
        base: What is known of the base ViT: source, library, class, fingerprint.
        text: What is known of the text encoder: source, text_dim, revision.
    """

    folder: Path
    tensors: dict[str, Tensor]
    base: dict[str, Any]
    text: dict[str, Any]

    @property
    def needs_text(self) -> bool:
        """Whether it cannot be used without text."""
        raise NotImplementedError

    @property
    def others(self) -> Collection[str]:
        """Names of tensors that the fingerprint of the base ViT leaves out."""
        return ()

    def build_vit(self) -> nn.Module:
        """Build the base ViT from its source.

        Raises:
            CheckpointError: If the folder does not name a source, or one that a file may not choose.
        """
        base = self.base
        if base["source"] is None:
            raise CheckpointError(
                f"The folder does not name the source of its base ViT ({base['library']} {base['class_name']}).",
                expected="the ViT as an argument",
                fix="covft.load(folder, vit=...)",
            )
        source, options = vit_source(base["source"], base["revision"])
        return load_vit(source, **options)

    def build_text_encoder(self) -> Any:
        """Build the text encoder from its source; None where none is needed.

        Raises:
            CheckpointError: If it cannot be built from its name, or a file may not choose it.
        """
        source, text_dim = self.text["source"], self.text["text_dim"]
        if source is None and not self.needs_text:
            return None
        if source is not None and source.startswith("features:"):
            return text_dim
        if source is None or source.startswith("callable:"):
            raise CheckpointError(
                f"The text encoder of this folder ({source}) cannot be built from its name.",
                expected=f"a text encoder of width {text_dim}, or that width if you bring features",
                fix=f"covft.load(folder, text_encoder={text_dim})",
            )
        source = text_source(source)
        revision = None if "revision=" in source else self.text["revision"]
        with unpartitioned():
            encoder = as_text_encoder(source, revision=revision)
        if encoder.text_dim != text_dim:
            raise CheckpointError(
                "The text encoder that the folder names has features of another width.",
                expected=f"width {text_dim}",
                got=f"width {encoder.text_dim} of {source!r}",
            )
        return encoder

    def check_base(self, vit: nn.Module) -> None:
        """Refuse a ViT with other weights than those that the encoder was trained from.

        Raises:
            CheckpointError: If its fingerprint is another.
        """
        base = self.base
        apart = self.apart(by_saved_name(vit, vit.state_dict(keep_vars=True)))
        if apart is not None:
            raise CheckpointError(
                "The folder was made for other base weights than those of this ViT.",
                expected=f"{base['library']} {base['class_name']}, {base['source'] or 'of unknown source'}",
                got=f"{type(vit).__name__}: {apart}",
                fix="load the base ViT that the encoder was trained from",
            )

    def apart(self, base: Mapping[str, Tensor]) -> str | None:
        """Describe how base weights differ from those that were trained from; None if they are the same.

        Args:
            base: Tensors of a ViT by their names in saved folders.
        """
        found = fingerprint((name, tensor) for name, tensor in base.items() if name not in self.others)
        return difference(self.base["fingerprint"], found)

    def warn_other_text(self, found: str | None) -> None:
        """Warn that the router gets features it was not trained on, where names can tell."""
        saved, found = self.text["source"], public_source(found)
        if saved is None or found is None or any(n.startswith(("features:", "callable:")) for n in (saved, found)):
            return
        one, other = (Path(name.removeprefix(f"{LOCAL}:")).name for name in (saved, found))
        if one != other:  # a folder may have been moved
            warnings.warn(
                f"The encoder was trained with the text encoder {saved!r} and is loaded with {found!r}; "
                "its router does not know those features.",
                UserWarning,
                stacklevel=5,
            )


@dataclass(frozen=True)
class SavedEncoder(Saved):
    """The contents of a saved encoder's folder.

    Attributes:
        config: The settings.
        extra: Names of parameters of the base ViT that the caller had trained too.
    """

    config: CoVFTConfig
    extra: frozenset[str]

    @property
    def needs_text(self) -> bool:
        """Whether its routing needs text."""
        return self.config.needs_text

    @property
    def others(self) -> Collection[str]:
        """What the caller had trained too."""
        return self.extra

    @classmethod
    def read(cls, folder_or_repo_id: str | Path) -> SavedEncoder:
        """Read a folder, or a repository of the Hugging Face Hub.

        Raises:
            CheckpointError: If it is incomplete or damaged, or cannot be reached; or if its configuration has a value
                that no version writes, or does not fit its weights.
        """
        folder, tensors, saved = read_saved(folder_or_repo_id)
        config, extra = CoVFTConfig.from_dict(saved["covft"]), frozenset(saved["extra"])
        blocks = len(config.layers or ())
        if not extra <= set(tensors) or (config.expert_rank is None and config.experts * blocks > len(tensors)):
            raise CheckpointError(
                f"The settings of {folder} are not those of its weights.",
                expected=f"experts={config.experts} in {blocks} blocks, and {len(extra)} other tensors",
                got=f"{len(tensors)} tensors, without {_first(extra - set(tensors)) or 'as many experts'}",
                fix="copy the complete folder again",
            )
        if config.instructions == "clean":
            _check_cleaning(folder, saved.get("cleaning", 1))
        return cls(folder, tensors, saved["base"], saved["text"], config, extra)

    def check_tensors(self, vit: nn.Module, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Refuse weights that are not those of a wrapped ViT.

        Args:
            vit: The ViT.
            wanted: What was added or trained there, by name, with or without values.
            state: All tensors of the ViT, by name; those of its FFNs do not matter.

        Raises:
            CheckpointError: If tensors are missing, unexpected, or of another shape or kind of number.
        """
        wanted, state = by_saved_name(vit, wanted), by_saved_name(vit, state)
        twice = sorted(self.extra & set(wanted))
        if twice:
            raise CheckpointError(
                f"{CONFIG_NAME} lists tensors as trained outside the adapted blocks that are inside.",
                expected="other parameters of the ViT",
                got=", ".join(twice[:5]),
            )
        wanted = {**wanted, **{name: state[name] for name in self.extra if name in state}}
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        compare_tensors({name: shape_of(tensor) for name, tensor in wanted.items()}, found, "the folder")
        other = [
            f"{name} {_dtype(tensor)} instead of {_dtype(wanted[name])}"
            for name, tensor in sorted(self.tensors.items())
            if tensor.is_floating_point() != wanted[name].is_floating_point()
            or (not tensor.is_floating_point() and tensor.dtype != wanted[name].dtype)
        ]
        if other:
            raise CheckpointError("The folder has tensors of another kind than this encoder.", got="; ".join(other[:5]))

    def fill(self, wrapped: WrappedViT) -> None:
        """Put the weights into a wrapped ViT.

        Args:
            wrapped: Wrapped with these settings, around these base weights; `check_tensors` has passed.

        Raises:
            CheckpointError: If the ViT is in a DeepSpeed engine.
        """
        if in_engine(wrapped.vit):
            raise CheckpointError(
                "The encoder is inside a DeepSpeed engine, whose optimizer would overwrite the loaded values.",
                expected="an encoder without an engine so far",
                got=type(wrapped.vit).__name__,
                fix="load first, then deepspeed.initialize(...); or engine.load_checkpoint(folder) of a training",
            )
        state, named = wrapped.vit.state_dict(keep_vars=True), saved_names(wrapped.vit)
        own = {named(name): name for name in state}
        for name in sorted(own[name] for name in self.extra):
            wrapped.original.values.setdefault(name, full(state[name]).clone())
            if isinstance(state[name], nn.Parameter):
                state[name].requires_grad_(True)
        for name, tensor in self.tensors.items():
            assign(state[own[name]], tensor)
        self.warn_other_text(wrapped.text_name)


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
    base = by_saved_name(wrapped.vit, base_state_dict(wrapped))
    if (apart := saved.apart(base)) is not None:
        raise CheckpointError(f"{folder} was made for other base weights than those of this encoder.", got=apart)
    named = saved_names(wrapped.vit)
    others = saved.extra & (set(base) - set(map(named, wrapped.norms)))  # may be trained here, too
    wanted = {name: tensor for name, tensor in adapted_tensors(wrapped).items() if named(name) not in others}
    saved.check_tensors(wrapped.vit, wanted, wrapped.vit.state_dict(keep_vars=True))
    saved.fill(wrapped)


def read_settings(folder_or_repo_id: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read the configuration of a saved folder, or of a repository of the Hugging Face Hub, with every field checked.

    Returns:
        The folder, and its configuration; the weights are not read.

    Raises:
        CheckpointError: As `read_saved` does, but for the weights.
    """
    patterns = (CONFIG_NAME, WEIGHTS_NAME, "README.md")
    expected = "a folder that save_pretrained wrote, or a repository that can be reached"
    folder = local_folder(folder_or_repo_id, patterns, expected)
    config = read_config(folder)
    check_fields(config, folder / CONFIG_NAME)
    return folder, config


def _check_cleaning(folder: Path, version: int) -> None:
    """Warn if the instructions were cleaned by other rules in training than they are here."""
    if version != RULES_VERSION:
        warnings.warn(
            f"The encoder in {folder} was trained on instructions cleaned by version {version} of the rules; here they "
            f"are those of version {RULES_VERSION}. Sentences that only one of them removes are read differently from "
            "in training.",
            UserWarning,
            stacklevel=4,
        )


def read_saved(folder_or_repo_id: str | Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Read a saved folder, or a repository of the Hugging Face Hub, with every field and type checked.

    Returns:
        The folder, the weights by name, and the configuration.

    Raises:
        CheckpointError: If it is incomplete or damaged, or cannot be reached; or if its configuration has a value that
            no version writes.
    """
    folder, _ = read_settings(folder_or_repo_id)
    tensors, saved = read_folder(folder)
    check_fields(saved, folder / CONFIG_NAME)  # again: another process may have saved meanwhile
    _check_values(tensors, saved["dtype"], saved.get("other_dtypes", {}), folder)
    return folder, tensors, saved


def by_saved_name(vit: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a ViT by the names that they have in saved folders."""
    named = saved_names(vit)
    return {named(name): tensor for name, tensor in tensors.items()}


def _check_values(tensors: Mapping[str, Tensor], dtype: str, others: Mapping[str, str], folder: Path) -> None:
    """Refuse weights of other types than those that were saved, and numbers that are not finite.

    Raises:
        CheckpointError: If there are any.
    """
    other = [name for name in sorted(tensors) if _dtype(tensors[name]) != others.get(name, dtype)]
    if other or not set(others) <= set(tensors):
        name = other[0] if other else _first(set(others) - set(tensors))
        raise CheckpointError(
            f"{folder} has weights of other types than those that were saved, in {len(other)} tensors.",
            expected=f"{name}: {others.get(name, dtype)}",
            got=f"{name}: {_dtype(tensors[name]) if name in tensors else 'no such tensor'}",
            fix="copy the complete folder again",
        )
    check_finite(tensors, str(folder))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first(names: Iterable[str]) -> str:
    return min(names, default="")


def local_folder(folder_or_repo_id: str | os.PathLike[str], patterns: Iterable[str], expected: str) -> Path:
    """Return a folder, or fetch a repository of the Hugging Face Hub.

    Args:
        folder_or_repo_id: A folder, existing or not, or an id such as `name/repository`.
        patterns: Files to fetch.
        expected: What was expected, for the message.

    Raises:
        CheckpointError: If the repository cannot be fetched.
    """
    name, folder = os.fspath(folder_or_repo_id), Path(folder_or_repo_id)
    if folder.exists() or "/" not in name or not is_hub_id(name):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{name} is not a folder here, and cannot be fetched from the Hugging Face Hub.",
            expected=expected,
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix=f"hf download {name}, where there is a network",
        ) from error

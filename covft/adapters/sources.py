"""Loads a ViT by name (`timm:NAME`, `open_clip:NAME/TAG`, `hf:ID`), and tells the name of a loaded ViT."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from covft.adapters.huggingface import load_tower, tower_source
from covft.errors import CoVFTError, UnknownViTError, UnsupportedViTError
from covft.utils.arguments import check_kinds
from covft.utils.extras import import_library
from covft.utils.sources import split_values, with_options

# Set on loaded models that do not say themselves where they came from.
_SOURCE_ATTRIBUTE = "_covft_source"


@check_kinds
def load_vit(source: str, pretrained: bool = True, *, device: torch.device | str = "cpu", **options: Any) -> nn.Module:
    """Load a ViT by name.

    Args:
        source: `"timm:NAME"`, `"open_clip:NAME/TAG"` (its image tower) or `"hf:ID_OR_FOLDER"` (of a pair such as CLIP
            or SigLIP, its vision model; InternViT also in OpenGVLab's own layout). Options may follow:
            `"timm:vit_base_patch16_224?num_classes=0"`.
        pretrained: Load the weights; otherwise they are random and only the config is needed.
        device: Where to put it. `"meta"` allocates nothing, and needs `pretrained=False`.
        **options: For `timm.create_model`, `open_clip.create_model` or `from_pretrained` (such as `dtype`, by default
            that of the saved weights, `attn_implementation`, `revision`); they override those in `source`.
            `class_name` chooses a class of transformers.

    Raises:
        UnknownViTError: If there is no such kind of source, name or model (the closest names are listed), or it cannot
            be fetched.
        UnsupportedViTError: If a weight of the vision model is missing.
        CheckpointError: If the weights of a published InternViT are not those of its config.
        MissingDependencyError: If the library is not installed.

    Example:
        >>> load_vit("timm:test_vit", pretrained=False, num_classes=0).num_classes
        0
    """
    kind, _, rest = source.partition(":")
    if kind not in _LOADERS or not rest:
        raise UnknownViTError(
            f"{source!r} does not say where the ViT comes from.",
            expected="timm:NAME, open_clip:NAME/TAG or hf:ID_OR_FOLDER",
            got=repr(source),
            known=", ".join(difflib.get_close_matches(kind, _LOADERS)) or None,
        )
    if pretrained and torch.device(device).type == "meta":
        raise UnsupportedViTError(
            "Weights cannot be loaded onto the meta device.",
            expected="a real device, or pretrained=False",
            got=f"pretrained=True, device={str(device)!r}",
            fix=f"load_vit({source!r}, pretrained=False, device='meta')",
        )
    name, written = split_values(rest)
    with _reported(kind, name):
        return _LOADERS[kind](name, pretrained, torch.device(device), {**written, **options})


@check_kinds
def source_of(vit: nn.Module) -> str | None:
    """Return the source from which `load_vit` loads a model again.

    Args:
        vit: A model, wrapped or not.

    Returns:
        Such as `"hf:openai/clip-vit-large-patch14-336"`; None where the model does not tell: it was built from a
        config, or is a tower of open_clip that `load_vit` did not load.
    """
    known = getattr(vit, _SOURCE_ATTRIBUTE, None)
    if isinstance(known, str):
        return known
    libraries = {cls.__module__.partition(".")[0] for cls in type(vit).__mro__}
    if "transformers" in libraries:
        found = tower_source(vit)
        return None if found is None else f"hf:{with_options(*found)}"
    return _timm_source(vit) if "timm" in libraries else None


# ------------------------------------------------------------------------------------------ timm


def _load_timm(name: str, pretrained: bool, device: torch.device, options: dict[str, Any]) -> nn.Module:
    timm = import_library("timm", "timm", needed_by="This ViT")
    architecture = name.partition(".")[0]
    # A name with a hub prefix ("hf-hub:...") is the hub's to know.
    if ":" not in name and not timm.is_model(architecture):
        raise _unknown_name("timm", architecture, timm.list_models())
    with device:
        return timm.create_model(name, pretrained=pretrained, **options)


def _timm_source(vit: Any) -> str | None:
    config = getattr(vit, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    timm = importlib.import_module("timm")
    if not name or not timm.is_model(name):
        return None
    name = f"{name}.{config['tag']}" if config.get("tag") else name
    with torch.device("meta"):
        plain = timm.create_model(name, pretrained=False)
    changed = _differences(_timm_options(vit), _timm_options(plain))
    return f"timm:{with_options(name, changed)}"


def _timm_options(vit: Any) -> dict[str, Any]:
    """Return the options of `create_model` that change weights or outputs and that a model remembers."""
    found = {name: getattr(vit, name, None) for name in ("num_classes", "global_pool", "dynamic_img_size")}
    return {**found, "img_size": getattr(getattr(vit, "patch_embed", None), "img_size", None)}


def _differences(ours: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in ours.items() if value is not None and value != plain[name]}


# ------------------------------------------------------------------------------------- open_clip


def _load_open_clip(name: str, pretrained: bool, device: torch.device, options: dict[str, Any]) -> nn.Module:
    library = import_library("open_clip", "open-clip", needed_by="This ViT")
    remote = name.startswith(("hf-hub:", "local-dir:"))
    architecture, tag = (name, "") if remote else name.partition("/")[::2]
    if not remote and architecture not in library.list_models():
        raise _unknown_name("open_clip", architecture, library.list_models())
    if pretrained and not remote:
        tags = library.list_pretrained_tags_by_model(architecture)
        if tag not in tags and not Path(tag).is_file():
            raise UnknownViTError(
                f"open_clip:{name} does not say which weights to load.",
                expected="open_clip:NAME/TAG",
                got=f"tag {tag!r}",
                known=", ".join(tags) or "no weights for this model",
                fix=f"open_clip:{architecture}/{tags[0]}" if tags else "pretrained=False",
            )
    with device, contextlib.nullcontext() if pretrained else _quiet_root_logger():
        model = library.create_model(
            architecture, pretrained=(tag or None) if pretrained else None,
            load_weights=pretrained, device=device, **options,
        )  # fmt: skip
    if pretrained:
        setattr(model.visual, _SOURCE_ATTRIBUTE, f"open_clip:{with_options(name, options)}")
    return model.visual


# ---------------------------------------------------------------------------------------- shared

_LOADERS: dict[str, Callable[[str, bool, torch.device, dict[str, Any]], nn.Module]] = {
    "hf": load_tower,
    "open_clip": _load_open_clip,
    "timm": _load_timm,
}


def _unknown_name(library: str, name: str, names: list[str]) -> UnknownViTError:
    lower = {known.lower(): known for known in names}
    close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
    return UnknownViTError(
        f"{library} has no model named {name!r}.",
        expected=f"one of its {len(names)} models",
        got=name,
        known=", ".join(close) or None,
        fix=f"{library}:{close[0]}" if close else None,
    )


@contextlib.contextmanager
def _reported(kind: str, name: str) -> Iterator[None]:
    """Turn what the libraries raise for models that cannot be loaded into one error that says what to do."""
    try:
        yield
    except CoVFTError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, pickle.UnpicklingError) as error:
        first_line = str(error).strip().partition("\n")[0][:300]
        fix = "fetch it where there is a network, or pass pretrained=False for random weights"
        if kind == "hf":
            fix = f"`hf download {name}` where there is a network (then HF_HUB_OFFLINE=1), or a local folder"
        raise UnknownViTError(
            f"The vision tower '{kind}:{name}' cannot be loaded: it cannot be fetched, or its options do not fit.",
            expected="a model that can be fetched or was fetched before",
            got=f"{type(error).__name__}: {first_line}",
            fix=fix,
        ) from error


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Drop open_clip's warning that weights are random, or some of them in 3.0, which it sends to the root logger."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def not_about_weights(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "No pretrained weights loaded" not in text and "initialized partially" not in text

    root.addFilter(not_about_weights)
    root.addHandler(handler)  # else the first message would set logging up for the whole process
    try:
        yield
    finally:
        root.removeFilter(not_about_weights)
        root.removeHandler(handler)

"""Fetches a ViT by name (`timm:NAME`, `open_clip:NAME/TAG`, `hf:ID`), and tells the name of a ViT."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import torch
from torch import nn

from covft.errors import UnknownViTError, UnsupportedViTError
from covft.utils.extras import import_library

# Left on models that load_vit built and that do not say themselves where they came from.
_SOURCE_ATTRIBUTE = "_covft_source"


def load_vit(source: str, pretrained: bool = True, *, device: torch.device | str = "cpu", **options: Any) -> nn.Module:
    """Build a ViT by name.

    Args:
        source: `"timm:NAME"`, `"open_clip:NAME/TAG"` (of which the image tower is taken) or
            `"hf:ID_OR_FOLDER"` (of a CLIP or SigLIP pair the vision model is taken). Options may follow as in
            `"timm:vit_base_patch16_224?num_classes=0"`.
        pretrained: Load the weights; otherwise they are random and only the config is needed.
        device: Where to put it. `"meta"` allocates nothing, and goes with `pretrained=False`.
        **options: For `timm.create_model`, `open_clip.create_model` or `from_pretrained` (`from_config`
            without weights); they override those in `source`. `class_name` chooses a class of transformers.

    Raises:
        UnknownViTError: If there is no such kind of source, name or model; the closest names are listed.
        UnsupportedViTError: If the weights found are not those of the vision model alone.
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
            "Nothing can be loaded onto the meta device.",
            expected="a real device, or pretrained=False",
            got=f"pretrained=True, device={str(device)!r}",
            fix=f"load_vit({source!r}, pretrained=False, device='meta')",
        )
    name, written = _split_options(rest)
    return _LOADERS[kind](name, pretrained, torch.device(device), {**written, **options})


def source_of(vit: nn.Module) -> str | None:
    """The source by which `load_vit` builds a model again, where the model tells.

    Args:
        vit: A model, wrapped or not.

    Returns:
        Such as `"hf:openai/clip-vit-large-patch14-336"`, or None (for a model that was built from a config,
        or a tower of open_clip that `load_vit` did not build).
    """
    known = getattr(vit, _SOURCE_ATTRIBUTE, None)
    if isinstance(known, str):
        return known
    libraries = {cls.__module__.partition(".")[0] for cls in type(vit).__mro__}
    if "transformers" in libraries:
        return _hf_source(vit)
    return _timm_source(vit) if "timm" in libraries else None


# ------------------------------------------------------------------------------------------ timm


def _load_timm(name: str, pretrained: bool, device: torch.device, options: dict[str, Any]) -> nn.Module:
    timm = import_library("timm", "timm", needed_by="This ViT")
    architecture = name.partition(".")[0]
    # A name with a hub prefix ("hf-hub:...") is the hub's to know.
    if ":" not in name and not timm.is_model(architecture):
        raise _unknown_name("timm", architecture, timm.list_models())
    with _reported("timm", name), device:
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
    return f"timm:{_with_options(name, _differences(_timm_options(vit), _timm_options(plain)))}"


def _timm_options(vit: Any) -> dict[str, Any]:
    """The options of `create_model` that change weights or outputs and that a model remembers."""
    found = {name: getattr(vit, name, None) for name in ("num_classes", "global_pool", "dynamic_img_size")}
    return {**found, "img_size": getattr(getattr(vit, "patch_embed", None), "img_size", None)}


def _differences(ours: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in ours.items() if value is not None and value != plain[name]}


# ------------------------------------------------------------------------------------- open_clip


def _load_open_clip(name: str, pretrained: bool, device: torch.device, options: dict[str, Any]) -> nn.Module:
    library = import_library("open_clip", "open_clip", needed_by="This ViT")
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
    with (
        _reported("open_clip", name),
        device,
        contextlib.nullcontext() if pretrained else _quiet_root_logger(),
    ):
        model = library.create_model(
            architecture, pretrained=(tag or None) if pretrained else None,
            load_weights=pretrained, device=device, **options,
        )  # fmt: skip
    if pretrained:
        setattr(model.visual, _SOURCE_ATTRIBUTE, f"open_clip:{_with_options(name, options)}")
    return model.visual


# ---------------------------------------------------------------------------------- transformers


def _load_hf(name: str, pretrained: bool, device: torch.device, options: dict[str, Any]) -> nn.Module:
    transformers = import_library("transformers", "transformers", needed_by="This ViT")
    class_name = options.pop("class_name", None)
    hub = {key: options.pop(key) for key in ("revision", "cache_dir", "token", "subfolder") if key in options}
    with _reported("transformers", name):
        config = transformers.AutoConfig.from_pretrained(name, **hub)
    config = getattr(config, "vision_config", None) or config
    model_class = getattr(transformers, class_name, None) if class_name else _default_class(config)
    if model_class is None:
        raise UnknownViTError(
            f"hf:{name} has no vision model that transformers can build alone.",
            expected="a config of a vision model, or one with a vision_config",
            got=class_name or type(config).__name__,
            fix="load the whole model and pass its tower: covft.wrap(model.model.vision_tower, ...)",
        )
    if not pretrained:
        config.name_or_path = ""  # random weights are not those of this name
        with _reported("transformers", name), device:
            return model_class._from_config(config, **options)
    with _reported("transformers", name):
        model, info = model_class.from_pretrained(name, output_loading_info=True, **hub, **options)
    missing, total = len(info["missing_keys"]), len(model.state_dict())
    if missing > total // 2:
        raise UnsupportedViTError(
            f"The weights of hf:{name} are not laid out as those of {model_class.__name__} alone.",
            expected=f"{total} tensors of {model_class.__name__}",
            got=f"{total - missing} of them",
            fix="load the whole model and pass its tower: covft.wrap(model.model.vision_tower, ...)",
        )
    return model.to(device)


def _default_class(config: Any) -> Any:
    """The class of transformers that a vision config is for, or None."""
    mapping = importlib.import_module("transformers").MODEL_MAPPING
    return mapping[type(config)] if type(config) in mapping else None


def _hf_source(vit: Any) -> str | None:
    config = getattr(vit, "config", None)
    name = getattr(config, "name_or_path", None)
    if not name:
        return None
    default = _default_class(config)
    chosen = None if default is not None and isinstance(vit, default) else type(vit).__name__
    return f"hf:{_with_options(name, {} if chosen is None else {'class_name': chosen})}"


# ---------------------------------------------------------------------------------------- shared

_LOADERS: dict[str, Callable[[str, bool, torch.device, dict[str, Any]], nn.Module]] = {
    "hf": _load_hf,
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
def _reported(library: str, name: str) -> Iterator[None]:
    """Turn what the libraries raise for models that cannot be had into one error that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0][:300]
        fix = "fetch it where there is a network, or pass pretrained=False for random weights"
        if library == "transformers":
            fix = f"`hf download {name}` where there is a network (then HF_HUB_OFFLINE=1), or a local folder"
        raise UnknownViTError(
            f"{library} cannot build {name!r}: it cannot be fetched, or its options do not fit.",
            expected="a model that can be fetched or was fetched before",
            got=f"{type(error).__name__}: {first_line}",
            fix=fix,
        ) from error


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """open_clip warns through the root logger that weights are random, which is what was asked for."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def not_about_weights(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    root.addFilter(not_about_weights)
    root.addHandler(handler)  # else the first message would set logging up for the whole process
    try:
        yield
    finally:
        root.removeFilter(not_about_weights)
        root.removeHandler(handler)


def _with_options(name: str, options: dict[str, Any]) -> str:
    return f"{name}?{urlencode({key: str(value) for key, value in sorted(options.items())})}" if options else name


def _split_options(rest: str) -> tuple[str, dict[str, Any]]:
    name, mark, query = rest.partition("?")
    if not mark or Path(rest).exists():
        return rest, {}
    return name, {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

"""The models that a saved folder names: what is written, and what may be loaded because a file says so.

A file is data. It may name a model that a library knows, or a repository of the Hugging Face Hub, with the options that
covft itself writes. It chooses no address, no path and no code. What a caller passes is not restricted here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from covft.errors import CheckpointError
from covft.text.hf import POOLINGS
from covft.utils.arguments import MOST
from covft.utils.extras import import_library
from covft.utils.sources import exists, is_folder_name, split_options, with_options

LOCAL = "local"  # `local:NAME` is a folder or file of the machine that saved, without its path
REVISION = r"[A-Za-z0-9][\w./-]{0,127}"


def public_source(source: str | None) -> str | None:
    """Return the name of a ViT or text encoder as a file may publish it.

    A folder is named by its last part alone, `local:NAME`, and options that `load` would not take are left out.

    Args:
        source: As `covft.adapters.sources.source_of` returns it, or the name of a text encoder.

    Example:
        >>> public_source("hf:/data/models/clip-l?class_name=CLIPVisionModel")
        'local:clip-l?class_name=CLIPVisionModel'
    """
    if source is None:
        return None
    kind, name, options = _parts(source.encode("utf-8", "replace").decode()[:4096])
    if kind in ("", "hf") and is_folder_name(name):
        return with_options(f"{LOCAL}:{_last_part(name)}", options)
    architecture, _, tag = name.partition("/")
    if kind == "open_clip" and tag and (is_folder_name(tag) or exists(tag)):
        return f"{LOCAL}:{architecture}/{_last_part(tag)}"
    if kind == "open_clip":
        options = {key: text for key, text in options.items() if key in _OPTIONS[kind]}
    return with_options(f"{kind}:{name}" if kind else name, options)


def public_revision(revision: object) -> str | None:
    """Return a revision as `load` takes it; None for what is not a branch, tag or commit."""
    return revision if isinstance(revision, str) and re.fullmatch(REVISION, revision) else None


def vit_source(source: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """Check the source of a base ViT that a file names.

    Args:
        source: The source.
        revision: Branch, tag or commit of a repository.

    Returns:
        The source without options, and the options, for `covft.adapters.sources.load_vit`.

    Raises:
        CheckpointError: If a file may not name it.
    """
    kind, name, options = _parts(source)
    if kind not in _NAMES:
        _refuse("base ViT", source, "timm:NAME, open_clip:NAME/TAG or hf:ID", kind or "no kind", "vit=")
    problem = _NAMES[kind](name)
    if problem:
        _refuse("base ViT", source, *problem, "vit=")
    found = _checked_options("base ViT", source, options, _OPTIONS[kind], "vit=")
    if kind == "hf" and revision is not None:
        found["revision"] = revision
    return f"{kind}:{name}", found


def text_source(source: str) -> str:
    """Check the source of a text encoder that a file names.

    Args:
        source: The source.

    Returns:
        The source, for `covft.text.as_text_encoder`.

    Raises:
        CheckpointError: If a file may not name it.
    """
    kind, name, options = _parts(source)
    problem = None
    if kind in ("features", "hash"):
        if not re.fullmatch(r"[1-9]\d{0,6}", name):
            problem = ("a width", repr(name))
    elif kind == "open_clip":
        problem = _open_clip_name(name, needs_tag=False)
    else:
        problem = ("an id, features:WIDTH, hash:WIDTH or open_clip:NAME/TAG", kind) if kind else _hub_id(name)
    if problem:
        _refuse("text encoder", source, *problem, "text_encoder=")
    _checked_options("text encoder", source, options, {} if kind else _TEXT_OPTIONS, "text_encoder=")
    return source


def text_options(source: object) -> dict[str, Any]:
    """Return how a text encoder that a file names reads texts: pooling, length, normalisation.

    Args:
        source: What the file says.

    Raises:
        CheckpointError: If an option is not one that a file may choose.
    """
    if not isinstance(source, str):
        return {}
    kind, _, options = _parts(source)
    if kind not in ("", LOCAL):
        return {}
    known = {name: parse for name, parse in _TEXT_OPTIONS.items() if name != "revision"}
    options = {name: text for name, text in options.items() if name != "revision"}
    return _checked_options("text encoder", source, options, known, "text_encoder=")


def is_hub_id(name: str) -> bool:
    """Return whether a name is a repository by the rule of the Hugging Face Hub, and not a folder here."""
    return _hub_id(name) is None


# ---------------------------------------------------------------------------------- names

_Problem = tuple[str, str]


def _hub_id(name: str) -> _Problem | None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problem = "an id of the Hugging Face Hub", repr(name[:200])
    if not re.fullmatch(r"[A-Za-z0-9_./-]+", name):  # releases 1.x of huggingface_hub take other letters and a newline
        return problem
    try:
        validate_repo_id(name)
    except HFValidationError:
        return problem
    if is_folder_name(name):
        return "an id of the Hugging Face Hub, and no folder of the same name here", f"the folder {name!r}"
    return None


def _timm_name(name: str) -> _Problem | None:
    timm = import_library("timm", "timm", needed_by="This ViT")
    architecture = name.partition(".")[0]
    known = re.fullmatch(r"[\w.]+", name) and timm.is_model(architecture)
    return None if known else ("a model that timm has", repr(name[:200]))


def _open_clip_name(name: str, *, needs_tag: bool = True) -> _Problem | None:
    library = import_library("open_clip", "open-clip", needed_by="This model")
    architecture, _, tag = name.partition("/")
    if architecture not in library.list_models():
        return "a model that open_clip has", repr(name[:200])
    tags = library.list_pretrained_tags_by_model(architecture)
    if tag not in tags and (tag or needs_tag):
        return f"weights that open_clip has: {', '.join(tags)}", repr(tag[:200])
    return None


_NAMES: dict[str, Callable[[str], _Problem | None]] = {"hf": _hub_id, "open_clip": _open_clip_name, "timm": _timm_name}


# -------------------------------------------------------------------------------- options


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,7}", text) or int(text) > MOST:
        raise ValueError(f"a whole number up to {MOST}")
    return int(text)


def _size(text: str) -> Any:
    found = re.fullmatch(r"[(\[]?(\d{1,5})(?:, ?(\d{1,5}))?[)\]]?", text)
    if not found:
        raise ValueError("one or two numbers of pixels")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


def _word(pattern: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(pattern)
        return text

    return parse


def _flag(text: str) -> bool:
    return _word("True|False")(text) == "True"


# Those that `source_of`, and the names of text encoders, can have.
_OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "hf": {"class_name": _word(r"[A-Za-z]\w{0,99}")},  # `load_vit` takes model classes of transformers alone
    "open_clip": {"force_image_size": _size, "force_quick_gelu": _flag, "precision": _word("fp32|fp16|bf16")},
    "timm": {
        "dynamic_img_size": _flag,
        "global_pool": _word("[a-z]{0,16}"),
        "img_size": _size,
        "num_classes": _whole,
    },
}
_TEXT_OPTIONS: dict[str, Callable[[str], Any]] = {
    "max_length": _whole,
    "normalize": _flag,
    "pooling": _word("|".join(POOLINGS)),
    "revision": _word(REVISION),
}


def _checked_options(
    what: str, source: str, options: Mapping[str, str], known: Mapping[str, Callable[[str], Any]], fix: str
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in options.items():
        if name not in known:
            _refuse(what, source, f"the options {', '.join(sorted(known)) or '(none)'}", repr(name[:100]), fix)
        try:
            found[name] = known[name](text)
        except ValueError as error:
            _refuse(what, source, f"{name}: {error}", repr(text[:100]), fix)
    return found


# --------------------------------------------------------------------------------- shared


def _parts(source: str) -> tuple[str, str, dict[str, str]]:
    """Split a source into its kind (empty for an id or folder), its name and its options."""
    kind, colon, rest = source.partition(":")
    if not colon or not kind.isidentifier() or len(kind) == 1:  # one letter is a drive of Windows
        kind, rest = "", source
    name, options = split_options(rest)
    return kind, name, options


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].strip(".~") or "folder"


def _refuse(what: str, source: str, expected: str, got: str, fix: str) -> None:
    problem = f"The {what} that the folder names is not one that a file may choose: {source[:200]!r}."
    if source.startswith(f"{LOCAL}:"):
        problem = f"The {what} was in a folder of the machine that saved: {source.removeprefix('local:')[:200]!r}."
        expected, got = f"the {what} as an argument", "its name alone"
    fix = f"if you trust it: covft.load(folder, {fix}...)"
    if what == "text encoder":
        fix += ", or --covft_text_encoder of a launcher"
    raise CheckpointError(problem, expected=expected, got=got, fix=fix)

"""Fetches the libraries and the pretrained models that text encoders are made of, with errors that help."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from covft.errors import TextEncoderError
from covft.utils.extras import import_library
from covft.utils.sharding import unpartitioned


def load_pretrained(auto_class: str, source: str, **kwargs: Any) -> Any:
    """`transformers.<auto_class>.from_pretrained`, with errors that say what to do.

    Args:
        auto_class: `"AutoModel"` or `"AutoTokenizer"`.
        source: A model id or a folder.
        **kwargs: For `from_pretrained`.

    Raises:
        TextEncoderError: If it cannot be loaded.
        MissingDependencyError: If transformers is not installed.
    """
    transformers = import_library("transformers", "transformers", needed_by="This text encoder")
    try:
        with unpartitioned():
            return getattr(transformers, auto_class).from_pretrained(source, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise not_loaded(source, error) from error


def not_loaded(source: str, error: Exception) -> TextEncoderError:
    """The error for a model id or folder that did not load."""
    first_line = str(error).strip().partition("\n")[0]
    if is_folder_name(source):
        problem = f"The text encoder in the folder {source} cannot be loaded."
        if not Path(source).expanduser().is_dir():
            problem = f"There is no folder {source} to load a text encoder from."
        return TextEncoderError(
            problem,
            expected="a folder with config.json, model.safetensors and the tokenizer's files",
            got=f"{type(error).__name__}: {first_line}",
            fix="model.save_pretrained(folder); tokenizer.save_pretrained(folder)",
        )
    return TextEncoderError(
        f"The text encoder {source!r} is not in the local cache and could not be fetched.",
        expected="a model id that can be fetched or was fetched before, a local folder, or a loaded model",
        got=f"{type(error).__name__}: {first_line}",
        fix=(
            f"`hf download {source}` where there is a network (then HF_HUB_OFFLINE=1 where there is none); "
            "or pass a local folder, or a loaded model"
        ),
    )


def is_folder_name(source: str) -> bool:
    """Whether a string names a folder rather than a model id (which has at most one slash)."""
    looks_like_path = source.startswith((".", "~", "/", os.sep)) or source.count("/") > 1 or "\\" in source
    return looks_like_path or Path(source).is_dir()


def find_json(source: str, filename: str, *, revision: str | None = None) -> Any:
    """A JSON file of a folder or a model id, or None where there is none (or no way to know)."""
    if is_folder_name(source):
        path = Path(source).expanduser() / filename
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        path = Path(hf_hub_download(source, filename, revision=revision))
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, HfHubHTTPError, HFValidationError):
        return None


def with_options(source: str, **options: Any) -> str:
    """A name that carries settings, such as `bert-base-uncased?pooling=cls`; None is left out."""
    given = {key: value for key, value in options.items() if value is not None}
    return f"{source}?{urlencode(given)}" if given else source


def split_options(name: str) -> tuple[str, dict[str, str]]:
    """The inverse of `with_options`; a folder whose own name has a question mark keeps it."""
    source, mark, query = name.partition("?")
    if not mark or Path(name).exists():
        return name, {}
    return source, dict(parse_qsl(query))

"""Loads the pretrained models of text encoders."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from covft.errors import TextEncoderError
from covft.utils.extras import import_library
from covft.utils.sharding import unpartitioned
from covft.utils.sources import is_folder_name

# What the libraries raise for models that cannot be loaded.
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, pickle.UnpicklingError)


def load_pretrained(auto_class: str, source: str, **kwargs: Any) -> Any:
    """Call `transformers.<auto_class>.from_pretrained` on a model id or a folder, whose own code never runs.

    Raises:
        TextEncoderError: If it cannot be loaded.
        MissingDependencyError: If transformers is not installed.
    """
    transformers = import_library("transformers", "transformers", needed_by="This text encoder")
    try:
        with unpartitioned():
            return getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=False, **kwargs)
    except LOADING_ERRORS as error:
        raise not_loaded(source, error) from error


def not_loaded(source: str, error: Exception) -> TextEncoderError:
    """Make the error for a model id or folder that did not load."""
    got = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if is_folder_name(source):
        problem = f"The text encoder in the folder {source} cannot be loaded."
        if not Path(source).expanduser().is_dir():
            problem = f"The text encoder cannot be loaded: the folder {source} does not exist."
        return TextEncoderError(
            problem,
            expected="a folder with config.json, model.safetensors and the tokenizer's files",
            got=got,
            fix="model.save_pretrained(folder); tokenizer.save_pretrained(folder)",
        )
    return TextEncoderError(
        f"The text encoder {source!r} is not in the local cache and could not be fetched.",
        expected="a model id that can be fetched or was fetched before, a local folder, or a loaded model",
        got=got,
        fix=f"`hf download {source}` while online, then HF_HUB_OFFLINE=1; or pass a local folder, or a loaded model",
    )


def count_tokens(tokenizer: Any, text: str) -> int | None:
    """Count the tokens of an uncut text; None where the tokenizer is not one of transformers."""
    return len(tokenizer(text, verbose=False)["input_ids"]) if hasattr(tokenizer, "model_max_length") else None


def find_json(source: str, filename: str, *, revision: str | None = None) -> Any:
    """Read a JSON file of a folder or a model id; None if it does not exist or cannot be fetched.

    Raises:
        TextEncoderError: If it is not JSON.
    """
    path = Path(source).expanduser() / filename
    if not is_folder_name(source):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            path = Path(hf_hub_download(source, filename, revision=revision))
        except (OSError, HfHubHTTPError, HFValidationError):
            return None
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TextEncoderError(f"{filename} of {source!r} cannot be read.", expected="JSON", got=str(error)) from error

"""Names of transformers that depend on its release, or are private, with checks that they are there.

Wrapping, text encoders, saving and loading run on transformers 4.49 or later (the codebases that pin 4.37 bring models
of their own); multimodal LLMs and training on 4.57 or later.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from covft.errors import UnsupportedVersionError
from covft.utils.extras import import_library

OLDEST = (4, 49)
OLDEST_TRAINED = (4, 57)
_NEWEST = "5.24"
# What it calls activation checkpointing, in models and in `TrainingArguments`: the newest name first.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
# Methods of its Trainer that covft overrides or recognises on the stack.
_OF_TRAINER = ("_save_checkpoint", "_get_train_sampler", "_issue_warnings_after_load", "_load_from_checkpoint")
_OF_DEEPSPEED = ("is_deepspeed_zero3_enabled", "set_hf_deepspeed_config", "unset_hf_deepspeed_config")


def release() -> tuple[int, int]:
    """Return major and minor number of the installed transformers."""
    major, minor = re.findall(r"\d+", _transformers().__version__)[:2]
    return int(major), int(minor)


def check_release(needed_by: str) -> None:
    """Refuse a transformers that is older than what multimodal LLMs and training need.

    Args:
        needed_by: Subject of the message.

    Raises:
        UnsupportedVersionError: If it is.
    """
    if release() < OLDEST_TRAINED:
        raise _unsupported(f"{needed_by} does not work with this transformers.", "", OLDEST_TRAINED)


def check_trainer() -> None:
    """Refuse a transformers whose Trainer lacks the methods that covft overrides: they would never be called.

    Raises:
        UnsupportedVersionError: If one is missing, or the release is older than 4.57.
    """
    check_release("Training")
    trainer = _transformers().Trainer
    if missing := [name for name in _OF_TRAINER if not hasattr(trainer, name)]:
        problem = "The Trainer of this transformers works in a way that covft does not know."
        raise _unsupported(problem, f"without Trainer.{', Trainer.'.join(missing)}", OLDEST_TRAINED)


def training_field() -> str:
    """Return the field of `TrainingArguments` that switches activation checkpointing on.

    Raises:
        UnsupportedVersionError: If there is none of a known name.
    """
    fields = _transformers().TrainingArguments.__dataclass_fields__
    found = next((name for name in CHECKPOINTING if name in fields), None)
    if found is None:
        problem = "TrainingArguments of this transformers do not know activation checkpointing."
        raise _unsupported(problem, f"without {' or '.join(CHECKPOINTING)}", OLDEST_TRAINED)
    return found


def named_class(name: str, needed_by: str) -> Any:
    """Return a class of transformers that came with a release between the oldest and the newest.

    Raises:
        UnsupportedVersionError: If the installed release does not have it.
    """
    found = getattr(_transformers(), name, None)
    if found is None:
        raise _unsupported(f"{needed_by} needs a newer transformers.", f"without {name}", OLDEST_TRAINED)
    return found


def counts_warmup_in_steps() -> bool:
    """Return whether `warmup_steps` of `TrainingArguments` cannot be a fraction of all steps, as before release 5."""
    return _transformers().TrainingArguments.__dataclass_fields__["warmup_steps"].type is int


def loading_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of `from_pretrained` as the installed release names them: `dtype` came with 4.56."""
    return {"torch_dtype" if name == "dtype" and release() < (4, 56) else name: options[name] for name in options}


def from_config(kind: Any, config: Any, options: dict[str, Any]) -> Any:
    """Build a model class with random weights; options are those of `from_pretrained`.

    Raises:
        UnsupportedVersionError: If classes of this release cannot be built so.
    """
    if not hasattr(kind, "_from_config"):
        raise _unsupported("Models of this transformers cannot be built from their config.", "without _from_config")
    return kind._from_config(config, **loading_options(options))


def commit_of(model: Any) -> str | None:
    """Return the commit on the Hub that a model was loaded from; None if it does not tell."""
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return commit if isinstance(commit, str) else None


def deepspeed_integration() -> Any:
    """Return transformers' DeepSpeed integration if it is imported, and its config asks for ZeRO-3; else None.

    Raises:
        UnsupportedVersionError: If it works in a way that covft does not know.
    """
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    if integration is None:
        return None
    if missing := [
        name for name in (*_OF_DEEPSPEED, "_hf_deepspeed_config_weak_ref") if not hasattr(integration, name)
    ]:
        problem = "covft does not know the DeepSpeed integration of this transformers."
        raise _unsupported(problem, f"without {', '.join(missing)}")
    return integration if integration.is_deepspeed_zero3_enabled() else None


def deepspeed_config(integration: Any) -> Any:
    """Return the DeepSpeed config of `deepspeed_integration()`."""
    return integration._hf_deepspeed_config_weak_ref()


# ------------------------------------------------------------------------ names in vision towers

_Rules = tuple[tuple[str, str], ...]
# What releases call parts of the same tower; a saved folder has the names of release 5.24. Older names come first.
_ONE_LEVEL_LESS: _Rules = ((r"^vision_model\.", ""),)
_ATTENTION: _Rules = (
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
# The FFN was in two halves, and its slot in the place of the first.
_LAYERS: _Rules = (
    *_ATTENTION,
    (r"^encoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"^layers\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.intermediate\.", r"layers.\1.mlp."),
    (r"^(layers\.\d+\.mlp\..*)\bintermediate\.dense\.", r"\1fc1."),
    (r"^(layers\.\d+\.mlp\..*)\boutput\.dense\.", r"\1fc2."),
)
_TOWERS: dict[str, _Rules] = {
    **dict.fromkeys(
        (
            "AltCLIPVisionModel",
            "ChineseCLIPVisionModel",
            "CLIPVisionModel",
            "MetaClip2VisionModel",
            "MLCDVisionModel",
            "Siglip2VisionModel",
            "SiglipVisionModel",
        ),
        _ONE_LEVEL_LESS,
    ),
    "XCLIPVisionModel": (*_ONE_LEVEL_LESS, (r"^pre_layrnorm\.", "pre_layernorm.")),
    **dict.fromkeys(("Dinov2Model", "Dinov2WithRegistersModel"), _ATTENTION),
    "DINOv3ViTModel": ((r"^layer\.", "model.layer."),),
    **dict.fromkeys(("BeitModel", "DeiTModel", "IJepaModel", "ViTMAEModel", "ViTModel"), _LAYERS),
}


def saved_names(vit: nn.Module) -> Callable[[str], str]:
    """Return the function that gives a tensor of a vision tower the name that it has in saved folders.

    It is the same in all releases of transformers, so that a folder that was saved with one loads with another.

    Args:
        vit: A tower, wrapped or not, of any library.
    """
    known = (cls.__name__ for cls in type(vit).__mro__ if cls.__module__.startswith("transformers."))
    rules = next((_TOWERS[name] for name in known if name in _TOWERS), ())

    def saved_name(name: str) -> str:
        for old, new in rules:
            name = re.sub(old, new, name)
        return name

    return saved_name


def _transformers() -> Any:
    return import_library("transformers", "transformers", needed_by="This")


def _unsupported(problem: str, found: str, oldest: tuple[int, int] = OLDEST) -> UnsupportedVersionError:
    wanted = ".".join(map(str, oldest))
    return UnsupportedVersionError(
        problem,
        expected=f"transformers {wanted} or later; {_NEWEST} is the newest that was run",
        got=f"transformers {_transformers().__version__}" + (f", {found}" if found else ""),
        fix=f'pip install "transformers>={wanted}"',
    )

"""Refuses to resume a run with other settings, before anything of its checkpoint is loaded.

The plain Trainer gives callbacks no chance to look at a checkpoint before it loads the optimizer, where torch speaks of
parameter groups. It loads the model first, though, so a hook of the model runs in `Trainer._load_from_checkpoint`, and
reads the checkpoint's folder, the only parameter of that method, from the stack.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from torch import nn

from covft.checkpoints.folder import read_config
from covft.checkpoints.pretrained import FOLDER
from covft.config import CoVFTConfig
from covft.errors import CheckpointError
from covft.integrations.mllm.attachment import attachment_of
from covft.integrations.training.checkpoints import check_checkpoint, check_trained
from covft.surgery.adapted import AdaptedViT
from covft.surgery.wrapped import settings_of
from covft.utils.strict_json import read_strictly

_ADAPTER_CONFIG = "adapter_config.json"
# Settings of peft that change which parameters there are, or what they do.
_PEFT = (
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
    "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "bias",
)  # fmt: skip
_PARAMETER = "resume_from_checkpoint"


def watch_resuming(model: nn.Module) -> None:
    """Check each checkpoint that a Trainer loads into this model from now on."""
    model.register_load_state_dict_pre_hook(_check_resumed)


def check_resumed(model: nn.Module, checkpoint: str | Path) -> None:
    """Refuse a checkpoint that a run of this model cannot resume from.

    Args:
        model: The attached model of the trainer.
        checkpoint: The checkpoint.

    Raises:
        CheckpointError: If it is incomplete, or of a run with other settings or other trained parameters.
    """
    attachment = attachment_of(model)
    assert attachment is not None, "checked by the callback"
    check_checkpoint(checkpoint)
    check_settings(attachment.encoder, checkpoint, model)
    check_trained(model, checkpoint)


def check_settings(encoder: AdaptedViT, checkpoint: str | Path, model: nn.Module | None = None) -> None:
    """Refuse a checkpoint of a run with other settings.

    Args:
        encoder: The tower.
        checkpoint: The checkpoint.
        model: The model that is trained, to compare the settings of its adapters of peft too.

    Raises:
        CheckpointError: If a setting is another; the message has its name, and both values.
    """
    folder = Path(checkpoint)
    saved = read_config(folder / FOLDER)
    old, new = _of_folder(saved), encoder.settings()
    changed = _changed(old, new) if old["method"] == new["method"] else ["method"]
    if model is not None:
        lora_then, lora_now = _peft_of_folder(folder), _peft_of_model(model)
        old, new = {**old, **lora_then}, {**new, **lora_now}
        changed += _changed(lora_then, lora_now)
    if changed:
        raise CheckpointError(
            f"{folder} is of a run with other settings, so training cannot resume from it.",
            expected=", ".join(f"{name}={old.get(name)!r}" for name in changed) + "  (of the checkpoint)",
            got=", ".join(f"{name}={new.get(name)!r}" for name in changed),
            fix="the settings of the checkpoint, or a new run: resume_from_checkpoint=None",
        )


def _check_resumed(model: nn.Module, *_: Any) -> None:
    checkpoint = _loaded_checkpoint()
    if checkpoint is not None and attachment_of(model) is not None:
        check_resumed(model, checkpoint)


def _loaded_checkpoint() -> str | None:
    """Return the checkpoint of the Trainer that loads it further up the stack; None if there is none."""
    code = _code_of_loading()
    frame = sys._getframe(1) if code is not None else None
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals[_PARAMETER]


def _code_of_loading() -> CodeType | None:
    trainer: Any = sys.modules.get("transformers.trainer")
    method = getattr(getattr(trainer, "Trainer", None), "_load_from_checkpoint", None)
    code = getattr(inspect.unwrap(method), "__code__", None) if method is not None else None
    # Of another transformers that has renamed it, on_train_begin still checks the tensors.
    return code if code is not None and _PARAMETER in code.co_varnames[: code.co_argcount] else None


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if bool(old) != bool(new):  # adapters of peft or none
        return ["peft_type"]
    return [name for name in old if old[name] != new.get(name)]


def _of_folder(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a saved folder, as `AdaptedViT.settings` gives those of a ViT."""
    text_dim = saved["text"].get("text_dim")
    if "method" not in saved:
        return settings_of(CoVFTConfig.from_dict(saved["covft"]), text_dim)
    return {"method": saved["method"]["name"], **saved["method"]["options"], "text_dim": text_dim}


def _peft_of_folder(folder: Path) -> dict[str, Any]:
    path = folder / _ADAPTER_CONFIG
    if not path.is_file():
        return {}
    try:
        return _peft(read_strictly(path))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged.", got=str(error)) from error


def _peft_of_model(model: nn.Module) -> dict[str, Any]:
    configs: Any = getattr(model, "peft_config", None)
    if not configs:
        return {}
    active: Any = getattr(model, "active_adapter", "default")
    name = active if isinstance(active, str) and active in configs else next(iter(configs))
    return _peft(configs[name].to_dict())


def _peft(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(config.get(name)) for name in _PEFT}


def _plain(value: Any) -> Any:
    """Return a setting of peft in a form that compares, from memory or from JSON; empty is None."""
    if isinstance(value, (set, frozenset, list, tuple)):
        value = sorted(map(str, value))
    return getattr(value, "value", value) or None

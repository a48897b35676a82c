"""ms-swift's `--tuner_type covft_lora`: trains the adapted tower, and LoRA on the language model.

LoRA is ms-swift's own, with its arguments. A checkpoint holds the adapter as peft writes it, and `covft/`: the adapted
tower, and in `trained.safetensors` all other trained tensors.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from covft.checkpoints.beside_adapters import write_beside_adapters
from covft.checkpoints.folder import FOLDER
from covft.checkpoints.trained import TRAINED_NAMES, load_trained, read_names
from covft.errors import CheckpointError, ConfigError
from covft.integrations.codebases.ms_swift.covft_tuner import (
    attach_new,
    attach_saved,
    flags_of_run,
    refuse_incomplete,
    unfreeze,
)
from covft.integrations.mllm.attachment import attachment_of
from covft.utils.peft import adapter_parameters

ADAPTER = "adapter_config.json"
# Arguments of ms-swift that would reach the tower, or are not peft's LoRA, and the value that each has to have.
_NEEDED = {"freeze_llm": False, "lora_bias": "none", "tuner_backend": "peft", "use_swift_lora": False}


def prepare_model(args: Any, model: Any) -> nn.Module:
    """Add LoRA to the language model and attach the model; the projector is trained if ms-swift's flags say so.

    Args:
        args: Arguments of ms-swift: those of its own LoRA, and `freeze_aligner`.
        model: A model that ms-swift has loaded.

    Returns:
        The PeftModel around the model.

    Raises:
        ConfigError: If a flag cannot work, or would reach the tower.
        UnsupportedViTError: If `covft.attach` cannot serve the model.
    """
    swift = importlib.import_module("swift.pipelines.train.tuner")
    flags = flags_of_run(model)
    _check_arguments(args)
    architecture: Any = model.model_meta.model_arch
    vision = [*architecture.vision_tower, *architecture.aligner]
    _check_saved_modules(swift.get_modules_to_save(args, model), model, vision)
    theirs = copy.copy(args)
    theirs.tuner_type, theirs.freeze_vit, theirs.freeze_aligner = "lora", True, True
    theirs.target_modules = _outside(vision, swift.get_target_modules(theirs, model))
    adapted = swift.prepare_adapter(theirs, model)
    attach_new(model, flags)
    unfreeze(model, [] if args.freeze_aligner else architecture.aligner)  # that of Qwen-VL is a part of the tower
    return adapted


def save_pretrained(
    model: nn.Module,
    save_directory: str,
    state_dict: dict[str, Tensor] | None = None,
    safe_serialization: bool = True,
    **kwargs: Any,
) -> None:
    """Write the adapter as peft does, and `covft/` beside it, as for every PeftModel of an attached model.

    Args:
        model: A model that `prepare_model` returned.
        save_directory: Created if it does not exist.
        state_dict: Tensors of the model that another library has gathered.
        safe_serialization: Whether peft writes safetensors.
        **kwargs: Arguments of peft's `save_pretrained`.

    Raises:
        CheckpointError: If weights are sharded (ZeRO-3).
    """
    attachment = attachment_of(model)
    assert attachment is not None, "attached by prepare_model or from_pretrained"
    kwargs.setdefault("selected_adapters", ["default"])
    theirs: Any = model
    theirs.save_pretrained(save_directory, state_dict=state_dict, safe_serialization=safe_serialization, **kwargs)
    if state_dict is not None:  # otherwise the tower notices that peft saves, and writes covft/
        write_beside_adapters(attachment.encoder, model, Path(save_directory), state_dict)


def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> nn.Module:
    """Load the adapter and attach a saved model, to continue training or to evaluate.

    Args:
        model: A model that ms-swift has loaded, not attached.
        model_id: A folder that `save_pretrained` wrote, or, to evaluate, one that `swift export --merge_lora` wrote.
        **kwargs: Arguments of `PeftModel.from_pretrained`, with `is_trainable`.

    Returns:
        The PeftModel around the model; of a merged folder, the model itself.

    Raises:
        CheckpointError: If `save_pretrained` did not write the folder, or for another model.
    """
    folder, trained = Path(model_id), bool(kwargs.get("is_trainable"))
    adapter = (folder / ADAPTER).is_file()
    others = folder / FOLDER / TRAINED_NAMES
    if not (folder / FOLDER).is_dir() or (trained and not adapter) or (adapter and not others.is_file()):
        raise CheckpointError(
            f"{folder} was not saved by the tuner covft_lora.",
            expected=f"{ADAPTER} and {FOLDER}/{TRAINED_NAMES}; of a merged model {FOLDER}/, to evaluate it",
        )
    if trained:
        refuse_incomplete(folder)
    adapted = model
    if adapter:
        tuner = importlib.import_module("swift.tuner_plugin").PeftTuner
        adapted = tuner.from_pretrained(model, model_id, **kwargs)
    attach_saved(model, folder)
    load_trained(adapted, folder / FOLDER)
    if adapter:
        parameters, adapters = dict(adapted.named_parameters()), adapter_parameters(adapted)
        for name in read_names(others)["names"]:
            if id(parameters[name]) not in adapters:  # those are peft's to train
                parameters[name].requires_grad_(trained)
    return adapted


def _check_arguments(args: Any) -> None:
    given = {name: getattr(args, name, needed) for name, needed in _NEEDED.items()}
    wrong = [name for name, value in given.items() if value != _NEEDED[name]]
    if getattr(args, "init_weights", None) == "lora-ga":  # its gradients are estimated on batches, without their text
        wrong, given = [*wrong, "init_weights"], {**given, "init_weights": "lora-ga"}
    if wrong:
        raise ConfigError(
            "covft_lora trains peft's LoRA on the language model, and keeps it off the tower.",
            expected=", ".join(f"--{name} {_NEEDED.get(name, 'true')}".lower() for name in wrong),
            got=", ".join(f"--{name} {given[name]}".lower() for name in wrong),
            fix="--tuner_type covft trains the tower with a frozen or a fully trained language model",
        )


def _check_saved_modules(names: Iterable[str], model: nn.Module, vision: Iterable[str]) -> None:
    """Refuse `modules_to_save` of which peft would put copies into the tower or the projector."""
    inside = [name for name, _ in model.named_modules() if re.match(_within(vision), name)]
    reached = [name for name in names if any(path == name or path.endswith(f".{name}") for path in inside)]
    if reached:
        raise ConfigError(
            "--modules_to_save names modules of the tower or the projector, which peft would copy.",
            expected="modules of the language model",
            got=", ".join(reached[:5]),
            fix="their paths in the language model; --freeze_aligner false trains the projector",
        )


def _outside(paths: Iterable[str], targets: str | list[str]) -> str:
    """Return a regular expression for what peft's `target_modules` match, without some modules and what is in them."""
    if not isinstance(targets, str):  # names of modules, or the ends of their paths
        targets = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})"
    return rf"(?!{_within(paths)})(?:{targets})"


def _within(paths: Iterable[str]) -> str:
    return rf"(?:{'|'.join(map(re.escape, paths))})(?:\.|$)"

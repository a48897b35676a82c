"""LLaMA-Factory: runs its training with a `CoVFTCallback`, for which its command line has no flag.

python -m covft.integrations.codebases.llama_factory --covft_layers 11-22 -- train.yaml
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from covft.errors import ConfigError, MissingDependencyError, ReentrantCheckpointError
from covft.integrations.codebases.launch import parse, run
from covft.integrations.training.callback import CoVFTCallback

_PROGRAM = "covft.integrations.codebases.llama_factory"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `llamafactory-cli train` with a context-aware tower.

    Args:
        arguments: covft's flags, `--`, and those of `llamafactory-cli train`: a YAML file and overrides. None takes
            those of the process.

    Raises:
        ConfigError: If a flag is given that has no effect here.
        MissingDependencyError: If LLaMA-Factory is not installed.
        ReentrantCheckpointError: If the YAML file or an override asks for reentrant checkpointing.
    """
    flags = parse(_PROGRAM, sys.argv[1:] if arguments is None else arguments)
    if flags.chat_template is not None:
        raise ConfigError(
            "--covft_chat_template has no effect: LLaMA-Factory gives its tokenizer the template of its YAML file.",
            expected="template: ... in the YAML file",
            got="--covft_chat_template",
        )
    try:
        tuner = importlib.import_module("llamafactory.train.tuner")
    except ModuleNotFoundError as error:
        if error.name not in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner"):
            raise
        raise MissingDependencyError("LLaMA-Factory is not installed.", fix="pip install llamafactory") from error
    pretrained = {} if flags.pretrained is None else {"pretrained": flags.pretrained}
    text_encoder = flags.text_encoder_for(flags.pretrained)
    settings = {**pretrained, **flags.reading, **flags.settings}
    callback = CoVFTCallback(text_encoder, method=flags.method, **settings)
    # read_args and run_exp read it, as `llamafactory-cli train` leaves it.
    before, sys.argv = sys.argv, ["llamafactory-cli", flags.script, *flags.arguments]
    try:
        tuner.run_exp(_without_reentrant(tuner.read_args()), callbacks=[callback])
    finally:
        sys.argv = before


def _without_reentrant(settings: Any) -> Any:
    """Switch reentrant checkpointing off, LLaMA-Factory's default.

    Args:
        settings: What `read_args` gives: the YAML file with overrides; a list where there is no such file.

    Raises:
        ReentrantCheckpointError: If they ask for it.
    """
    if not isinstance(settings, dict) or _is_true(settings.get("disable_gradient_checkpointing")):
        return settings
    for key in ("use_reentrant_gc", "use_unsloth_gc"):
        if _is_true(settings.get(key)):
            raise ReentrantCheckpointError(
                "Reentrant checkpointing gives the experts of a frozen ViT no gradient.",
                expected=f"{key}: false",
                got=f"{key}: {settings[key]}",
                fix=f"{key}: false in {sys.argv[1]}, or leave {key} out",
            )
    return {**settings, "use_reentrant_gc": False}


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "yes", "t", "y", "1")  # as HfArgumentParser reads it


if __name__ == "__main__":
    run(main)

"""LLaMA-Factory: runs its training with a `CoVFTCallback`, for which its command line has no flag.

python -m covft.integrations.codebases.llama_factory --covft_layers 11-22 -- train.yaml
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from covft.errors import ConfigError, MissingDependencyError
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
    """
    flags = parse(_PROGRAM, sys.argv[1:] if arguments is None else arguments)
    if flags.chat_template is not None:
        raise ConfigError(
            "--covft_chat_template has no effect: LLaMA-Factory gives its tokenizer the template of its YAML file.",
            expected="template: ... in the YAML file",
            got="--covft_chat_template",
        )
    try:
        run_exp = importlib.import_module("llamafactory.train.tuner").run_exp
    except ModuleNotFoundError as error:
        if error.name not in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner"):
            raise
        raise MissingDependencyError("LLaMA-Factory is not installed.", fix="pip install llamafactory") from error
    pretrained = {} if flags.pretrained is None else {"pretrained": flags.pretrained}
    text_encoder = flags.text_encoder_for(flags.pretrained)
    callback = CoVFTCallback(text_encoder, **pretrained, **flags.reading, **flags.settings)
    # run_exp reads it, as `llamafactory-cli train` leaves it.
    before, sys.argv = sys.argv, ["llamafactory-cli", flags.script, *flags.arguments]
    try:
        run_exp(callbacks=[callback])
    finally:
        sys.argv = before


if __name__ == "__main__":
    run(main)

"""Runs a script of a codebase and attaches the models that it passes to a Trainer or gets from its loader."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from covft.errors import CoVFTError
from covft.integrations.codebases.patches import patched_loader, patched_trainers
from covft.tuning.api import COVFT
from covft.utils.options import add_options, given_options, method_options

DEFAULT_TEXT_ENCODER = "bert-base-uncased"
# The flags of the keywords with which every attach() reads prompts.
READING = {
    "turns": "user turns that are read: all (default), first or last",
    "system": "the system prompt, where the template does not mark it in the user's turn",
    "empty_instruction": "instruction of rows whose user says nothing; without it they are an error",
}

# Attaches a model: (model, tokenizer, flags, pretrained).
Attach = Callable[[nn.Module, Any, "Flags", "str | Path | None"], None]


@dataclass(frozen=True)
class Flags:
    """The parsed command line of a launcher.

    Attributes:
        script: Path or module of their script.
        arguments: The script's own arguments.
        text_encoder: Id or folder; None without a flag.
        pretrained: A saved tower to start from, or to evaluate.
        chat_template: A name in `covft.data.CHAT_TEMPLATES`, or a Jinja template.
        method: How the tower is tuned.
        settings: The keywords of `covft.wrap`, or the options of the method, that were given.
        reading: The keywords of `READING` that were given.
    """

    script: str
    arguments: list[str]
    text_encoder: str | None = None
    pretrained: str | None = None
    chat_template: str | None = None
    method: str = "covft"
    settings: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)

    def theirs(self, *names: str) -> str | None:
        """Return the value of one of their flags, `--name value` or `--name=value`; None if it is absent."""
        for position, argument in enumerate(self.arguments):
            flag, equals, value = argument.partition("=")
            if flag.lstrip("-") in names and flag.startswith("--"):
                return value if equals else next(iter(self.arguments[position + 1 :]), None)
        return None

    def text_encoder_for(self, pretrained: str | Path | None) -> str | None:
        """Return the text encoder; None leaves it to a saved tower, which knows its own."""
        return self.text_encoder or (DEFAULT_TEXT_ENCODER if pretrained is None else None)


def parse(program: str, arguments: Sequence[str]) -> Flags:
    """Read a command line.

    Args:
        program: The launcher's module, for `python -m`.
        arguments: covft's flags, `--`, their script and its flags. `--local_rank`, which DeepSpeed's launcher puts
            first, is passed to the script.

    Raises:
        ConfigError: If the layers or an option cannot be read, or belong to another method. Other errors of the command
            line end the process, as argparse does.
    """
    parser = argparse.ArgumentParser(
        f"python -m {program}",
        usage=f"python -m {program} [--covft_* ...] -- script.py|module [its flags]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--covft_text_encoder", help=f"id or folder; by default {DEFAULT_TEXT_ENCODER}, or that of --covft_pretrained"
    )
    parser.add_argument("--covft_method", help="how the tower is tuned: covft (default), or a method of covft.tune")
    parser.add_argument("--covft_option", action="append", help="an option of another method than covft, such as r=16")
    add_options(parser, "covft_")
    parser.add_argument("--covft_pretrained", help="a saved tower to start from, or to evaluate")
    parser.add_argument("--covft_chat_template", help="a name in covft.data.CHAT_TEMPLATES, or a file with a template")
    for name, meaning in READING.items():
        parser.add_argument(f"--covft_{name}", help=meaning)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("script", help="path or module of their script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its flags")
    # Releases of argparse treat `--` differently, so it is removed here.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    script = list(arguments[split + 1 :])
    space = parser.parse_args([*arguments[:split], *script[:1]])
    space.arguments += script[1:]
    ours = {name.removeprefix("covft_"): value for name, value in vars(space).items() if value is not None}
    if "chat_template" in ours and Path(ours["chat_template"]).is_file():
        ours["chat_template"] = Path(ours["chat_template"]).read_text(encoding="utf-8")
    method = ours.get("method", COVFT)
    return Flags(
        script=ours["script"],
        arguments=[*([f"--local_rank={ours['local_rank']}"] if "local_rank" in ours else []), *ours["arguments"]],
        text_encoder=ours.get("text_encoder"),
        pretrained=ours.get("pretrained"),
        chat_template=ours.get("chat_template"),
        method=method,
        settings=method_options(method, given_options(space, prefix="covft_"), ours.get("option", ())),
        reading={name: ours[name] for name in READING if name in ours},
    )


def launch(
    program: str,
    attach: Attach,
    *,
    loader: str,
    arguments: Sequence[str] | None = None,
    check: Callable[[Flags], None] = lambda flags: None,
) -> None:
    """Run their script and attach every model that it passes to a Trainer or gets from its loader.

    Args:
        program: The launcher's module, for `python -m`.
        attach: Attaches a model.
        loader: Dotted name of the function with which their evaluation scripts load a model and its tokenizer.
        arguments: Command-line arguments; None takes those of the process.
        check: Refuses command lines that cannot work, before anything is loaded.
    """
    flags = parse(program, sys.argv[1:] if arguments is None else arguments)
    check(flags)
    is_file = flags.script.endswith(".py") or Path(flags.script).is_file()

    def attach_to_train(model: nn.Module, tokenizer: Any) -> None:
        attach(model, tokenizer, flags, flags.pretrained)

    def attach_loaded(model: nn.Module, tokenizer: Any, saved: str | Path) -> None:
        attach(model, tokenizer, flags, saved)

    before, path = list(sys.argv), list(sys.path)
    # As Python does: a script's folder comes first, and with -m the working folder.
    sys.path.insert(0, str(Path(flags.script).resolve().parent) if is_file else "")
    sys.argv = [flags.script, *flags.arguments]
    try:
        with patched_trainers(attach_to_train), patched_loader(loader, attach_loaded, flags.pretrained):
            if is_file:
                runpy.run_path(flags.script, run_name="__main__")
            else:
                runpy.run_module(flags.script, run_name="__main__", alter_sys=True)
    finally:
        sys.argv, sys.path[:] = before, path


def run(main: Callable[[], None]) -> None:
    """Run a launcher as a program: an error of covft is its message on stderr and exit status 1, without a traceback.

    Args:
        main: The launcher's `main`.
    """
    try:
        main()
    except CoVFTError as error:
        sys.exit(f"{type(error).__name__}: {error}")

"""Runs a script of a codebase, with covft at the two places where it hands a model out: a Trainer, and a loader."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from covft.errors import ConfigError
from covft.integrations.saving import FOLDER
from covft.wrapping import DEFAULTS

DEFAULT_TEXT_ENCODER = "bert-base-uncased"
_READING = ("turns", "system", "default_text")

# How a launcher attaches: (model, tokenizer, flags, pretrained).
Attach = Callable[[nn.Module, Any, "Flags", "str | Path | None"], None]


@dataclass(frozen=True)
class Flags:
    """What stood on the command line.

    Attributes:
        script: Path or module of their script.
        arguments: What it gets.
        text_encoder: None where no flag says.
        pretrained: A saved tower to start from, or to evaluate.
        chat_template: Name in `covft.data.CHAT_TEMPLATES`, or a Jinja template.
        settings: Keywords of `covft.wrap` that were given.
        reading: Keywords about the prompts that were given.
    """

    script: str
    arguments: list[str]
    text_encoder: str | None = None
    pretrained: str | None = None
    chat_template: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)

    def theirs(self, *names: str) -> str | None:
        """The value of one of their flags, `--name value` or `--name=value`; None if it is not there."""
        for position, argument in enumerate(self.arguments):
            flag, equals, value = argument.partition("=")
            if flag.lstrip("-") in names and flag.startswith("--"):
                return value if equals else next(iter(self.arguments[position + 1 :]), None)
        return None

    def text_encoder_for(self, pretrained: str | Path | None) -> str | None:
        """The text encoder; a saved tower knows its own."""
        return self.text_encoder or (DEFAULT_TEXT_ENCODER if pretrained is None else None)


def parse(program: str, arguments: Sequence[str]) -> Flags:
    """Read a command line.

    Args:
        program: What stands after `python -m`.
        arguments: covft's flags, `--`, their script and its flags. `--local_rank`, which DeepSpeed's launcher puts
            first, is handed on to the script.

    Raises:
        ConfigError: If a flag cannot be read. What argparse refuses ends the process, as usual.
    """
    parser = argparse.ArgumentParser(
        f"python -m {program}",
        usage=f"python -m {program} [--covft_* ...] -- script.py|module [its flags]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--covft_text_encoder", help=f"id or folder; by default {DEFAULT_TEXT_ENCODER}, or that of --covft_pretrained"
    )
    parser.add_argument("--covft_layers", help="blocks, as in 11-22 or 3,5,7; by default the latter half but the last")
    parser.add_argument("--covft_experts", type=int, help="experts per block; 4")
    parser.add_argument("--covft_routing", help="dense (default), sparse, uniform or random")
    parser.add_argument("--covft_top_k", type=int, help="experts per image, for sparse and random routing; 2")
    parser.add_argument("--covft_context", help="cve (default), image, text or concat")
    parser.add_argument("--covft_train_norms", help="all (default), adapted or none")
    parser.add_argument("--covft_activation", help="gelu (default) or quick_gelu")
    parser.add_argument("--covft_num_heads", type=int, help="heads of the context attention; 4")
    parser.add_argument(
        "--covft_expert_rank", type=int, help="rank of what experts differ by; by default whole experts"
    )
    parser.add_argument(
        "--covft_recompute", help="what backward computes again of whole experts: none, activation or all (default)"
    )
    parser.add_argument("--covft_feature_layer", type=int, help="blocks behind this hidden state are left out")
    parser.add_argument("--covft_pretrained", help="a saved tower to start from, or to evaluate")
    parser.add_argument("--covft_chat_template", help="a name in covft.data.CHAT_TEMPLATES, or a file with a template")
    parser.add_argument("--covft_turns", help="which user turns are read: all (default), first or last")
    parser.add_argument("--covft_system", help="the system prompt, where it stands unmarked in the user's turn")
    parser.add_argument("--covft_default_text", help="instruction of rows whose user says nothing; else an error")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("script", help="path or module of their script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its flags")
    # argparse treats `--` in another way in every release, so it never gets to see one.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    script = list(arguments[split + 1 :])
    given = vars(parser.parse_args([*arguments[:split], *script[:1]]))
    given["arguments"] += script[1:]
    rank = given.pop("local_rank")
    ours = {name.removeprefix("covft_"): value for name, value in given.items() if value is not None}
    if "layers" in ours:
        ours["layers"] = _layers(ours["layers"])
    if "chat_template" in ours and Path(ours["chat_template"]).is_file():
        ours["chat_template"] = Path(ours["chat_template"]).read_text(encoding="utf-8")
    return Flags(
        script=ours["script"],
        arguments=[*([] if rank is None else [f"--local_rank={rank}"]), *ours["arguments"]],
        text_encoder=ours.get("text_encoder"),
        pretrained=ours.get("pretrained"),
        chat_template=ours.get("chat_template"),
        settings={name: ours[name] for name in DEFAULTS if name in ours},
        reading={name: ours[name] for name in _READING if name in ours},
    )


def launch(
    program: str,
    attach: Attach,
    *,
    loader: str,
    arguments: Sequence[str] | None = None,
    check: Callable[[Flags], None] = lambda flags: None,
) -> None:
    """Run their script; every model that it hands to a Trainer, or gets from its loader, is attached.

    Args:
        program: What stands after `python -m`.
        attach: Attaches a model.
        loader: Dotted name of the function by which their evaluation scripts load a model and its tokenizer.
        arguments: Those of the process by default.
        check: Refuses what can be refused before anything is loaded.
    """
    flags = parse(program, sys.argv[1:] if arguments is None else arguments)
    check(flags)
    is_file = flags.script.endswith(".py") or Path(flags.script).is_file()
    before, path = list(sys.argv), list(sys.path)
    # As python itself does for a script; with -m, the working folder is there already.
    sys.path.insert(0, str(Path(flags.script).resolve().parent) if is_file else "")
    sys.argv = [flags.script, *flags.arguments]
    try:
        with _trainers(attach, flags), _loader(loader, attach, flags):
            if is_file:
                runpy.run_path(flags.script, run_name="__main__")
            else:
                runpy.run_module(flags.script, run_name="__main__", alter_sys=True)
    finally:
        sys.argv, sys.path[:] = before, path


@contextlib.contextmanager
def _trainers(attach: Attach, flags: Flags) -> Iterator[None]:
    """Attach what a Trainer of transformers is made with, when everything else was done to the model."""
    import transformers

    from covft.integrations.codebases.trainer import before_trainer, join_trainer

    cls = transformers.Trainer
    original = cls.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        model, tokenizer = given.get("model"), given.get("tokenizer") or given.get("processing_class")
        if model is None:
            raise ConfigError("This Trainer makes its model itself.", expected="Trainer(model=...)", got="model_init")
        before_trainer(given.get("args"))
        # As the Trainer itself does a moment later: routers begin the same in every process and every run.
        transformers.set_seed(getattr(given.get("args"), "seed", 42))
        attach(model, tokenizer, flags, flags.pretrained)
        original(self, *args, **kwargs)
        join_trainer(self)

    cls.__init__ = __init__
    try:
        yield
    finally:
        cls.__init__ = original


@contextlib.contextmanager
def _loader(name: str, attach: Attach, flags: Flags) -> Iterator[None]:
    """Attach what their loader returns, with the tower that was saved beside the model."""
    module_name, _, function = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        module = None
    original = getattr(module, function, None)
    if original is None:
        yield
        return

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        saved = flags.pretrained or _saved_with(args, kwargs)
        loaded = original(*args, **kwargs)
        model = next(part for part in loaded if isinstance(part, nn.Module))
        tokenizer = next(part for part in loaded if hasattr(part, "batch_decode"))
        attach(model, tokenizer, flags, saved)
        return loaded

    setattr(module, function, load)
    try:
        yield
    finally:
        setattr(module, function, original)


def _saved_with(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path:
    """The adapted tower in the folder of a model: LLaVA's `model_path`, InternVL's `args.checkpoint`."""
    first: Any = args[0] if args else kwargs.get("model_path", kwargs.get("args"))
    folder = Path(getattr(first, "checkpoint", first))
    if not (folder / FOLDER).is_dir():
        raise ConfigError(
            f"{folder} was not trained with covft.",
            expected=f"a folder with {FOLDER}/ in it, or --covft_pretrained",
            got=str(folder),
            fix="run the script without this launcher to evaluate the model as it is",
        )
    return folder / FOLDER


def _layers(text: str) -> tuple[int, ...]:
    """Block indices of `11-22` (both ends included), `3,5,-2` and mixtures."""
    indices: list[int] = []
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(r"(-?\d+)(?:-(\d+))?", part)
        span = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
        if not span:
            raise ConfigError(
                f"--covft_layers {text} cannot be read.",
                expected="indices and spans, both ends included",
                got=repr(part),
                fix="--covft_layers 11-22, or --covft_layers=3,5,-2",
            )
        indices += span
    return tuple(indices)

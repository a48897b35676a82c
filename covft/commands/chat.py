"""`covft chat`: a conversation about pictures in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from covft.errors import ConfigError, CoVFTError, MissingDependencyError

_HELP = "/image PATH  /weights  /reset  /help  /quit"


def chat(
    folder: Annotated[str, typer.Argument(help="Folder of a model that was saved after attach, or its id.")],
    image: Annotated[
        list[str] | None, typer.Option(help="A picture for the first question: a path or file:// URL; repeatable.")
    ] = None,
    on_new_question: Annotated[
        str, typer.Option(help="What a later question does to the picture: reencode, keep or append.")
    ] = "reencode",
    text_encoder: Annotated[
        str | None, typer.Option(help="Id or folder; needed if it was a folder in training.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Id or folder of the model that LoRA was trained on.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Ask a saved multimodal LLM about pictures; /weights shows how its tower routed the question."""
    console = Console(highlight=False)
    try:
        pictures = [open_picture(name) for name in image or ()]
        session = _load(folder, on_new_question, text_encoder, base, dtype, device, max_new_tokens)
        console.print(f"{folder} is loaded. {_HELP}", soft_wrap=True, markup=False)
        Session(session, console, pictures).run()
    except CoVFTError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(_sentence(error), style="red", markup=False)
        raise typer.Exit(2) from error


class Session:
    """Reads questions and commands from standard input, and prints what comes of them.

    Args:
        chat: A `covft.Chat`.
        console: Where to.
        pictures: Pictures for the first question.
    """

    def __init__(self, chat: Any, console: Console, pictures: list[Any]) -> None:
        self.chat, self.console, self.pictures = chat, console, pictures
        self.commands: dict[str, Callable[[str], Any]] = {
            "/image": self.show,
            "/weights": self.print_weights,
            "/reset": self.reset,
            "/help": lambda _: self.say(_HELP),
        }

    def run(self) -> None:
        """Go on until /quit, the end of the input, or Ctrl+C at the prompt."""
        while True:
            try:
                line = self.console.input("> ", markup=False).strip()
            except (EOFError, KeyboardInterrupt):
                return
            name, _, rest = line.partition(" ")
            if name in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self.commands.get(name, lambda _, name=name: self._unknown(name))(rest.strip())
                elif line:
                    self.ask(line)
            except CoVFTError as error:
                self.console.print(_sentence(error), style="red", soft_wrap=True, markup=False)
            except KeyboardInterrupt:
                self.say("Stopped; the question is not part of the conversation.")

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, soft_wrap=True, markup=False)

    def ask(self, question: str) -> None:
        """Ask, with the pictures that were not shown yet; the answer is printed as it comes."""
        answer = self.chat.ask(question, image=self.pictures or None)
        self.pictures = []
        if not answer:
            self.say("(no answer)")

    def show(self, name: str) -> None:
        """Open a picture for the next question."""
        picture = open_picture(name)
        self.pictures.append(picture)
        self.say(f"A picture of {picture.width} x {picture.height} pixels, for the next question.")

    def reset(self, _: str) -> None:
        """Forget the conversation."""
        self.chat.reset()
        self.pictures = []
        self.say("The conversation and its pictures are forgotten.")

    def print_weights(self, _: str) -> None:
        """Print the routing of the last question."""
        table = weights_table(self.chat.routing())
        if table is None:
            self.say("Routing weights come with the first answer about a picture, from a tower with experts.")
        else:
            self.console.print(table)

    def _unknown(self, name: str) -> None:
        self.say(f"{name} is not a command. {_HELP}")


def weights_table(weights: dict[int, Any]) -> Table | None:
    """Make a table of routing weights, a row per block and picture; the largest of each is bold.

    Args:
        weights: Of each layer, shape `(B, E)`.
    """
    if not weights:
        return None
    several = len(next(iter(weights.values()))) > 1
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("block", justify="right")
    if several:
        table.add_column("picture", justify="right")
    for expert in range(next(iter(weights.values())).shape[1]):
        table.add_column(f"expert {expert}", justify="right")
    for layer, weights_BE in weights.items():
        for number, row in enumerate(weights_BE.tolist()):
            cells = [f"[bold]{weight:.3f}[/bold]" if weight == max(row) else f"{weight:.3f}" for weight in row]
            table.add_row(str(layer), *([str(number)] if several else []), *cells)
    return table


def open_picture(name: str) -> Any:
    """Open a picture by its path or its file URL.

    Args:
        name: As the user typed it; quotes around it are dropped.

    Raises:
        ConfigError: If it is empty, or a URL of another kind.
        DataError: If it is missing, or not a picture.
    """
    from covft.integrations.chat.prompts import as_images

    name = name.strip()
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
        name = name[1:-1]
    if not name:
        raise ConfigError("/image needs the path of a picture.", fix="/image cup.jpg")
    if "://" in name:
        url = urlsplit(name)
        if url.scheme.lower() != "file" or url.netloc not in ("", "localhost"):
            raise ConfigError(
                f"{name} is not opened: covft chat reads files of this machine and fetches nothing.",
                expected="a path, or a file:// URL",
                got=name,
            )
        name = url2pathname(url.path)
    [picture] = as_images(str(Path(name).expanduser()))
    return picture


def _load(
    folder: str,
    on_new_question: str,
    text_encoder: str | None,
    base: str | None,
    dtype: str,
    device: str | None,
    max_new_tokens: int,
) -> Any:
    """Load the model, and begin a conversation."""
    import torch

    import covft
    from covft.checkpoints.sources import is_hub_id
    from covft.integrations.building.saved import load_processor
    from covft.integrations.chat.prompts import Prompts
    from covft.utils.extras import import_library

    transformers = import_library("transformers", "transformers", needed_by="covft chat")
    if not Path(folder).is_dir() and not is_hub_id(folder):
        raise ConfigError(
            f"The folder {folder} does not exist.",
            expected="a folder that an attached model was saved to, or a repository of the Hugging Face Hub",
            got=folder,
            fix="model.save_pretrained(folder), and the path of that folder",
        )
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype={dtype} is not known.", expected="auto, float32, bfloat16 or float16", got=dtype)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    processor = load_processor(folder, base)
    try:
        Prompts(processor)  # before weights are loaded
    except ConfigError as error:
        fix = f"In Python, processor.save_pretrained({folder!r}) with the processor of training."
        raise ConfigError(f"{error.problem} {fix}", expected=error.expected, got=error.got) from error
    model, _ = covft.load_model(folder, text_encoder, processor=processor, base=base, dtype=kind)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    printer = transformers.TextStreamer(
        getattr(processor, "tokenizer", processor), skip_prompt=True, skip_special_tokens=True
    )  # fmt: skip
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "streamer": printer}
    return covft.Chat(model, processor, on_new_question, **options)


def _sentence(error: CoVFTError) -> str:
    """Return what is wrong, and what to install; the lines that only help in a program are left out."""
    return f"{error.problem} {error.fix}" if isinstance(error, MissingDependencyError) else error.problem

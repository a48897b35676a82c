"""The `covft` command: describe a ViT, diagnose and ask a multimodal LLM, encode instructions, tell versions."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

from covft import __version__
from covft.errors import ConfigError, CoVFTError, MissingDependencyError
from covft.utils.options import method_options, options, read_options

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"The covft command needs {error.name}, which is not installed.", fix='pip install "covft[cli]"'
    ) from error

from covft.commands import results
from covft.commands.chat import chat
from covft.commands.evaluate import evaluate

app = typer.Typer(
    help="Context-aware visual fine-tuning of vision transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(chat)

# What numbers may depend on, by the names under which they are installed.
_LIBRARIES = (
    "torch",
    "timm",
    "open_clip_torch",
    "transformers",
    "sentence-transformers",
    "accelerate",
    "peft",
    "trl",
    "deepspeed",
    "flash-attn",
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error of covft is printed without a traceback and ends with code 2.

    Args:
        arguments: Without the program's name; by default those of the process.
    """
    try:
        app(args=arguments, prog_name="covft")
    except CoVFTError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        sys.exit(2)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting; it gets those that were used as `settings`.

    Args:
        command: A command with a parameter `settings`.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
    added = []
    for option in options():
        text = option.help + (f" {' | '.join(option.choices)}." if option.choices else "")
        shown = "such as 11-22 or 3,5,-2" if option.name == "layers" else str(option.default)
        kind: Any = option.parse if option.is_plain else str
        info = typer.Option(help=text, show_default=shown)
        annotation = Annotated[kind | None, info]  # type: ignore[valid-type]
        added.append(
            inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    @functools.wraps(command)
    def run(**given: Any) -> None:
        settings = {parameter.name: given.pop(parameter.name) for parameter in added}
        settings = {name: value for name, value in settings.items() if value is not None}
        command(**given, settings=read_options(settings))

    run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return run


# ------------------------------------------------------------------------------------------ describe


@app.command()
@with_settings
def describe(
    model: Annotated[str | None, typer.Argument(help="timm:NAME, open_clip:NAME or hf:ID_OR_FOLDER.")] = None,
    everything: Annotated[
        str | None, typer.Option("--all", help="Instead of a model: all of timm, open_clip or transformers.")
    ] = None,
    text_dim: Annotated[int, typer.Option(min=1, help="Width of the text features.")] = 768,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per image, where the model does not say.")] = None,
    method: Annotated[str, typer.Option(help="How the ViT is tuned: a method of covft.tune.")] = "covft",
    option: Annotated[
        list[str] | None, typer.Option(help="An option of another method, such as r=16; may be given several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    settings: Any = None,
) -> None:
    """Show the blocks of a ViT, what would be wrapped or tuned, and what that adds. No weights are loaded."""
    if (model is None) == (everything is None):
        raise ConfigError(
            "covft describe takes a model, or --all and a library.",
            expected="one of the two",
            got="neither" if model is None else "both",
            fix="covft describe timm:test_vit, or covft describe --all timm",
        )
    if model is None:
        from covft.adapters.coverage import load_coverage

        _print_coverage(Console(), load_coverage(str(everything)), as_json=as_json)
        return
    from covft.describing import cost, gather

    chosen = method_options(method, settings, option or ())
    if method == "covft":
        facts = gather(model, text_dim=text_dim, tokens=tokens, **chosen)
    else:
        facts = cost(model, method, chosen, text_dim=text_dim)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    elif method == "covft":
        _print_facts(Console(), facts)
    else:
        _print_cost(Console(), facts)


def _print_facts(console: Console, facts: dict[str, Any]) -> None:
    console.print(_title(facts), soft_wrap=True, markup=False)
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("block", justify="right")
    table.add_column("FFN")
    table.add_column("class")
    table.add_column("widths", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("if wrapped", justify="right")
    for block in facts["blocks"]:
        added = block["added"]
        table.add_row(
            str(block["index"]),
            f"{block['path']}.{block['mlp']}",
            block["mlp_class"],
            f"{block['embed_dim']} > {block['ffn_dim']}",
            f"{block['ffn_parameters']:,}",
            "" if added is None else f"{sum(added['parameters'].values()):,}",
        )
    # As wide as its numbers need, whatever the terminal: a truncated number is worse than a long line.
    table.width = Console(width=1000).measure(table).maximum
    console.print(table, soft_wrap=True, highlight=False)
    for line in _summary(facts):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _print_cost(console: Console, facts: dict[str, Any]) -> None:
    options = ", ".join(f"{name}={value!r}" for name, value in facts["options"].items())
    share = 100 * facts["trained_parameters"] / facts["parameters"]
    lines = [
        _title(facts),
        f"Method:                        {facts['method']}" + (f"  ({options})" if options else ""),
        f"Trained parameters:            {facts['trained_parameters']:,}  ({share:.2f}% of the ViT's)",
        f"Added parameters:              {facts['added_parameters']:,}",
    ]
    if facts["forward_flops"] is None:
        lines.append("FLOPs and bytes:               unknown (the model does not say its image size)")
    else:
        lines += [
            f"FLOPs added to a forward:      {facts['forward_flops'] / 1e9:,.2f} G  (per image)",
            f"FLOPs of a training step:      {facts['step_flops'] / 1e9:,.2f} G more than a forward",
            f"Kept for backward:             {facts['kept_bytes'] / 2**20:,.1f} MiB  (per image)",
        ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _title(facts: dict[str, Any]) -> str:
    return (
        f"{facts['model']}: {facts['library']} {facts['class_name']}, {facts['depth']} blocks, "
        f"{facts['parameters']:,} parameters, tokens {facts['layout']}"
    )


def _summary(facts: dict[str, Any]) -> list[str]:
    config, wrapped = facts["config"], [block for block in facts["blocks"] if block["wrapped"]]
    parts = [block["added"]["parameters"] for block in wrapped]
    sums = sorted({sum(part.values()) for part in parts})
    span = f"{sums[0]:,}" if len(sums) == 1 else f"{sums[0]:,} to {sums[-1]:,}"
    shown = ", ".join(str(layer) for layer in config["layers"])
    names = ("experts", "image_refinement", "text_refinement", "attention", "router", "updates")
    shares = ", ".join(f"{name.replace('_', ' ')} {parts[0][name]:,}" for name in names if parts[0].get(name))
    lines = [
        f"Wrapped: blocks {shown}",
        f"         {config['experts']} experts, {config['routing']} routing, {config['context']} context, "
        f"text width {facts['text_dim']}",
        f"Parameters per adapted block:  {span}" + (f"  ({shares})" if len(sums) == 1 else ""),
        f"Parameters in all:             {facts['adapted_parameters']:,}",
        f"Net of the FFNs replaced:      {facts['net_parameters']:,}",
        f"Trained, norms included:       {facts['trained_parameters']:,}",
    ]
    if facts["num_tokens"] is None:
        has_stages = len({block["embed_dim"] for block in facts["blocks"]}) > 1
        reason = "the stages have different tokens" if has_stages else "say --tokens N, the model does not"
        return [*lines, f"FLOPs added:                   unknown ({reason})"]
    per_image = f"per image of {facts['num_tokens']} tokens, forward"
    return [*lines, f"FLOPs added:                   {facts['net_flops'] / 1e9:,.1f} G  ({per_image})"]


def _print_coverage(console: Console, coverage: Any, *, as_json: bool) -> None:
    """The table of a library: which of its models are wrapped, how many FFNs they have, why others are refused."""
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(coverage), indent=2))
        return
    counts = {verdict: coverage.count(verdict) for verdict in ("wrapped", "refused", "failed")}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(
        f"{coverage.library} {coverage.version}: {coverage.count()} models with attention, {told}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("class", "verdict", "models", "FFNs", "layouts or reason", "such as"):
        table.add_column(name, justify="right" if name in ("models", "FFNs") else "left")
    for row in coverage.rows:
        fewest, most = row.blocks
        table.add_row(
            row.class_name,
            row.verdict,
            str(len(row.models)),
            "" if not most else str(most) if fewest == most else f"{fewest} to {most}",
            escape(", ".join(row.layouts) if row.verdict == "wrapped" else row.reason),
            row.models[0],
        )
    # As wide as it needs, whatever the terminal, like the table of one model.
    table.width = Console(width=1000).measure(table).maximum
    console.print(table, soft_wrap=True, highlight=False)


# ------------------------------------------------------------------------------------------ diagnose


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(help="Folder or id of a LLaVA or InternVL of transformers.")],
    data: Annotated[str, typer.Option(help="LLaVA's JSON or JSONL, or InternVL's meta file.")],
    images: Annotated[str | None, typer.Option(help="Root folder of LLaVA's images; default: the file's.")] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Id or folder; finds kinds of instruction, default: by their words.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples, at most.")] = 240,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each probe training.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 8,
    rate: Annotated[float | None, typer.Option(help="Learning rate of the probe; default: chosen.")] = None,
    weights: Annotated[str, typer.Option(help="Weights of the blocks: ffn or all.")] = "ffn",
    template: Annotated[str | None, typer.Option(help="Chat template, by name; default: the model's own.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest sequence, in tokens.")] = 2048,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn.")] = 0,
    output: Annotated[
        str | None,
        typer.Option(
            help="Write all numbers to this JSON file; covft report reads covft_diagnosis.json in its folder."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a tower should be frozen, tuned, or tuned with context, by a measurement before any training."""
    from covft.analysis.diagnosis import diagnose as run
    from covft.analysis.diagnosis.loading import load_data, load_mllm

    loaded, processor = load_mllm(model, text_encoder, device)
    rows = load_data(data, images, loaded, processor, template, max_length)
    found = run(
        loaded,
        rows,
        text_encoder=text_encoder,
        samples=samples,
        steps=steps,
        batch=batch,
        rate=rate,
        weights=weights,
        seed=seed,
    )
    if output is not None:
        found.save(output)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
    if rows.broken:
        typer.echo(f"{len(rows.broken)} rows could not be read, the first: {rows.broken[0]}", err=True)


# ------------------------------------------------------------------------------------------ the others


@app.command()
def precompute(
    annotation: Annotated[str, typer.Argument(help="LLaVA's JSON or JSONL, or InternVL's meta file.")],
    output: Annotated[str, typer.Argument(help="The .safetensors file to write.")],
    text_encoder: Annotated[str, typer.Option(help="Id or folder of the text encoder.")],
    turns: Annotated[str, typer.Option(help="User turns that make the instruction: all, first or last.")] = "all",
    empty_instruction: Annotated[str | None, typer.Option(help="Instruction of rows whose user says nothing.")] = None,
    clean: Annotated[bool, typer.Option("--clean", help='Clean them, for a ViT with instructions="clean".')] = False,
) -> None:
    """Encode the instructions of a data set once, for `covft.text.FeatureTable.load`."""
    from covft.data import instructions_of, open_rows
    from covft.text import FeatureTable, as_text_encoder

    found = list(instructions_of(open_rows(annotation), turns, empty_instruction=empty_instruction, clean=clean))
    texts = [text for text in found if text]
    table = FeatureTable.precompute(as_text_encoder(text_encoder), texts, output, show=sys.stderr.isatty())
    typer.echo(f"{len(table)} distinct instructions of {len(found)} rows, {table.text_dim} numbers each: {output}")
    if len(texts) < len(found):
        typer.echo(f"{len(found) - len(texts)} rows have none or cannot be read", err=True)


# -------------------------------------------------------------------------------------------- report


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="An encoder, the output of a trainer, or a folder with recordings.")],
    output: Annotated[str | None, typer.Option(help="The file to write; by default covft_report.html in it.")] = None,
) -> None:
    """Write one HTML page about a folder: settings, curves, contexts, routing, attention, questions compared."""
    from covft.analysis.report import write_report

    typer.echo(str(write_report(folder, output)))


# ---------------------------------------------------------------------------- paper-table, forgetting

app.command("paper-table")(results.paper_table)
app.command()(results.forgetting)
# ------------------------------------------------------------------------------------------ evaluate

app.command()(evaluate)


# ------------------------------------------------------------------------------------------- version


@app.command()
def version() -> None:
    """Tell the versions of covft, Python, torch and the optional libraries."""
    typer.echo(f"covft {__version__}")
    typer.echo(f"python {platform.python_version()}")
    for name in _LIBRARIES:
        try:
            typer.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            typer.echo(f"{name} -")

"""Exports a wrapped ViT as one graph, (images, text features) -> features, for runtimes without covft."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from covft.encoder import ContextEncoder
from covft.errors import ConfigError, UnsupportedViTError
from covft.nn.experts import Experts
from covft.utils.arguments import check_kinds
from covft.utils.extras import import_library
from covft.utils.modes import in_eval_mode

FORMATS = ("torch", "onnx")


@dataclass(frozen=True)
class Exported:
    """An exported encoder.

    Attributes:
        program: The program of `torch.export`: `program.module()(images, text_features)`.
        path: Where it was written; None if it was not.
        error: Largest difference between its features and the encoder's, relative to the largest feature, on a batch of
            another size with other texts. Of an ONNX file as onnxruntime runs it; None where that is not installed.
    """

    program: torch.export.ExportedProgram
    path: Path | None
    error: float | None


class WithFeatures(nn.Module):
    """Calls an encoder with text features, and returns one tensor.

    Args:
        encoder: The wrapped ViT.
        select: Takes the features out of what the ViT returns.
        options: Further arguments of the encoder, such as `output_hidden_states`.
    """

    def __init__(self, encoder: ContextEncoder, select: Callable[[Any], Tensor], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder, self.select, self.options = encoder, select, dict(options)

    def forward(self, images: Tensor, text_features: Tensor) -> Tensor:
        """Return the features of images `(B, 3, H, W)`, each conditioned on its text, `(B, C)`."""
        return self.select(self.encoder(images, text_features, **self.options))


@check_kinds
def export(
    encoder: ContextEncoder,
    images: Tensor,
    text: Any,
    path: str | Path | None = None,
    *,
    format: str = "torch",
    select: Callable[[Any], Tensor] | None = None,
    **options: Any,
) -> Exported:
    """Export a wrapped ViT as a graph whose inputs are images and text features, for any batch size.

    The features of the text are an input, because a text encoder is exported by its own library; `encode_text` gives
    them. Sparse routing runs all experts in the graph, with weights of zero for those that were not chosen. The encoder
    is as it was afterwards. The result is compared with the encoder's own.

    Args:
        encoder: A wrapped ViT, such as `covft.get_encoder(model)`.
        images: Images of the size that the graph takes, `(B, 3, H, W)`; the batch may be of any size later.
        text: Their text, as for calling the encoder.
        path: File to write: `.pt2` for `torch.export.load`, or `.onnx`. None writes none.
        format: `"torch"` or `"onnx"`, which needs `pip install "covft[onnx]"` and a path. Its inputs are named `images`
            and `text_features`, its output `features`.
        select: Takes the features out of what the ViT returns; None takes a tensor as it is, or `last_hidden_state`.
        **options: Further arguments of the encoder, such as `output_hidden_states=True`.

    Returns:
        The program, and its error.

    Raises:
        ConfigError: If the format is not known, or needs a path.
        UnsupportedViTError: If the ViT packs images of several sizes into one sequence, makes a number of the batch
            size, or its routing is random.
        MissingDependencyError: If packages for ONNX are missing.

    Example:
        >>> encoder = covft.load("runs/clip-covft")  # doctest: +SKIP
        >>> covft.export(encoder, images, texts, "encoder.onnx", format="onnx").error < 1e-5  # doctest: +SKIP
    """
    _check(encoder, path, format)
    if format == "onnx":
        for library in ("onnx", "onnxscript"):
            import_library(library, "onnx", needed_by="format='onnx'")
    module = WithFeatures(encoder, select or _features, options)
    features = _per_image(encoder, text, len(images))
    if len(images) == 1:  # would be taken for a constant
        images, features = images.repeat(2, 1, 1, 1), features.repeat(2, 1)
    inputs = (images, features)
    other = (torch.cat([images, images[:1].flip(-1)]), torch.cat([features.flip(1), features[:1]]))
    with _as_in_a_graph(encoder):
        wanted = module(*other)  # before: transformers installs its hooks in the first eager call
        batch = torch.export.Dim("batch")
        try:
            program = torch.export.export(module, inputs, dynamic_shapes=({0: batch}, {0: batch}), strict=False)
        except RuntimeError as error:
            if "Constraints violated (batch)" not in str(error):
                raise
            raise UnsupportedViTError(
                "This ViT or select= makes a number of the batch size, which the graph would fix.",
                expected="code that works for any batch, such as x.shape[0]",
                got=f"a graph for {len(inputs[0])} images alone",
                fix="replace len(x) and int(x.shape[0]) in its forward by x.shape[0]",
            ) from error
    target = None if path is None else Path(path)
    if format == "torch":
        found = program.module()(*other)
        if target is not None:
            torch.export.save(program, target)
        return Exported(program, target, _largest(found, wanted))
    assert target is not None
    _write_onnx(program, target)
    return Exported(program, target, _error_of_onnx(target, other, wanted))


def _check(encoder: ContextEncoder, path: Any, format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is not known.", expected=" | ".join(FORMATS), got=repr(format))
    if format == "onnx" and path is None:
        raise ConfigError("An ONNX model is a file.", expected="a path", got="path=None", fix="path='encoder.onnx'")
    if encoder.spec.input.is_packed:
        raise UnsupportedViTError(
            "This ViT packs images of several sizes into one sequence, whose shape the graph would fix.",
            expected="a ViT that takes (B, 3, H, W)",
            got=str(encoder.spec),
        )
    if encoder.covft_config.routing == "random":
        raise UnsupportedViTError(
            "Random routing draws its experts outside of the graph.", expected="another routing", got="routing='random'"
        )


def _per_image(encoder: ContextEncoder, text: Any, images: int) -> Tensor:
    features = text if isinstance(text, Tensor) else encoder.encode_text(text)
    features = features.to(next(encoder.parameters()).device)
    return features.expand(images, -1).contiguous() if len(features) == 1 else features


@contextlib.contextmanager
def _as_in_a_graph(encoder: ContextEncoder) -> Iterator[None]:
    """Run as a graph does: no records, all experts, eval mode, no gradients; then everything is as it was."""
    slots = list(encoder.slots().values())
    experts = [slot.experts for slot in slots if isinstance(slot.experts, Experts)]
    try:
        for slot in slots:
            slot.keeps_record = False
        for mixture in experts:
            mixture.run_all = True
        with in_eval_mode(encoder), torch.no_grad():
            yield
    finally:
        for slot in slots:
            del slot.keeps_record
        for mixture in experts:
            del mixture.run_all


def _features(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "last_hidden_state", None)
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"Which features of a {type(output).__name__} are wanted is not known.",
            expected="a tensor, or an output with last_hidden_state",
            got=type(output).__name__,
            fix="select=lambda output: output[0]",
        )
    return found


def _largest(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    names: dict[str, Any] = {"input_names": ["images", "text_features"], "output_names": ["features"]}
    with contextlib.redirect_stdout(io.StringIO()):  # its progress
        torch.onnx.export(program, f=str(path), dynamo=True, verbose=False, **names)


def _error_of_onnx(path: Path, inputs: tuple[Tensor, Tensor], wanted: Tensor) -> float | None:
    try:
        runtime: Any = import_library("onnxruntime", "onnx", needed_by="the comparison")
    except ImportError:
        return None
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arrays = dict(zip(("images", "text_features"), (x.cpu().numpy() for x in inputs), strict=True))
    return _largest(torch.from_numpy(session.run(None, arrays)[0]), wanted.cpu())

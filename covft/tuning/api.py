"""tune(), untune() and load() of a ViT alone, by every method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from covft import wrapping
from covft.adapters.registry import describe
from covft.adapters.spec import Adapter
from covft.encoder import ContextEncoder
from covft.errors import ConfigError, UnsupportedViTError
from covft.surgery.checks import MARK, check_text_weights, check_vit
from covft.text import as_text_encoder
from covft.tuning.change import Change, FrozenBatchNorms, Hook, apply, check_removable, undo
from covft.tuning.loading import SavedMethod
from covft.tuning.method import Method, Tower
from covft.tuning.registry import make_method
from covft.tuning.tuned import TunedViT
from covft.utils.arguments import check_kinds
from covft.utils.sharding import unpartitioned

COVFT = "covft"


@check_kinds
def tune(
    vit: nn.Module,
    method: str | Method = COVFT,
    *,
    text_encoder: Any = None,
    images: Any = None,
    adapter: Adapter | None = None,
    **options: Any,
) -> TunedViT | ContextEncoder:
    """Prepare a ViT for tuning by one of many methods, in place.

    Everything that the method does not train is frozen. `covft.untune` restores the ViT, `save_pretrained` saves what
    was trained, and `covft.load` loads it.

    Args:
        vit: A vision transformer of timm, open_clip, transformers, or one that `adapter` knows.
        method: Name of a method, such as `"lora"` (`covft.tuning.methods()` lists them), or a method with its options.
            `"covft"` is `covft.wrap`.
        text_encoder: As for `covft.wrap`, for methods that need text; others ignore it.
        images: A tensor of images or an iterable of batches, for methods that start from them, such as `"svpt"`; others
            ignore them.
        adapter: How the ViT is built, if no registered adapter knows it.
        **options: Options of the method, such as `r=8`.

    Returns:
        The tuned ViT, called as the ViT is: `tuned(images, text=None)`. The ViT inside it is `vit`, changed.

    Raises:
        ConfigError: If the method or an option is not known, or a value cannot work.
        UnknownViTError: If no adapter knows the ViT.
        UnsupportedViTError: If the method cannot be used on this ViT, or if it is tuned or wrapped already.
        LayerIndexError: If an option asks for blocks that the ViT does not have.

    Example:
        >>> import timm
        >>> tuned = tune(timm.create_model("test_vit"), "bitfit")
        >>> tuned(torch.rand(1, 3, 160, 160)).shape
        torch.Size([1, 1000])
    """
    if method == COVFT:
        return wrapping.wrap(vit, text_encoder, adapter=adapter, **options)
    chosen = _method(method, options)
    tower, encoder = _prepared(vit, chosen, text_encoder, adapter)
    change = chosen.plan(tower)
    chosen.initialise(tower, change, images)
    return install(chosen, tower, change, encoder)


def _prepared(vit: nn.Module, method: Method, text_encoder: Any, adapter: Adapter | None) -> tuple[Tower, Any]:
    """Check a ViT, and return what a method plans with, and the text encoder if it needs one."""
    check_vit(vit)
    check_text_weights(text_encoder)
    spec = describe(vit, adapter)
    encoder = None
    if method.needs_text and text_encoder is not None:
        with unpartitioned():
            encoder = as_text_encoder(text_encoder)
    return Tower(vit, spec, spec.depth - 1, text_dim=None if encoder is None else encoder.text_dim), encoder


def install(method: Method, tower: Tower, change: Change, text_encoder: Any = None) -> TunedViT:
    """Apply a planned change.

    Args:
        method: The method that planned it.
        tower: The ViT that it was planned for.
        change: The plan.
        text_encoder: The text encoder of a method that needs text.
    """
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in tower.vit.modules()):
        keeper = FrozenBatchNorms()
        change = dataclasses.replace(
            change,
            added={**change.added, "covft_batch_norms": keeper},
            hooks=(*change.hooks, Hook("", keeper.keep, before=True)),
        )
    before = apply(tower.vit, change)
    tower.vit.__dict__[MARK] = method.name
    return TunedViT(tower.vit, method, tower.spec, change, before, text_encoder)


def _method(method: str | Method, options: dict[str, Any]) -> Method:
    if isinstance(method, str):
        return make_method(method, options)
    if options:
        raise ConfigError(
            "A method has its options already.",
            expected="a method, or its name with options",
            got=f"{method!r} and {', '.join(options)}",
        )
    return method


@check_kinds
def untune(tuned: nn.Module) -> nn.Module:
    """Restore the ViT as it was before `tune`, bit for bit, in place.

    Args:
        tuned: What `tune` returned, by any method.

    Returns:
        The ViT.

    Raises:
        UnsupportedViTError: If it is not a tuned ViT, or is restored already.
    """
    if isinstance(tuned, ContextEncoder):
        return wrapping.unwrap(tuned)
    if not isinstance(tuned, TunedViT):
        raise UnsupportedViTError(f"{type(tuned).__name__} is not what covft.tune returned.", expected="a TunedViT")
    vit = tuned.vit
    check_removable(vit, tuned.change, tuned.before)
    undo(vit, tuned.change, tuned.before)
    return vit


@check_kinds
def load(
    folder_or_repo_id: str | Path,
    vit: nn.Module | None = None,
    text_encoder: Any = None,
    *,
    adapter: Adapter | None = None,
) -> TunedViT | ContextEncoder:
    """Load what `save_pretrained` of a tuned ViT or an encoder saved: tune the base ViT again, fill in the weights.

    Args:
        folder_or_repo_id: A folder that `save_pretrained` wrote, or a repository of the Hugging Face Hub.
        vit: The base ViT, changed in place; None builds it from the id that was saved.
        text_encoder: The text encoder; None builds it from the id that was saved.
        adapter: How the ViT is built, if no registered adapter knows it.

    Returns:
        The tuned ViT, with the outputs of the one that was saved.

    Raises:
        CheckpointError: If the folder is incomplete or damaged, if it was made for other base weights, or if tensors
            are missing, unexpected or of another shape; the ViT is then as it was.

    Example:
        >>> encoder = load("runs/covft", vit=vit, text_encoder=bert)  # doctest: +SKIP
    """
    saved = SavedMethod.read(folder_or_repo_id)
    if saved is None:
        return wrapping.load(folder_or_repo_id, vit, text_encoder, adapter=adapter)
    vit = saved.build_vit() if vit is None else vit
    check_vit(vit)
    saved.check_base(vit)
    texts = saved.build_text_encoder() if text_encoder is None else text_encoder
    tower, encoder = _prepared(vit, saved.method, texts, adapter)
    tuned = install(saved.method, tower, saved.method.plan(tower), encoder)
    try:
        saved.fill(tuned)
    except BaseException:
        untune(tuned)
        raise
    return tuned

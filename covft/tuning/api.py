"""tune(), untune() and load() of a ViT alone, by every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from covft import wrapping
from covft.adapters.registry import describe
from covft.adapters.spec import Adapter
from covft.checkpoints import pretrained
from covft.encoder import ContextEncoder
from covft.errors import ConfigError, UnsupportedViTError
from covft.surgery.checks import MARK, check_text_weights, check_vit
from covft.surgery.skipping import last_of
from covft.text import TextEncoder, as_text_encoder
from covft.tuning.change import Change, FrozenBatchNorms, Hook, apply, check_removable, undo
from covft.tuning.loading import SavedMethod
from covft.tuning.method import Method, Tower
from covft.tuning.registry import make_method
from covft.tuning.tuned import BATCH_NORMS, TunedViT
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
    """Tune a ViT alone, in place: what `covft.tune` does with one.

    Args:
        vit: A vision transformer of timm, open_clip, transformers, or one that `adapter` knows.
        method: As for `covft.tune`.
        text_encoder: As for `covft.tune`.
        images: As for `covft.tune`.
        adapter: As for `covft.tune`.
        **options: Options of the method, such as `r=8`.

    Returns:
        The tuned ViT, called as the ViT is: `tuned(images, text=None)`. The ViT inside it is `vit`, changed.

    Raises:
        CoVFTError: As `covft.tune` does.

    Example:
        >>> import timm
        >>> tuned = tune(timm.create_model("test_vit"), "bitfit")
        >>> tuned(torch.rand(1, 3, 160, 160)).shape
        torch.Size([1, 1000])
    """
    if method == COVFT:
        return wrapping.wrap(vit, text_encoder, adapter=adapter, **options)
    return plan_tune(vit, as_method(method, options), text_encoder, adapter, images=images).install()


@dataclass(frozen=True)
class TunePlan:
    """A checked plan of what a method changes in a ViT.

    Attributes:
        method: The method.
        tower: The ViT, as it is.
        change: What is going to change.
        text_encoder: The text encoder of a method that needs text.
        saved: Weights to start from; None starts as the method does.
    """

    method: Method
    tower: Tower
    change: Change
    text_encoder: TextEncoder | None = None
    saved: SavedMethod | None = None

    @property
    def null_text(self) -> bool:
        """Whether rows without an instruction have a trained text."""
        return False

    @property
    def needs_text(self) -> bool:
        """Whether a call without text is an error."""
        return self.method.needs_text

    def install(self) -> TunedViT:
        """Change the ViT.

        Raises:
            CheckpointError: If the saved weights do not fit; the ViT is then as it was.
        """
        tuned = install(self.method, self.tower, self.change, self.text_encoder)
        if self.saved is not None:
            try:
                self.saved.fill(tuned)
            except BaseException:
                untune(tuned)
                raise
        return tuned


def plan_tune(
    vit: nn.Module,
    method: Method,
    text_encoder: Any,
    adapter: Adapter | None,
    read: Any = None,
    *,
    images: Any = None,
    connector: Mapping[str, nn.Module] | None = None,
) -> TunePlan:
    """Check everything that a method needs, and start what it adds; nothing of the ViT is changed.

    Args:
        vit: The ViT.
        method: The method.
        text_encoder: As for `tune`.
        adapter: How the ViT is built.
        read: The hidden state that a multimodal LLM reads, or several; None for the ViT's output.
        images: As for `tune`.
        connector: What is between the ViT and the language model of a multimodal LLM, as for `Tower`.

    Raises:
        CoVFTError: As `tune` does.
    """
    plan = _plan(vit, method, text_encoder, adapter, read, connector)
    method.initialise(plan.tower, plan.change, images)
    return plan


def _plan(
    vit: nn.Module,
    method: Method,
    text_encoder: Any,
    adapter: Adapter | None,
    read: Any,
    connector: Mapping[str, nn.Module] | None,
) -> TunePlan:
    check_vit(vit)
    check_text_weights(text_encoder)
    spec = describe(vit, adapter)
    pretrained.check(vit)
    encoder = None
    if method.needs_text and text_encoder is not None:
        with unpartitioned():
            encoder = as_text_encoder(text_encoder)
    text_dim = None if encoder is None else encoder.text_dim
    tower = Tower(vit, spec, last_of(spec, read), read is not None, text_dim, connector or {})
    return TunePlan(method, tower, method.plan(tower), encoder)


def plan_load(
    saved: SavedMethod,
    vit: nn.Module | None,
    text_encoder: Any,
    adapter: Adapter | None,
    read: Any = None,
    connector: Mapping[str, nn.Module] | None = None,
) -> TunePlan:
    """Check everything that `load` of a tuned ViT needs; nothing of the ViT is changed.

    Args:
        saved: What was read of the folder.
        vit: The base ViT; None builds it from the id that was saved.
        text_encoder: As for `load`.
        adapter: How the ViT is built.
        read: As for `plan_tune`.
        connector: As for `plan_tune`.

    Raises:
        CoVFTError: As `load` does.
    """
    vit = saved.build_vit() if vit is None else vit
    check_vit(vit)
    saved.check_base(vit)
    texts = saved.build_text_encoder() if text_encoder is None else text_encoder
    return dataclasses.replace(_plan(vit, saved.method, texts, adapter, read, connector), saved=saved)


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
            added={**change.added, BATCH_NORMS: keeper},
            hooks=(*change.hooks, Hook("", keeper.keep, before=True)),
        )
    before = apply(tower.vit, change)
    tower.vit.__dict__[MARK] = method.name
    tuned = TunedViT(tower.vit, method, tower.spec, change, before, text_encoder)
    pretrained.install(tuned)
    return tuned


def as_method(method: str | Method, options: dict[str, Any]) -> Method:
    """Return a method by its name and options, or one that has its options already.

    Raises:
        ConfigError: If it is not known, or an option cannot work.
    """
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
    pretrained.remove(vit)
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
    return plan_load(saved, vit, text_encoder, adapter).install()

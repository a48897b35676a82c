"""wrap(), unwrap() and load(): check everything, then change the ViT."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Unpack

from covft.adapters.registry import describe
from covft.adapters.spec import Adapter, ViTSpec
from covft.checkpoints import pretrained
from covft.checkpoints.loading import SavedEncoder
from covft.conditioning import Conditioning
from covft.config import CoVFTConfig, Settings, show_settings
from covft.encoder import ContextEncoder
from covft.errors import UnsupportedViTError
from covft.surgery.attention import add_updates, attention_layers, expected_updates, remove_updates
from covft.surgery.checks import (
    check_not_distributed,
    check_null_text,
    check_restorable,
    check_text_dim,
    check_text_weights,
    check_vit,
    check_weights,
    resolve_layers,
)
from covft.surgery.ffns import build_slots, expected_tensors, install_slots, restore_ffns
from covft.surgery.frozen import FrozenWatch
from covft.surgery.precision import remove_wide_norms
from covft.surgery.skipping import check_read, last_of, last_read, run_all_blocks, skip_blocks
from covft.text import TextEncoder, as_text_encoder
from covft.utils.arguments import check_kinds
from covft.utils.sharding import in_engine, is_partitioned, unpartitioned
from covft.utils.torch_internals import is_hooked_by, remove_hooks

ALONE: Any = object()  # stands for a ViT that no model reads


@dataclass(frozen=True)
class WrapPlan:
    """A checked plan of what to change in a ViT.

    Attributes:
        vit: The ViT, as it is.
        spec: What is known of it.
        config: The settings, with `layers` resolved.
        text_encoder: The text encoder; None where none is needed.
        attention: Paths of the linear layers that get updates.
        saved: Weights to start from; None starts from the pretrained FFNs.
    """

    vit: nn.Module
    spec: ViTSpec
    config: CoVFTConfig
    text_encoder: TextEncoder | None
    attention: list[str]
    saved: SavedEncoder | None = None

    def install(self) -> ContextEncoder:
        """Change the ViT.

        Raises:
            CheckpointError: If the saved weights do not fit; the ViT is then as it was.
        """
        vit, spec, config = self.vit, self.spec, self.config
        conditioning = self._conditioning()
        slots = build_slots(vit, spec, self._built, conditioning, self._text_dim)
        # From here on nothing can fail, in what is foreseen.
        original = install_slots(vit, spec, slots, config.train_norms)
        if config.attention_rank is not None:
            add_updates(vit, self.attention, config.attention_rank)
        skip_blocks(vit, spec, last_read(spec, config.feature_layer))
        vit.register_forward_pre_hook(conditioning.enter_tower, with_kwargs=True)
        vit.register_forward_hook(conditioning.leave_tower, always_call=True)
        encoder = ContextEncoder(vit, self.text_encoder, config, spec, conditioning, original)
        vit.register_forward_pre_hook(FrozenWatch(encoder).check)
        pretrained.install(encoder)
        if self.saved is not None:
            try:
                self.saved.fill(encoder)
            except BaseException:
                unwrap(encoder)
                raise
        return encoder

    @property
    def null_text(self) -> bool:
        """Whether rows without an instruction have a trained text."""
        return self.config.null_text

    @property
    def needs_text(self) -> bool:
        """Whether a call without text is an error."""
        return self.config.needs_text

    def check_saved(self) -> None:
        """Refuse saved weights that do not fit, before anything of their size is built.

        Raises:
            CheckpointError: If tensors are missing, unexpected, or of another shape or kind of number.
        """
        assert self.saved is not None
        wanted = expected_tensors(self.vit, self.spec, self._built, self._conditioning(), self._text_dim)
        if self.config.attention_rank is not None:
            wanted.update(expected_updates(self.vit, self.attention, self.config.attention_rank))
        slots = tuple(f"{self.spec.blocks[layer].mlp_path}." for layer in self.config.layers or ())
        state = {n: t for n, t in self.vit.state_dict(keep_vars=True).items() if not n.startswith(slots)}
        self.saved.check_tensors(self.vit, wanted, state)

    @property
    def _built(self) -> CoVFTConfig:
        """The settings to build with: saved weights replace any start."""
        return self.config if self.saved is None else self.config.replace(expert_init="upcycled")

    @property
    def _text_dim(self) -> int | None:
        return None if self.text_encoder is None else self.text_encoder.text_dim

    def _conditioning(self) -> Conditioning:
        return Conditioning(
            self.spec.input,
            needs_text=self.config.needs_text,
            has_null_text=self.config.null_text,
            draws_seeds=self.config.routing == "random",
            has_batch_norm=any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.vit.modules()),
        )


def plan_wrap(
    vit: nn.Module,
    text_encoder: Any,
    config: CoVFTConfig | None,
    adapter: Adapter | None,
    settings: Settings,
    read: Any = ALONE,
) -> WrapPlan:
    """Check everything that `wrap` needs; nothing of the ViT is changed.

    Args:
        vit: As for `wrap`, and so are the others.
        text_encoder: The text encoder.
        config: Settings to start from.
        adapter: How the ViT is built.
        settings: Fields that override `config`.
        read: The hidden state that a model reads of the ViT, or several, None being the last; `ALONE` for a ViT alone.

    Raises:
        CoVFTError: As `wrap` does.
    """
    check_vit(vit)
    chosen = (config or CoVFTConfig()).replace(**settings)
    spec = describe(vit, adapter)
    if read is not ALONE:
        check_read(spec, chosen.feature_layer, read)
    last = last_read(spec, chosen.feature_layer) if read is ALONE else last_of(spec, read)
    layers = resolve_layers(chosen.layers, spec, last)
    check_weights(vit, spec, layers)
    check_text_weights(text_encoder)
    with unpartitioned():
        texts = None if text_encoder is None else as_text_encoder(text_encoder)
    check_text_dim(chosen, None if texts is None else texts.text_dim)
    check_null_text(vit, chosen)
    pretrained.check(vit)
    attention = [] if chosen.attention_rank is None else attention_layers(vit, spec, layers)
    return WrapPlan(vit, spec, dataclasses.replace(chosen, layers=layers), texts, attention)


def plan_load(
    folder_or_repo_id: str | Path, vit: nn.Module | None, text_encoder: Any, adapter: Adapter | None = None
) -> WrapPlan:
    """Check everything that `load` needs; nothing of the ViT is changed.

    Args:
        folder_or_repo_id: As for `load`, and so are the others.
        vit: The base ViT.
        text_encoder: The text encoder.
        adapter: How the ViT is built.

    Raises:
        CoVFTError: As `load` does.
    """
    saved = SavedEncoder.read(folder_or_repo_id)
    vit = saved.build_vit() if vit is None else vit
    check_vit(vit)
    saved.check_base(vit)
    texts = saved.build_text_encoder() if text_encoder is None else text_encoder
    plan = dataclasses.replace(plan_wrap(vit, texts, saved.config, adapter, {}), saved=saved)
    plan.check_saved()
    return plan


@check_kinds
@show_settings
def wrap(
    vit: nn.Module,
    text_encoder: Any = None,
    *,
    config: CoVFTConfig | None = None,
    adapter: Adapter | None = None,
    **settings: Unpack[Settings],
) -> ContextEncoder:
    """Make a ViT context-aware, in place.

    In every adapted block the FFN is replaced by a mixture of copies of it, weighted by what the image and the text
    say. All else of the ViT is frozen, except for norms. In eval mode no output changes at the start, unless
    `expert_init` asks for a start that keeps experts apart.

    Args:
        vit: A vision transformer of timm, open_clip, transformers, or one that `adapter` knows.
        text_encoder: A model id or folder; a loaded Hugging Face, sentence-transformers or open_clip text model; a
            callable `list[str] -> (S, C)`; or an int C if the caller brings features. May be None where the routing
            does not need text. It is frozen and never saved.
        config: Settings to start from.
        adapter: How the ViT is built, if no registered adapter knows it.
        **settings: Fields of `CoVFTConfig`, such as `layers`, `experts` and `routing`; each one that is given overrides
            the field of `config`.

    Returns:
        The encoder. The ViT inside it is `vit`, changed.

    Raises:
        ConfigError: If a setting cannot work.
        LayerIndexError: If `layers` asks for blocks that the ViT does not have.
        TextEncoderError: If the text encoder cannot be used.
        UnknownViTError: If no adapter knows the ViT.
        UnsupportedViTError: If the ViT is wrapped already, or in DDP, FSDP or torch.compile.

    Example:
        >>> import timm
        >>> encoder = wrap(timm.create_model("test_vit"), 32, layers=range(2, 5))
        >>> encoder(torch.rand(1, 3, 160, 160), torch.rand(1, 32)).shape
        torch.Size([1, 1000])
    """
    return plan_wrap(vit, text_encoder, config, adapter, settings).install()


@check_kinds
def load(
    folder_or_repo_id: str | Path,
    vit: nn.Module | None = None,
    text_encoder: Any = None,
    *,
    adapter: Adapter | None = None,
) -> ContextEncoder:
    """Load a saved encoder: wrap the base ViT again and fill in the trained weights.

    Args:
        folder_or_repo_id: A folder that `save_pretrained` wrote, or a repository of the Hugging Face Hub.
        vit: The base ViT, changed in place; None builds it from the id that was saved.
        text_encoder: The text encoder; None builds it from the id that was saved.
        adapter: How the ViT is built, if no registered adapter knows it.

    Returns:
        The encoder, with the outputs of the one that was saved.

    Raises:
        CheckpointError: If the folder is incomplete or damaged, if it was made for other base weights, or if tensors
            are missing, unexpected or of another shape; the ViT is then as it was.

    Example:
        >>> encoder = load("runs/covft", vit=vit, text_encoder=bert)  # doctest: +SKIP
    """
    return plan_load(folder_or_repo_id, vit, text_encoder, adapter).install()


def unwrap(encoder: ContextEncoder) -> nn.Module:
    """Restore the ViT as it was before `wrap`, bit for bit, in place.

    FFNs, norms, hooks and `requires_grad` are as they were; the adapted weights are dropped. If the encoder was moved
    or cast, the ViT has the device and type of the encoder. Other parameters that the caller trained keep their
    values. Adapters that peft has put into the ViT since stay, and so does what peft has frozen.

    Args:
        encoder: What `wrap` returned.

    Returns:
        The ViT.

    Raises:
        UnsupportedViTError: If the encoder is unwrapped already, or is not an encoder, or if other code has replaced
            what `wrap` put there or renumbered the blocks; nothing is changed then.
    """
    check_unwrap(encoder)
    vit, conditioning = encoder.vit, encoder.conditioning
    encoder.strength = 1.0
    remove_hooks(vit, lambda owner: owner is conditioning or isinstance(owner, FrozenWatch))
    run_all_blocks(vit)
    pretrained.remove(vit)
    remove_wide_norms(vit)
    remove_updates(vit)
    restore_ffns(vit, encoder.original)
    if conditioning.has_batch_norm:
        for module in vit.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = vit.training  # which the slots and the tower had switched off
    return vit


def check_unwrap(encoder: ContextEncoder, purpose: str = "unwrap()") -> None:
    """Refuse an encoder whose ViT cannot be restored; nothing is changed.

    Args:
        encoder: What `wrap` returned.
        purpose: What was asked for, as the subject of a sentence.

    Raises:
        UnsupportedViTError: As `unwrap` does.
    """
    if not isinstance(encoder, ContextEncoder):
        raise UnsupportedViTError(
            f"{type(encoder).__name__} is not what covft.wrap returned.", expected="a ContextEncoder"
        )
    vit, conditioning = encoder.vit, encoder.conditioning
    if not is_hooked_by(vit, conditioning):
        raise UnsupportedViTError("This encoder is unwrapped already.", fix="covft.wrap(vit, text_encoder)")
    engine = in_engine(vit) and any(is_partitioned(parameter) for parameter in vit.parameters())
    check_not_distributed(vit, engine, "build the ViT anew from its source")
    check_restorable(vit, encoder.original)
    encoder.check_in_place(purpose)

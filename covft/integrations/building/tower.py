"""A ViT of timm or open_clip as a vision tower of transformers, for LLaVA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from covft.adapters.registry import describe
from covft.adapters.sources import load_vit, source_of
from covft.errors import UnsupportedViTError
from covft.utils.extras import import_library
from covft.utils.modes import in_eval_mode
from covft.utils.sources import split_values

_transformers: Any = import_library("transformers", "transformers", needed_by="ViTTower")
_BaseModelOutput: Any = import_library(
    "transformers.modeling_outputs", "transformers", needed_by="ViTTower"
).BaseModelOutput

LIBRARIES = ("timm", "open_clip")
# Options in the source of a saved tower: sizes and parts of the ViT. None of them names a file or an address.
OPTIONS = frozenset(
    (
        *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "global_pool"),
        *("class_token", "reg_tokens", "init_values", "qkv_bias", "dynamic_img_size", "no_embed_class"),
        *("force_image_size", "force_quick_gelu"),
    )
)


class ViTTowerConfig(_transformers.PretrainedConfig):
    """The config of a `ViTTower`: from what its ViT is built, and what a multimodal LLM has to know of it.

    Attributes:
        source: As for `covft.adapters.sources.load_vit`: `"timm:NAME?options"` or `"open_clip:NAME?options"`.
        hidden_size: Width of the tokens.
        num_hidden_layers: Number of blocks.
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch, in pixels.
        image_mean: Mean of the three colours in the ViT's training.
        image_std: Their standard deviation.
    """

    model_type = "covft_vit"

    def __init__(
        self,
        source: str = "timm:vit_base_patch16_224",
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        image_size: int = 224,
        patch_size: int = 16,
        image_mean: Any = (0.5, 0.5, 0.5),
        image_std: Any = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        self.source = source
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.image_size, self.patch_size = image_size, patch_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        super().__init__(**kwargs)


class ViTTower(_transformers.PreTrainedModel):
    """A ViT of timm or open_clip, called as transformers calls a vision tower.

    Its hidden states are the patches after each block, without class token and registers, before the final norm:
    `hidden_states[-2]` is what the last block but one returns. The embeddings, `hidden_states[0]`, are left out (None).
    `covft.load_model` loads models with it; for `from_pretrained` of transformers, import this class first.
    """

    config_class = ViTTowerConfig
    base_model_prefix = "vit_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ViTTower"]  # noqa: RUF012  as transformers declares it
    supports_gradient_checkpointing = True
    # The ViT dispatches its attention itself, so that every choice for the language model is fine.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ViTTowerConfig) -> None:
        super().__init__(config)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # constants such as rotary angles are rounded once, at the end
        try:
            self.vit = build_vit(config.source).to(dtype)
        finally:
            torch.set_default_dtype(dtype)
        self._constants = {name: value.clone() for name, value in _unsaved(self.vit).items()}
        self._checkpointing = False
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: Any = None, return_dict: bool | None = None, **kwargs: Any
    ) -> Any:
        """Encode images.

        Args:
            pixel_values: Shape `(B, 3, H, W)`.
            output_hidden_states: Whether to return the hidden states; an index, or several, count as yes.
            return_dict: Whether to return an output of transformers; None means yes.
            **kwargs: Ignored; they are for other towers.

        Returns:
            `last_hidden_state`, shape `(B, patches, hidden_size)`, and `hidden_states`, with None for the embeddings.
        """
        states = patch_states(self.vit, pixel_values.to(self.dtype))
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = _BaseModelOutput(
            last_hidden_state=states[-1], hidden_states=None if asked is False else (None, *states)
        )
        return output.to_tuple() if return_dict is False else output

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the blocks recompute their activations; transformers sets it."""
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.vit.set_grad_checkpointing(enable)  # type: ignore[operator]
        self._checkpointing = enable

    def unread(self) -> list[str]:
        """Return the names of the parameters that no hidden state depends on: the final norm, pooling and heads."""
        names = [name for name, _ in self.named_parameters()]
        last = f"{describe(self).blocks[-1].path}."
        end = max(number for number, name in enumerate(names) if name.startswith(last))
        return [*names[end + 1 :], *(name for name in names[:end] if name == "vit.proj")]  # the latter: open_clip's

    def get_input_embeddings(self) -> None:
        """Return nothing: a ViT has no embeddings of tokens."""
        return

    def _init_weights(self, module: nn.Module) -> None:
        """Restore what is not saved; the ViT has initialised its weights itself."""
        for name, value in _unsaved(self.vit).items():
            if name in self._constants and self.vit.get_submodule(name.rpartition(".")[0]) is module:
                value.copy_(self._constants[name])


def vit_tower(source: str, vit: nn.Module | None = None, *, pretrained: bool = True) -> ViTTower:
    """Make a vision tower of transformers from a ViT of timm or open_clip.

    Args:
        source: As for `covft.adapters.sources.load_vit`: `"timm:NAME"` or `"open_clip:NAME/TAG"`; options may
            follow. A saved model builds its tower by this name.
        vit: The ViT, if it is loaded already; it is not copied. None loads it.
        pretrained: Whether to load the ViT's weights.

    Raises:
        UnknownViTError: If there is no such ViT, or it cannot be fetched.
        UnsupportedViTError: If its tokens are not a square grid of one width, or `source` builds another ViT.

    Example:
        >>> vit_tower("timm:test_vit", pretrained=False).config.hidden_size
        64
    """
    _check_source(source)
    vit = load_vit(source, pretrained) if vit is None else vit
    spec, inner = describe(vit), getattr(vit, "trunk", vit)
    reason = None
    if spec.input.is_packed or spec.input.mask_argument:
        reason = "it takes images of any shape as patches with a mask, which LLaVA does not pass"
    elif not hasattr(inner, "forward_intermediates"):
        reason = "it does not return the tokens after each block (forward_intermediates)"
    elif len({block.embed_dim for block in spec.blocks}) > 1 or {block.layout for block in spec.blocks} != {"BND"}:
        reason = "its blocks are not of one width, or not on one sequence of tokens"
    elif len({block.path for block in spec.blocks}) != spec.depth:
        reason = "its blocks have several FFNs"
    elif spec.image_size is None or spec.input.prefix_tokens is None:
        reason = "its image size, or the number of tokens before the patches, is unknown"
    if reason is not None:
        raise _unsupported(vit, reason)
    size = spec.image_size or 0
    config = ViTTowerConfig(source, spec.blocks[0].embed_dim, spec.depth, size, **image_settings(source, vit))
    _check_rebuilt(source, vit)
    patches = _count_patches(vit, config)
    side = math.isqrt(patches)
    if side * side != patches or size % side:
        raise _unsupported(vit, f"{size} x {size} pixels give {patches} patches, which are not a square grid")
    config.patch_size = size // side
    tower = ViTTower(config)
    tower.vit = vit
    return tower.train(vit.training)


def as_tower(vit: nn.Module) -> nn.Module:
    """Return a loaded ViT as a tower of transformers; one of transformers as it is.

    Args:
        vit: A ViT of timm, open_clip or transformers (`TimmWrapperModel` too, whose ViT is taken out).

    Raises:
        UnsupportedViTError: If it cannot be built again from a name.
    """
    if type(vit).__name__ == "TimmWrapperModel":
        wrapper: Any = vit
        options = {"num_classes": 0, **(wrapper.config.model_args or {})}
        written = "&".join(f"{name}={value}" for name, value in sorted(options.items()))
        return vit_tower(f"timm:{wrapper.config.architecture}?{written}", wrapper.timm_model)
    if isinstance(vit, _transformers.PreTrainedModel):
        return vit
    source = source_of(vit)
    if source is None:
        raise UnsupportedViTError(
            f"A saved model could not build this {type(vit).__name__} again: it does not know its name.",
            expected="a ViT of transformers, or of timm or open_clip with a name",
            got=type(vit).__name__,
            fix='vit_tower("open_clip:NAME/TAG", vit), with the name that it was created by',
        )
    return vit_tower(source, vit)


def is_source(vision: Any) -> bool:
    """Return whether this names a ViT of timm or open_clip, as `load_vit` takes it."""
    return isinstance(vision, str) and vision.partition(":")[0] in LIBRARIES


def with_image_size(source: str, image_size: int | None) -> str:
    """Return the source with the option that sets the image size, if one is given."""
    if image_size is None:
        return source
    option = "img_size" if source.startswith("timm:") else "force_image_size"
    return f"{source}{'&' if '?' in source else '?'}{option}={image_size}"


def image_settings(source: str, vit: Any) -> dict[str, Any]:
    """Return the mean and the standard deviation of colours that a ViT was trained with."""
    inner = getattr(vit, "trunk", vit)
    found = dict(getattr(inner, "pretrained_cfg", None) or {})
    if source.startswith("open_clip:"):
        library = import_library("open_clip", "open-clip", needed_by="This ViT")
        name, _, tag = split_values(source.partition(":")[2])[0].partition("/")
        found = {"mean": library.OPENAI_DATASET_MEAN, "std": library.OPENAI_DATASET_STD}
        found |= library.get_pretrained_cfg(name, tag) or {} if tag else {}
    return {f"image_{name}": list(found[name]) for name in ("mean", "std") if found.get(name)}


def image_processor_of(source: Any, image_size: int | None = None) -> Any:
    """Return an image processor that resizes, crops and normalises as a ViT of timm or open_clip was trained.

    Args:
        source: As for `vit_tower`, or a `ViTTower`.
        image_size: Height and width in pixels; None takes those of the ViT.
    """
    if isinstance(source, ViTTower):
        settings = {"image_mean": source.config.image_mean, "image_std": source.config.image_std}
        size = image_size or source.config.image_size
    else:
        _check_source(source)
        vit = load_vit(source, pretrained=False, device="meta")
        settings, size = image_settings(source, vit), image_size or describe(vit).image_size or 224
    square = {"height": size, "width": size}
    return _transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, **settings)


def of_timm(data_config: dict[str, Any], image_size: int | None) -> Any:
    """Return an image processor with the settings of timm's data config, for what is built from a TimmWrapperModel."""
    size = image_size or data_config["input_size"][-1]
    square = {"height": size, "width": size}
    colours = {"image_mean": list(data_config["mean"]), "image_std": list(data_config["std"])}
    return _transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, **colours)


def build_vit(source: str) -> nn.Module:
    """Build the ViT of a saved tower with random weights; what its file may ask for is limited."""
    _check_source(source)
    return load_vit(source, pretrained=False)


def patch_states(vit: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """Return the patches after each block, each of shape `(B, patches, D)`.

    Args:
        vit: A ViT of timm or open_clip.
        pixel_values: Shape `(B, 3, H, W)`.
    """
    inner: Any = getattr(vit, "trunk", vit)  # of open_clip's model around one of timm
    found = inner.forward_intermediates(pixel_values, output_fmt="NLC", intermediates_only=True)
    return found["image_intermediates"] if isinstance(found, dict) else list(found)


def _unsaved(vit: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are not in the state dict, by name."""
    return {
        f"{path}.{name}" if path else name: module._buffers[name]
        for path, module in vit.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(name) is not None
    }  # type: ignore[return-value]


def _check_source(source: Any) -> None:
    """Refuse a source that is not a known name with plain options: no file, no address, no repository."""
    kind, _, rest = str(source).partition(":")
    name, options = split_values(rest)
    wrong = [
        key
        for key, value in options.items()
        if key not in OPTIONS
        or not (isinstance(value, int | float) or value in ("", "avg", "token", "map") or _is_pair(value))
    ]
    if kind not in LIBRARIES or not name or ":" in name or name.startswith(("/", ".")) or wrong:
        raise UnsupportedViTError(
            "This is not a source from which a tower can be built.",
            expected=f"timm:NAME or open_clip:NAME/TAG, with options of {', '.join(sorted(OPTIONS))}",
            got=f"{str(source)[:100]!r}{'; ' + ', '.join(wrong) if wrong else ''}",
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(item, int) for item in value)


def _check_rebuilt(source: str, vit: nn.Module) -> None:
    """Refuse a ViT that its source would build otherwise."""
    again = load_vit(source, pretrained=False, device="meta")

    def parts(model: nn.Module) -> dict[str, Any]:
        classes: dict[str, Any] = {name: type(module).__name__ for name, module in model.named_modules()}
        return {**classes, **{name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}}

    ours, theirs = parts(vit), parts(again)
    apart = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if apart:
        raise UnsupportedViTError(
            f"A saved model would build another ViT from {source!r}.",
            expected=f"{apart[0]}: {ours.get(apart[0], 'nothing')}",
            got=f"{apart[0]}: {theirs.get(apart[0], 'nothing')}",
            fix='vit_tower("timm:NAME?embed_dim=...&depth=...", vit), with the options that it was created with',
        )


def _count_patches(vit: nn.Module, config: ViTTowerConfig) -> int:
    """Run the ViT once, and return the number of its patches."""
    weight = next(vit.parameters())
    image = torch.zeros(1, 3, config.image_size, config.image_size, device=weight.device, dtype=weight.dtype)
    try:
        with in_eval_mode(vit), torch.no_grad():
            states = patch_states(vit, image)
    except (TypeError, AttributeError, AssertionError, RuntimeError, ValueError) as error:
        raise _unsupported(vit, f"it cannot be run for the tokens after each block ({error})") from error
    if len(states) != config.num_hidden_layers or any(s.dim() != 3 or s.shape[2] != config.hidden_size for s in states):
        raise _unsupported(vit, "it does not return one sequence of tokens per block")
    return states[0].shape[1]


def _unsupported(vit: nn.Module, reason: str) -> UnsupportedViTError:
    return UnsupportedViTError(
        f"{type(vit).__name__} cannot be the tower of a LLaVA: {reason}.",
        expected="a plain ViT for images of one size: timm:vit_base_patch16_dinov3, open_clip:ViT-L-14/openai, ...",
        got=type(vit).__name__,
    )


_transformers.AutoConfig.register(ViTTowerConfig.model_type, ViTTowerConfig, exist_ok=True)
_transformers.AutoModel.register(ViTTowerConfig, ViTTower, exist_ok=True)

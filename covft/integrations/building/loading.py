"""Loads the parts of a multimodal LLM that are not its tower: language model and image processor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from covft.adapters.huggingface import tower_config
from covft.errors import CheckpointError, ConfigError
from covft.utils.arguments import check_kinds
from covft.utils.sharding import unpartitioned

# Settings of what follows the head in some language models; LLaVA and InternVL have only the head.
_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Have `from_pretrained` load all weights on every process while this is open.

    Under ZeRO-3 it gives each process a shard of them, and under FSDP all but one process nothing. That is fine for a
    model that is trained as it was saved, but parts have to be read to be joined, and embeddings to grow. The joined
    model is still sharded when training starts.
    """
    efficient = os.environ.get(_EFFICIENT)
    if efficient is not None:
        os.environ[_EFFICIENT] = "false"
    try:
        with unpartitioned():
            yield
    finally:
        if efficient is not None:
            os.environ[_EFFICIENT] = efficient


def load_language_model(
    source: Any, *, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> Any:
    """Load a causal language model of transformers, and check that it can follow a tower.

    Args:
        source: An id or folder; a loaded model is checked and returned.
        dtype: Of the weights; None keeps that of the saved weights.
        attn_implementation: Such as `"sdpa"` or `"flash_attention_2"`; None leaves the choice to transformers.

    Raises:
        ConfigError: If it cannot be fetched, or its logits are not the output of a linear head without bias.
        CheckpointError: If a weight is missing.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(source, nn.Module):
        model: Any = source
    else:
        name, options = os.fspath(source), {"attn_implementation": attn_implementation} if attn_implementation else {}
        with _reported("language model", name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype or "auto", output_loading_info=True, trust_remote_code=False, **options
            )
        model, info = loaded
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise CheckpointError(
                f"{name} lacks weights of a {type(model).__name__}.",
                expected="all of its tensors",
                got=f"without {', '.join(missing[:4])}{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}",
            )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} is not a language model with a head.",
            expected="a causal language model, such as LlamaForCausalLM",
            got=type(model).__name__,
            fix="AutoModelForCausalLM.from_pretrained(...)",
        )
    more = [key for key in _AFTER_THE_HEAD if getattr(model.config, key, None) not in (None, 1, 1.0)]
    more += ["a bias of the head"] if head.bias is not None else []
    if more:
        raise ConfigError(
            f"The logits of {type(model).__name__} are not the output of its head alone.",
            expected="a language model such as Llama, Qwen2 or Phi-3",
            got=", ".join(more),
        )
    return model


@check_kinds
def load_image_processor(source: str | os.PathLike[str] | nn.Module, image_size: int | None = None) -> Any:
    """Load the image processor of a tower, set to the image size that the tower takes.

    Args:
        source: Id or folder of the tower; `timm:NAME` or `open_clip:NAME/TAG`; or a `ViTTower`.
        image_size: Height and width in pixels; None takes those of the tower's config, from which the saved processor
            may differ (DINOv2's does).

    Raises:
        ConfigError: If there is none.
    """
    from transformers import AutoImageProcessor

    from covft.integrations.building.tower import image_processor_of, is_source, of_timm

    if is_source(source) or isinstance(source, nn.Module):
        return image_processor_of(source, image_size)
    name = os.fspath(source)
    with _reported("image processor", name):
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        if type(processor).__name__ == "TimmWrapperImageProcessor":
            return of_timm(processor.data_config, image_size)
        if image_size is None:
            own = getattr(tower_config(name)[0], "image_size", None)
            image_size = own[0] if isinstance(own, (list, tuple)) else own
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        crops = getattr(processor, "do_center_crop", None) and getattr(processor, "crop_size", None) is not None
        processor.size = {"shortest_edge": image_size} if crops else square
        if crops:
            processor.crop_size = square
    return processor


@contextlib.contextmanager
def _reported(what: str, name: str) -> Iterator[None]:
    """Turn what transformers raises for parts that cannot be loaded into an error that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"The {what} {name!r} cannot be loaded.",
            expected="an id or a folder of a model that this transformers knows",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
            fix=f"`hf download {name}` where there is a network (then HF_HUB_OFFLINE=1), or a local folder",
        ) from error

"""The loss of samples: of a multimodal LLM its own, of a ViT the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from covft.adapters.registry import describe
from covft.adapters.spec import Adapter, ViTSpec
from covft.data import Collator, ConversationDataset
from covft.errors import ConfigError
from covft.integrations.mllm.attachment import attachment_of, without_peft
from covft.integrations.mllm.families import find_tower
from covft.integrations.tuning.tune import is_mllm
from covft.surgery.adapted import AdaptedViT

Loss = Callable[[list[Any]], Tensor]
_FOR_THE_TOWER = ("context_text", "context_index", "image_flags", "num_tiles")


def tower_of(model: nn.Module, adapter: Adapter | None) -> tuple[nn.Module, ViTSpec]:
    """Return the tower of a multimodal LLM, of a wrapped or tuned ViT, or the ViT itself, and its description.

    Raises:
        CoVFTError: If there is none, or no adapter knows it.
    """
    if isinstance(model, AdaptedViT):
        return model.vit, model.spec
    if not is_mllm(model):
        return model, describe(model, adapter)
    attachment = attachment_of(without_peft(model))
    if attachment is not None:
        return attachment.encoder.vit, attachment.encoder.spec
    tower, _ = find_tower(without_peft(model), adapter)
    return tower, describe(tower, adapter)


def loss_of(
    model: nn.Module, loss: Callable[[Any, list[Any]], Tensor] | None, data: Iterable[Any] | Dataset[Any]
) -> Loss:
    """Return the loss of a list of samples.

    Args:
        model: The model.
        loss: The user's; None takes that of a multimodal LLM.
        data: What the samples are from.

    Raises:
        ConfigError: If there is none.
    """
    if loss is not None:
        given = loss
        return lambda samples: given(model, samples)
    if not is_mllm(model):
        raise ConfigError(
            "A ViT alone has no loss.",
            expected="loss(model, samples), the mean loss of a list of entries of the data",
            fix="covft.diagnose(vit, data, loss=lambda vit, samples: ...), or a multimodal LLM",
        )
    return lambda samples: torch.stack([_loss_of(model, one) for one in batches_of(samples, data)]).mean()


def batches_of(samples: Sequence[Any], data: Iterable[Any] | Dataset[Any]) -> list[Mapping[str, Any]]:
    """Return samples as batches of a multimodal LLM: those of a data set as one, batches as they are.

    Args:
        samples: Samples of a `ConversationDataset`, or batches of the model.
        data: What they are from.

    Raises:
        ConfigError: If they have no labels.
    """
    if isinstance(data, ConversationDataset):
        pad = data.tokenizer.pad_token_id
        return [Collator(data.tokenizer.eos_token_id if pad is None else pad, data.image_shape)(samples)]
    for entry in samples:
        if not isinstance(entry, Mapping) or "labels" not in entry:
            raise ConfigError(
                "An entry of the data has no labels, so the language model has no loss.",
                expected="a batch of the model with labels, or a ConversationDataset",
                got=", ".join(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__,
                fix="covft.diagnose(model, data, loss=lambda model, samples: ...)",
            )
    return list(samples)


def inputs_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a multimodal LLM, on its device and in its type.

    Args:
        model: The model.
        batch: A batch.
    """
    without = {"kind", "row"} | (set() if attachment_of(without_peft(model)) is not None else set(_FOR_THE_TOWER))
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return {name: _moved(value, like) for name, value in batch.items() if name not in without}


def _loss_of(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model(**inputs_of(model, batch)).loss


def _moved(value: Any, like: Tensor) -> Any:
    if not torch.is_tensor(value):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)

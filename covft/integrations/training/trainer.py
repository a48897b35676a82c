"""MLLMTrainer: transformers' Trainer for multimodal LLMs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from covft.checkpoints.pretrained import MARK, prefix_of
from covft.data.collator import Collator
from covft.data.dataset import ConversationDataset
from covft.data.grouping import ModalityGroupedSampler
from covft.errors import ConfigError
from covft.integrations.mllm.attachment import attachment_of, without_peft
from covft.integrations.mllm.dummies import without_dummies
from covft.integrations.mllm.families import base_of
from covft.integrations.training.callback import CoVFTCallback, SealCallback
from covft.integrations.training.checkpoints import check_checkpoint, checkpoint_folder, last_checkpoint, unseal
from covft.integrations.training.parts import param_groups
from covft.integrations.training.reentrant import without_reentrant
from covft.integrations.training.resuming import check_resumed
from covft.utils.arguments import check_kinds
from covft.utils.extras import import_library
from covft.utils.transformers_names import check_trainer

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments
else:
    _transformers = import_library("transformers", "train", needed_by="MLLMTrainer")
    check_trainer()
    Trainer, TrainingArguments = _transformers.Trainer, _transformers.TrainingArguments

# The collator's columns for the tower, which models that are not attached do not take.
_FOR_THE_TOWER = ("context_text", "context_index", "image_flags", "num_tiles")


@dataclass
class MLLMTrainingArguments(TrainingArguments):
    """Adds to transformers' arguments a learning rate for each part, a global batch size and an order of the data.

    Attributes:
        global_batch_size: Rows per optimizer step over all processes; sets `gradient_accumulation_steps`.
        experts_lr: Learning rate of the experts; None takes `learning_rate`, here and below.
        router_lr: Learning rate of routers and contexts.
        norms_lr: Learning rate of the tower's norms.
        vision_lr: Learning rate of the rest of the tower.
        projector_lr: Learning rate of the projector.
        group_by_modality_length: Whether to batch rows with images and rows without separately, by similar length.

    Raises:
        ConfigError: If the global batch cannot be divided evenly among the processes, or a rate cannot be used.
        ReentrantCheckpointError: If activation checkpointing is to be of the reentrant kind.
    """

    global_batch_size: int | None = field(default=None, metadata={"help": "Rows per step over all processes."})
    experts_lr: float | None = field(default=None, metadata={"help": "Learning rate of the experts."})
    router_lr: float | None = field(default=None, metadata={"help": "Learning rate of routers and contexts."})
    norms_lr: float | None = field(default=None, metadata={"help": "Learning rate of the tower's norms."})
    vision_lr: float | None = field(default=None, metadata={"help": "Learning rate of the rest of the tower."})
    projector_lr: float | None = field(default=None, metadata={"help": "Learning rate of the projector."})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batch rows of one modality and similar length."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        without_reentrant(self)
        self._check_numbers()
        if self.global_batch_size is None:
            return
        at_once = self.train_batch_size * self.world_size
        if self.global_batch_size % at_once or self.global_batch_size < at_once:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} cannot be divided evenly.",
                expected=f"a multiple of {at_once}: {self.train_batch_size} rows in each of "
                f"{self.world_size} processes",
                got=self.global_batch_size,
                fix="per_device_train_batch_size=...",
            )
        self.gradient_accumulation_steps = self.global_batch_size // at_once

    def _check_numbers(self) -> None:
        """Refuse what transformers takes without a look: a rate that is not a number trains nothing, or breaks all."""
        rates = ("learning_rate", "weight_decay", "experts_lr", "router_lr", "norms_lr", "vision_lr", "projector_lr")
        for name in rates:
            value = getattr(self, name)
            plain = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            if not plain and not (value is None and name.endswith("_lr")):
                raise ConfigError(f"{name}={value!r} cannot be used.", expected="a finite number >= 0", got=repr(value))
        if not isinstance(self.group_by_modality_length, bool):
            value = repr(self.group_by_modality_length)
            raise ConfigError(f"group_by_modality_length={value} is not a choice.", expected="True or False", got=value)
        size = self.global_batch_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            raise ConfigError(f"global_batch_size={size!r} cannot be used.", expected="a whole number", got=repr(size))


class MLLMTrainer(Trainer):
    """Trains multimodal LLMs, attached or not, on batches of `covft.data`.

    It adds to transformers' Trainer: a learning rate for each part of the model; batches by modality and length; dummy
    images for rows without images, which keep the graphs of all processes equal; and it refuses incomplete checkpoints.

    Args:
        model: A multimodal LLM of transformers; `covft.attach` makes its tower context-aware.
        args: `MLLMTrainingArguments`.
        data_collator: None creates a `covft.data.Collator` for a `ConversationDataset`.
        train_dataset: Usually a `ConversationDataset`.
        callbacks: If the model is attached and they include no `CoVFTCallback`, one is added.
        **kwargs: As for transformers' Trainer; `processing_class` is the tokenizer or the processor.

    Raises:
        ConfigError: If there is no collator and none can be created, or the data set has rows without a text, which the
            tower has no null text for.

    Example:
        >>> MLLMTrainer(model, args, train_dataset=dataset, processing_class=tokenizer).train()  # doctest: +SKIP
    """

    @check_kinds
    def __init__(
        self,
        model: nn.Module | None = None,
        args: MLLMTrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        *,
        callbacks: list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        args = MLLMTrainingArguments("trainer_output") if args is None else args
        args.remove_unused_columns = False  # the collator reads columns that no model takes
        callbacks = list(callbacks or ())
        if not any(isinstance(callback, CoVFTCallback) for callback in callbacks):
            attached = model is not None and attachment_of(model) is not None
            callbacks.append(CoVFTCallback() if attached else SealCallback())
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=args,
            data_collator=_collator_for(train_dataset) if data_collator is None else data_collator,
            train_dataset=train_dataset,
            callbacks=callbacks,
            **kwargs,
        )
        _check_null_text(self.model, train_dataset)
        # Before the reporters, which then see the routing in each entry.
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, CoVFTCallback))

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train, from scratch or from a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint's folder; True takes the last complete one, or starts from scratch if
                there is none.
            **kwargs: As for transformers' Trainer.

        Raises:
            CheckpointError: If the checkpoint is incomplete, or of a run with other settings or other trained
                parameters.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        resume = str(resume_from_checkpoint) if resume_from_checkpoint else None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, CoVFTCallback) and resume is not None:
                own: Any = self.model
                check_resumed(own, resume)
                callback.resume_from = resume
        return super().train(resume_from_checkpoint=resume, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer that the arguments name, with groups for each part of the model."""
        if self.optimizer is not None:
            return self.optimizer
        target: nn.Module = self.model if model is None else model  # type: ignore[assignment]
        args: Any = self.args
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, target)  # type: ignore[arg-type]
        if {"params", "model", "optimizer_dict"} & set(options):
            return super().create_optimizer(target)  # an optimizer that creates its own groups
        rates = {
            part: getattr(args, f"{part}_lr", None) for part in ("experts", "router", "norms", "vision", "projector")
        }
        decayed = self.get_decay_parameter_names(target)
        groups = param_groups(target, rates, args.learning_rate, args.weight_decay, decayed)
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the model's loss; a model that is not attached does not get the tower's columns."""
        own: Any = self.model
        if attachment_of(own) is not None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        flags = inputs.get("image_flags")
        inputs = {name: value for name, value in inputs.items() if name not in _FOR_THE_TOWER}
        with without_dummies(base_of(without_peft(own)), flags):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.should_save:
            unseal(checkpoint_folder(self.args, self.state))
        return super()._save_checkpoint(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args: Any = self.args
        if not args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        lengths = getattr(dataset, "modality_lengths", None)
        if lengths is None:
            raise ConfigError(
                "group_by_modality_length needs the lengths of the rows.",
                expected="a data set with modality_lengths(): negative where a row has no image",
                got=type(dataset).__name__,
                fix="covft.data.ConversationDataset, or group_by_modality_length=False",
            )
        seed = args.data_seed if args.data_seed is not None else args.seed
        return ModalityGroupedSampler(lengths(), args.train_batch_size, world_size=args.world_size, seed=seed)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Omit the tower, which the callback loads strictly afterwards."""
        own: Any = self.model
        attachment = attachment_of(own)
        if attachment is not None:
            tower = prefix_of(attachment.encoder.vit, own)
            for keys in (load_result.missing_keys, load_result.unexpected_keys):
                keys[:] = [key for key in keys if not key.startswith((tower, MARK))]
        super()._issue_warnings_after_load(load_result)


def _check_null_text(model: Any, dataset: Any) -> None:
    attachment = attachment_of(model)
    if attachment is None or not getattr(dataset, "null_text", False):
        return
    conditioning = attachment.encoder.conditioning
    if conditioning.needs_text and not conditioning.has_null_text:
        raise ConfigError(
            "The data set leaves rows without an instruction without a text, and the tower has nothing to put there.",
            expected="a tower with a null text, or an instruction for these rows",
            got="null_text=True of the data set alone",
            fix="covft.attach(model, ..., null_text=True), or ConversationDataset(..., empty_instruction='...')",
        )


def _collator_for(dataset: Any) -> Collator:
    if not isinstance(dataset, ConversationDataset):
        raise ConfigError(
            "The collator is missing, and covft cannot create one for this data set.",
            expected="a covft.data.ConversationDataset, or data_collator=",
            got=type(dataset).__name__,
        )
    tokenizer = dataset.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    shape = dataset.image_shape if dataset.image_processor is not None else None
    if shape is None:
        warnings.warn("The data set has no image processor: batches have no images.", UserWarning, stacklevel=3)
    return Collator(padding, image_shape=shape, dummies="batch" if shape is not None else "none")

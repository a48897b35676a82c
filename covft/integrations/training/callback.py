"""CoVFTCallback: a context-aware tower in any loop that is built on transformers' Trainer."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from covft.checkpoints.pretrained import FOLDER
from covft.errors import (
    CheckpointError,
    ConfigError,
    MissingContextError,
    MissingGradientError,
    ReentrantCheckpointError,
)
from covft.integrations.mllm.attach import attach
from covft.integrations.mllm.attachment import Attachment, attachment_of
from covft.integrations.training.checkpoints import checkpoint_folder, restore, seal, write_trained
from covft.integrations.training.gradients import GradientWatch
from covft.integrations.training.monitor import RoutingMonitor
from covft.integrations.training.parts import COVFT, parts_of
from covft.utils.extras import import_library
from covft.utils.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
elif importlib.util.find_spec("transformers"):
    from transformers import TrainerCallback
else:
    TrainerCallback = object  # so that `from covft import *` works; to make one says what is missing

MISSING = ("raise", "warn", "ignore")


class CoVFTCallback(TrainerCallback):
    """Trains a context-aware tower in transformers' Trainer, and in what is built on it: TRL, LLaMA-Factory.

    - Attaches the model when the trainer is made, before the optimizer is, unless it is attached already.
    - Writes `covft/` into every checkpoint: the tower, and every other trained tensor by its name in the running
      model. `complete.json` is written last; a checkpoint without it is not taken for a whole one.
    - On resume, and for `load_best_model_at_end`, loads them strictly: plain Trainer restores nothing of an attached
      tower. DeepSpeed and FSDP restore it themselves.
    - Logs routing entropy, expert load and the norm of the gates' gradients.
    - After the first step, raises if a parameter that should train got no gradient.

    Args:
        text_encoder: As for `covft.attach`; None if the model is attached already, or the routing needs no text.
        tokenizer: The model's tokenizer or processor; None takes the trainer's `processing_class`.
        resume_from: The checkpoint that is resumed; None finds it where the trainer writes.
        missing_gradients: What a trained parameter without gradient is after the first step: `"raise"`, `"warn"` or
            `"ignore"`.
        per_layer: Whether figures are logged for every adapted block besides their means.
        **settings: The other keywords of `covft.attach`: `layers`, `experts`, `routing`, ...

    Raises:
        ConfigError: If a setting is not known.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[CoVFTCallback("bert-base-uncased")])  # doctest: +SKIP
    """

    def __init__(
        self,
        text_encoder: Any = None,
        *,
        tokenizer: Any = None,
        resume_from: str | Path | None = None,
        missing_gradients: str = "raise",
        per_layer: bool = False,
        **settings: Any,
    ) -> None:
        import_library("transformers", "train", needed_by="CoVFTCallback")
        known = set(inspect.signature(attach).parameters) - {"model"}
        if unknown := sorted(set(settings) - known):
            raise ConfigError(
                f"CoVFTCallback does not know {', '.join(unknown)}.",
                expected=", ".join(sorted(known)),
                got=", ".join(unknown),
            )
        if missing_gradients not in MISSING:
            raise ConfigError(
                "missing_gradients is not known.",
                expected=" | ".join(MISSING),
                got=repr(missing_gradients),
                fix="raise",
            )
        self.text_encoder, self.tokenizer, self.settings = text_encoder, tokenizer, settings
        self.resume_from = resume_from
        self.missing_gradients, self.per_layer = missing_gradients, per_layer
        self._monitor: RoutingMonitor | None = None
        self._watch: GradientWatch | None = None  # until it was checked that all gradients came

    # When the trainer is made

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach, and refuse what would lose gradients or checkpoints."""
        model = kwargs["model"]
        _check_arguments(args)
        if attachment_of(model) is None:
            tokenizer = kwargs.get("processing_class") if self.tokenizer is None else self.tokenizer
            attach(model, self.text_encoder, tokenizer=tokenizer, **self.settings)
        elif self.text_encoder is not None or self.settings:
            raise ConfigError(
                "The model is attached already, so the callback's settings would not be used.",
                expected="CoVFTCallback() for an attached model",
                got=", ".join(["text_encoder"] * (self.text_encoder is not None) + sorted(self.settings)),
                fix="CoVFTCallback(), or leave covft.attach out",
            )
        _train_again_after_peft(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what the checkpoint holds, and look out for gradients."""
        model = kwargs["model"]
        encoder = _attachment(model).encoder
        if state.global_step > 0 and not _restores_itself():
            restore(model, self.resume_from or _checkpoint_of(args, state))
        self._monitor = RoutingMonitor(encoder, self.per_layer)
        self._stop_watching()
        if self.missing_gradients != "ignore":
            self._watch = GradientWatch(model.named_parameters())

    # At every step

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what the routers decided."""
        if self._monitor is not None:
            self._monitor.note_routing()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what the routers decided and the gates' gradients; at first, that all gradients are there."""
        if self._monitor is not None:
            self._monitor.note_routing()
            self._monitor.note_gates()
        if self._watch is not None:
            self._check_gradients(kwargs["model"], self._watch)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget which folder was saved last: its tensors are older than the model's now."""
        _attachment(kwargs["model"]).saved_in = None
        if self._watch is not None:  # Trainers of old have no on_pre_optimizer_step
            self._check_gradients(kwargs["model"], self._watch)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add the figures to the log entry; callbacks that come later see them, too."""
        if self._monitor is not None:
            self._monitor.log(logs, state)

    def _check_gradients(self, model: nn.Module, watch: GradientWatch) -> None:
        missing = watch.missing()
        if missing and not _attachment(model).encoder.routing_weights():
            inside = {name for name, part in parts_of(model).items() if part not in ("llm",)}
            if set(missing) <= inside:
                return  # rows without images so far: look again after the next step
        self._stop_watching()
        if not missing:
            return
        message = f"{len(missing)} of {len(watch.trained)} trained parameters got no gradient in the first step."
        error = MissingGradientError(
            message,
            expected="a gradient for every parameter with requires_grad",
            got=", ".join(missing[:5]) + (", ..." if len(missing) > 5 else ""),
            fix="parameter.requires_grad_(False) for those that no loss depends on; for blocks after the features that "
            "are read, fewer layers",
        )
        if self.missing_gradients == "raise":
            raise error
        warnings.warn(str(error), UserWarning, stacklevel=2)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    # Checkpoints

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write `covft/` into the checkpoint, and last of all that it is whole."""
        from accelerate.utils import broadcast_object_list

        model = kwargs["model"]
        checkpoint = checkpoint_folder(args, state)
        if args.should_save and not checkpoint.is_dir():
            warnings.warn(
                f"covft writes beside the trainer, and there is no {checkpoint}: nothing of it is saved here.",
                UserWarning,
                stacklevel=2,
            )
        attachment, folder = _attachment(model), checkpoint / FOLDER
        # Unless model.save_pretrained has written it already, which the process that writes knows.
        missing = broadcast_object_list([attachment.saved_in != folder])[0]
        if missing and (args.should_save or any(map(is_sharded, attachment.encoder.vit.parameters()))):
            attachment.encoder.save_pretrained(folder)  # where weights are sharded, all take part
        write_trained(model, folder, main=args.should_save)
        seal_when_all_have_written(args, checkpoint, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the tower of the best checkpoint where the trainer has loaded the rest of it."""
        self._stop_watching()
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and not _restores_itself():
            restore(kwargs["model"], best)


class SealCallback(TrainerCallback):
    """Says of every checkpoint that it is whole; for models that are not attached."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write `complete.json`."""
        seal_when_all_have_written(args, checkpoint_folder(args, state), state.global_step)


def seal_when_all_have_written(args: TrainingArguments, checkpoint: Path, step: int) -> None:
    """Seal a checkpoint once every process has written its files.

    Args:
        args: Of the trainer.
        checkpoint: Its folder.
        step: The optimizer step.
    """
    from accelerate import PartialState

    PartialState().wait_for_everyone()
    if args.should_save and checkpoint.is_dir():
        seal(checkpoint, step)


def _attachment(model: nn.Module) -> Attachment:
    attachment = attachment_of(model)
    if attachment is None:
        raise MissingContextError(
            "The model that is trained is not attached.",
            expected="the model that the trainer was made with",
            got=f"another {type(model).__name__}, as model_init makes it",
            fix="Trainer(model=model, ...), or covft.attach in model_init",
        )
    return attachment


def _check_arguments(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ConfigError(
            f"The trainer would use nn.DataParallel over {args.n_gpu} GPUs, which copies the model at every step.",
            expected="one process per GPU",
            got="one process",
            fix="accelerate launch train.py, or CUDA_VISIBLE_DEVICES=0",
        )
    options = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    if isinstance(options, dict) and options.get("use_reentrant"):
        raise ReentrantCheckpointError(
            "Reentrant checkpointing gives the experts of a frozen ViT no gradient.",
            expected="use_reentrant=False",
            got="use_reentrant=True",
            fix="activation_checkpointing_kwargs={'use_reentrant': False}",
        )
    if args.save_total_limit == 1:
        warnings.warn(
            "save_total_limit=1 deletes the last whole checkpoint before the next one is complete; a run that is "
            "killed in between loses both. Take 2.",
            UserWarning,
            stacklevel=2,
        )


def _train_again_after_peft(model: nn.Module) -> None:
    """Mark the tower's parameters as trained where get_peft_model has frozen them with everything else."""
    if not hasattr(model, "peft_config"):
        return
    parts = parts_of(model)
    ours = [parameter for name, parameter in model.named_parameters() if parts[name] in COVFT]
    if not any(parameter.requires_grad for parameter in ours):
        for parameter in ours:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)


def _restores_itself() -> bool:
    """Whether the engine that shards the model loads every tensor of it, by its name in the running model."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    return AcceleratorState().distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def _checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that a resumed state comes from."""
    from transformers import TrainerState

    named = args.resume_from_checkpoint
    candidates = [Path(named)] if isinstance(named, str) and Path(named).is_dir() else []
    candidates.append(checkpoint_folder(args, state))
    for candidate in candidates:
        file = candidate / "trainer_state.json"
        if not file.is_file():
            continue
        saved = TrainerState.load_from_json(str(file))
        if saved.global_step == state.global_step and saved.log_history == state.log_history:
            return candidate
    raise CheckpointError(
        f"Training goes on at step {state.global_step}, and the checkpoint that it comes from is not known.",
        expected=" or ".join(map(str, candidates)),
        got="no trainer_state.json of that step",
        fix="CoVFTCallback(..., resume_from='path/of/checkpoint')",
    )

"""CoVFTCallback: trains a context-aware tower in any loop that builds on transformers' Trainer."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from covft.checkpoints.beside_adapters import check_adapters_are_found
from covft.checkpoints.pretrained import FOLDER
from covft.errors import CheckpointError, ConfigError
from covft.integrations.mllm.attach import attach
from covft.integrations.mllm.attachment import attachment_of
from covft.integrations.mllm.balance import LossOverride, wants_balance
from covft.integrations.training.checkpoints import checkpoint_folder, restore, seal, unseal, write_trained
from covft.integrations.training.peft_saving import save_with_adapters
from covft.integrations.training.precision import train_in_float32
from covft.integrations.training.reentrant import check_tower, key_of, without_reentrant
from covft.integrations.training.resuming import watch_resuming
from covft.integrations.training.tower_callback import TowerCallback, TrainerCallback, attachment_in
from covft.integrations.training.trainable import after_peft, check_trainable
from covft.integrations.training.updates import UpdateMonitor, check_engine
from covft.integrations.tuning.tune import tune
from covft.tuning.registry import make_method
from covft.utils.arguments import check_kinds, check_sizes
from covft.utils.extras import import_library
from covft.utils.transformers_names import check_release

if TYPE_CHECKING:
    from transformers import TrainerControl as Control
    from transformers import TrainerState as State
    from transformers import TrainingArguments as Arguments

MISSING = ("raise", "warn", "ignore")


class CoVFTCallback(TowerCallback):
    """Trains a context-aware tower in transformers' Trainer, and in trainers that build on it: TRL, LLaMA-Factory.

    - Attaches the model when the trainer is constructed, before the optimizer, unless it is attached already.
    - Writes `covft/` to every checkpoint: the tower, and all other trained tensors by their names in the running
      model. `complete.json` is written last; a checkpoint without it counts as incomplete.
    - On resume, and for `load_best_model_at_end`, loads them strictly, because the plain Trainer restores nothing of
      an attached tower. DeepSpeed and FSDP restore it themselves.
    - Logs routing entropy, expert load, the norm of the gates' gradients, the distance of the experts from each other
      and, with sparse routing, the load-balancing loss, which the attached model adds to its loss. Warns once if the
      experts are still equal after 100 steps.
    - On request, logs how far the updates of the tower agree: the mean cosine of their gradients with the dominant
      direction, and its deviation.
    - Before the first step, raises if other code has frozen everything that covft adds, and warns if it has frozen a
      part of it. What `get_peft_model` has frozen is trained again.
    - Keeps what covft trains of a model in half precision in float32, where AdamW's small steps are not rounded away;
      DeepSpeed and accelerate's FSDP with mixed precision do that themselves.
    - After the first step, raises if a trained parameter got no gradient; after ten, warns if most elements of a part
      have not changed.

    Args:
        text_encoder: As for `covft.attach`; None if the model is attached already, or the routing needs no text.
        method: How the tower is tuned, as for `covft.tune`.
        tokenizer: The model's tokenizer or processor; None takes the trainer's `processing_class`.
        resume_from: The checkpoint to resume from; None looks in the trainer's output folder.
        missing_gradients: Reaction to trained parameters without gradient after the first step, and to a tower that
            other code has frozen: `"raise"`, `"warn"` or `"ignore"`.
        per_layer: Whether to log figures of each adapted block, in addition to their means.
        conflict_every: Steps between gradients of the tower that are compared with their dominant direction; None
            compares none. Not with DeepSpeed and FSDP, which shard gradients.
        **settings: The other keywords of `covft.attach`, or `empty_instruction` and the like with the options of
            another method: `layers`, `experts`, `r`, ...

    Raises:
        ConfigError: If a setting is not known.
        UnsupportedVersionError: If transformers is older than 4.57.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[CoVFTCallback("bert-base-uncased")])  # doctest: +SKIP
    """

    @check_kinds
    def __init__(
        self,
        text_encoder: Any = None,
        *,
        method: str = "covft",
        tokenizer: Any = None,
        resume_from: str | Path | None = None,
        missing_gradients: str = "raise",
        per_layer: bool = False,
        conflict_every: int | None = None,
        **settings: Any,
    ) -> None:
        import_library("transformers", "train", needed_by="CoVFTCallback")
        check_release("CoVFTCallback")
        known = _settings_of(method)
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
        check_sizes(conflict_every=conflict_every)
        super().__init__(missing_gradients, per_layer)
        self.conflict_every = conflict_every
        self._updates: UpdateMonitor | None = None  # only where asked for
        self.text_encoder, self.tokenizer, self.settings = text_encoder, tokenizer, settings
        self.method = method
        self.resume_from = resume_from

    def on_init_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Attach the model, and refuse arguments that would lose gradients or checkpoints."""
        model = kwargs["model"]
        _check_arguments(args)
        if self.conflict_every is not None:
            check_engine()
        if attachment_of(model) is None:
            tokenizer = kwargs.get("processing_class") if self.tokenizer is None else self.tokenizer
            tune(model, self.method, text_encoder=self.text_encoder, tokenizer=tokenizer, **self.settings)
        elif self.text_encoder is not None or self.settings or self.method != "covft":
            raise ConfigError(
                "The model is attached already, so the callback's settings would be ignored.",
                expected="CoVFTCallback() for an attached model",
                got=", ".join(["text_encoder"] * (self.text_encoder is not None) + sorted(self.settings))
                or self.method,
                fix="CoVFTCallback(), or leave covft.attach out",
            )
        encoder = attachment_in(model).encoder
        check_tower(encoder.vit, args)
        encoder.conditioning.reentrant_key = key_of(args)
        after_peft(model)
        save_with_adapters(model)
        train_in_float32(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            check_trainable(model)  # the optimizer would fail, and not say why
        watch_resuming(model)

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """See `TowerCallback`; a checkpoint that will be overwritten now is incomplete from here on."""
        super().on_step_end(args, state, control, **kwargs)
        _unseal_before_saving(args, state, control)

    def on_epoch_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Mark a checkpoint incomplete that will be overwritten now."""
        _unseal_before_saving(args, state, control)

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Restore the checkpoint, if training resumes, and start watching gradients."""
        model = kwargs["model"]
        if state.global_step > 0 and not _restores_itself():
            restore(model, self.resume_from or _checkpoint_of(args, state))
        check_trainable(model, self.missing_gradients)
        check_adapters_are_found(model)  # hours before the first save would
        self._cover_forward(model)
        self._start(model, model.named_parameters())
        if self.conflict_every is not None and state.is_world_process_zero:  # DDP gives all processes equal gradients
            self._updates = UpdateMonitor(attachment_in(model).encoder.vit.named_parameters(), self.conflict_every)

    def on_pre_optimizer_step(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Record the routing and the gates' gradients; in the first step, check all gradients."""
        if self._monitor is not None:
            self._monitor.note_routing()
            self._monitor.note_gates()
        if self._updates is not None:
            self._updates.note(state.global_step)
        self._check_gradients(kwargs["model"])

    def on_log(self, args: Arguments, state: State, control: Control, logs: Any = None, **kwargs: Any) -> None:
        """See `TowerCallback`."""
        super().on_log(args, state, control, logs, **kwargs)
        if self._updates is not None and logs is not None:
            figures = self._updates.figures()
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_save(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Write `covft/` to the checkpoint, and then mark the checkpoint complete."""
        model, checkpoint = kwargs["model"], checkpoint_folder(args, state)
        if args.should_save and not checkpoint.is_dir():
            warnings.warn(
                f"The trainer has not written {checkpoint}. covft only adds to its checkpoints, so it saves nothing.",
                UserWarning,
                stacklevel=2,
            )
        self._save(args, model, checkpoint / FOLDER)
        write_trained(model, checkpoint / FOLDER, main=args.should_save)
        seal_when_all_have_written(args, checkpoint, state.global_step)

    def on_train_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Load the tower of the best checkpoint, if the trainer has loaded the rest of it."""
        self._stop_watching()
        self._updates = None
        self._uncover_forward(kwargs["model"])
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and not _restores_itself():
            restore(kwargs["model"], best)

    def _cover_forward(self, model: nn.Module) -> None:
        """Add the load-balancing loss around a `forward` that another library has put over the model's, as TRL does."""
        attachment = attachment_in(model)
        own = [known for known in attachment.overrides if known.name == "forward" and known.owner is attachment.model]
        if wants_balance(attachment) and not all(override.is_installed for override in own):
            LossOverride(attachment).install()

    def _uncover_forward(self, model: nn.Module) -> None:
        attachment = attachment_in(model)
        forward = attachment.model.__dict__.get("forward")
        if isinstance(forward, LossOverride) and forward not in attachment.overrides:
            forward.remove()


def _settings_of(method: str) -> set[str]:
    """Return the keywords that a method takes in a multimodal LLM."""
    if method == "covft":
        return set(inspect.signature(attach).parameters) - {"model"}
    options = make_method(method, {}).to_dict()
    return {*options, "turns", "system", "empty_instruction", "adapter"}


class SealCallback(TrainerCallback):
    """Marks every checkpoint of a model that is not attached as complete."""

    def on_save(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Write `complete.json`."""
        seal_when_all_have_written(args, checkpoint_folder(args, state), state.global_step)


def _unseal_before_saving(args: Arguments, state: State, control: Control) -> None:
    # Trainer's own callbacks decide before those of the user, except for save_strategy="best".
    if control.should_save and args.should_save:
        unseal(checkpoint_folder(args, state))


def seal_when_all_have_written(args: Arguments, checkpoint: Path, step: int) -> None:
    """Mark a checkpoint complete, once every process has written its files."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
    if args.should_save and checkpoint.is_dir():
        seal(checkpoint, step)


def _check_arguments(args: Arguments) -> None:
    if args.n_gpu > 1:
        raise ConfigError(
            f"The trainer would use nn.DataParallel over {args.n_gpu} GPUs, which copies the model at every step.",
            expected="one process per GPU",
            got="one process",
            fix="accelerate launch train.py, or CUDA_VISIBLE_DEVICES=0",
        )
    without_reentrant(args)
    if args.save_total_limit == 1:
        warnings.warn(
            "save_total_limit=1 deletes the last checkpoint before the next one is complete; a run that is killed in "
            "between loses both. Set it to 2.",
            UserWarning,
            stacklevel=2,
        )


def _restores_itself() -> bool:
    """Whether the engine that shards the model loads all of its tensors itself."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    return AcceleratorState().distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def _checkpoint_of(args: Arguments, state: State) -> Path:
    """Return the checkpoint of a resumed state."""
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
        f"Training resumes at step {state.global_step}, but its checkpoint was not found.",
        expected=" or ".join(map(str, candidates)),
        got="no trainer_state.json of that step",
        fix="CoVFTCallback(..., resume_from='path/to/checkpoint')",
    )

"""TowerCallback: watches and saves the tower of an attached model in any loop that has the Trainer's callbacks."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from covft.errors import MissingContextError, MissingGradientError
from covft.integrations.mllm.attachment import Attachment, attachment_of
from covft.integrations.mllm.balance import wants_balance
from covft.integrations.training.gradients import GradientWatch
from covft.integrations.training.monitor import RoutingMonitor
from covft.integrations.training.movement import MovementWatch
from covft.integrations.training.parts import parts_of
from covft.integrations.training.precision import keeps_float32_copies
from covft.utils.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from transformers import TrainerControl as Control
    from transformers import TrainerState as State
    from transformers import TrainingArguments as Arguments
elif importlib.util.find_spec("transformers"):
    from transformers import TrainerCallback
else:
    TrainerCallback = object  # so that `from covft import *` works; CoVFTCallback names what is missing


class TowerCallback(TrainerCallback):
    """Logs the routing, checks the gradients of the first step and saves the tower of an attached model."""

    fix = (
        "parameter.requires_grad_(False) for those that no loss depends on; for blocks after the hidden state that "
        "the MLLM reads, fewer layers"
    )

    def __init__(self, missing_gradients: str = "raise", per_layer: bool = False) -> None:
        self.missing_gradients, self.per_layer = missing_gradients, per_layer
        self._monitor: RoutingMonitor | None = None
        self._watch: GradientWatch | None = None  # until all gradients were seen
        self._movement: MovementWatch | None = None  # for the first steps

    def on_step_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Note what has a learning rate of 0 in this step."""
        if self._movement is not None and kwargs.get("optimizer") is not None:
            self._movement.before_step(kwargs["optimizer"])

    def on_substep_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Record the routing."""
        if self._monitor is not None:
            self._monitor.note_routing()

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Forget the last saved folder, whose tensors are outdated."""
        attachment_in(kwargs["model"]).encoder.saved_in = None
        if self._movement is not None:
            self._movement.after_step()
        self._check_gradients(kwargs["model"])  # old Trainers have no on_pre_optimizer_step

    def on_log(self, args: Arguments, state: State, control: Control, logs: Any = None, **kwargs: Any) -> None:
        """Add the figures to the log entry; later callbacks see them, too."""
        if self._monitor is not None:
            self._monitor.log(logs, state)
            self._monitor.check_separation(state.global_step)

    def _start(self, model: nn.Module, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        routed, named = attachment_in(model).routed, list(named)
        self._monitor = None if routed is None else RoutingMonitor(routed, self.per_layer)
        self._stop_watching()
        if self.missing_gradients != "ignore":
            self._watch = GradientWatch(named)
        if not keeps_float32_copies():
            self._movement = MovementWatch(named, parts_of(model))

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None
        if self._movement is not None:
            self._movement.close()
        self._movement = None

    def _check_gradients(self, model: nn.Module) -> None:
        watch = self._watch
        if watch is None:
            return
        missing = watch.missing()
        if missing and not attachment_in(model).encoder.has_run:
            parts = parts_of(model)
            if all(parts[name] != "llm" for name in missing):
                return  # rows without images so far: check again after the next step
        watch.close()
        self._watch = None
        self._check_balance(attachment_in(model))
        if not missing:
            return
        error = MissingGradientError(
            f"{len(missing)} of {len(watch.trained)} trained parameters got no gradient in the first step.",
            expected="a gradient for every parameter with requires_grad",
            got=", ".join(missing[:5]) + (", ..." if len(missing) > 5 else ""),
            fix=self.fix,
        )
        if self.missing_gradients == "raise":
            raise error
        warnings.warn(str(error), UserWarning, stacklevel=2)

    def _check_balance(self, attachment: Attachment) -> None:
        """Warn if the trainer takes its loss from elsewhere than the model, without the load-balancing loss."""
        routed = attachment.routed if wants_balance(attachment) and not attachment.balanced else None
        if routed is not None and routed.aux_loss().requires_grad:
            warnings.warn(
                "The load-balancing loss of sparse routing was not added in the first step: the loss does not come "
                "from the model (label_smoothing_factor, compute_loss_func). Fix: add router_aux_loss_coef * "
                "covft.get_encoder(model).aux_loss() to it, or set router_aux_loss_coef=0.",
                UserWarning,
                stacklevel=2,
            )

    def _save(self, args: Arguments, model: nn.Module, folder: Path) -> None:
        """Save the tower, unless the model's own `save_pretrained` just has, which the process that writes knows."""
        from accelerate.utils import broadcast_object_list

        encoder = attachment_in(model).encoder
        saved_in = encoder.saved_in
        # transformers 4.37 saves to tmp-checkpoint-N and renames it.
        named = saved_in is not None and (saved_in == folder or saved_in.parent.name == f"tmp-{folder.parent.name}")
        missing = broadcast_object_list([not (named and folder.is_dir())])[0]
        if missing and (args.should_save or any(map(is_sharded, encoder.vit.parameters()))):
            encoder.save_pretrained(folder)  # every process takes part if weights are sharded


def attachment_in(model: nn.Module) -> Attachment:
    """Return what connects the trained model with its tower.

    Raises:
        MissingContextError: If nothing does.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise MissingContextError(
            "The trained model is not attached.",
            expected="the model that the trainer was constructed with",
            got=f"another {type(model).__name__}, created by model_init",
            fix="Trainer(model=model, ...), or covft.attach in model_init",
        )
    return attachment

"""What the launchers add to a Trainer: saving and loading the adapted tower, figures, and a look at the first step.

`covft.CoVFTCallback` does this and more for models of transformers. Here it would keep every trained weight of the
language model twice, which these codebases save and load themselves, and it needs events that the Trainer of
transformers 4.37, which they pin, does not have.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from covft.checkpoints.loading import load_into
from covft.checkpoints.pretrained import FOLDER
from covft.errors import MissingGradientError, ReentrantCheckpointError
from covft.integrations.mllm.attachment import Attachment, attachment_of
from covft.integrations.training.callback import seal_when_all_have_written
from covft.integrations.training.checkpoints import check_checkpoint, checkpoint_folder
from covft.integrations.training.gradients import GradientWatch
from covft.integrations.training.monitor import RoutingMonitor
from covft.utils.sharding import is_sharded


def before_trainer(arguments: Any) -> None:
    """Make activation checkpointing non-reentrant, where nobody said which kind.

    Args:
        arguments: `TrainingArguments`.

    Raises:
        ReentrantCheckpointError: If the reentrant kind was asked for.
    """
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # the second from transformers 5 on
        if not getattr(arguments, name, False):
            continue
        options = dict(getattr(arguments, f"{name}_kwargs", None) or {})
        if options.get("use_reentrant"):
            raise ReentrantCheckpointError(
                "Reentrant checkpointing gives the experts of a frozen ViT no gradient.",
                expected=f"{name}_kwargs={{'use_reentrant': False}}, or none",
                got=options,
            )
        setattr(arguments, f"{name}_kwargs", {**options, "use_reentrant": False})


def join_trainer(trainer: Any) -> None:
    """Add to a Trainer, of an attached model, what covft needs of it.

    Args:
        trainer: A Trainer of transformers, made but not started.
    """
    attachment = attachment_of(trainer.model)
    assert attachment is not None, "attached just before"
    if trainer.args.process_index == 0:
        encoder = attachment.encoder
        print(f"covft: {encoder.spec}; adapted: {', '.join(map(str, encoder.layers))}")
        encoder.print_trainable_parameters()
    trainer.add_callback(SaveTower(attachment))
    trainer.add_callback(WatchTower(attachment))
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())  # before the reporters, which then see its figures
    trainer._load_from_checkpoint = partial(_load_from_checkpoint, trainer._load_from_checkpoint, attachment)
    trainer._load_rng_state = partial(_load_rng_state, trainer._load_rng_state)


class SaveTower(TrainerCallback):
    """Writes the adapted tower to `covft/` in every checkpoint, and at the end in the folder of the run.

    Args:
        attachment: What attach() left on the model.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write it, unless the model's own `save_pretrained` just has; last of all, that the checkpoint is whole."""
        checkpoint = checkpoint_folder(args, state)
        self._save(args, checkpoint / FOLDER)
        seal_when_all_have_written(args, checkpoint, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write it."""
        self._save(args, Path(str(args.output_dir)) / FOLDER)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget which folder was saved last: its tensors are older than the model's now."""
        self.attachment.saved_in = None

    def _save(self, args: Any, folder: Path) -> None:
        encoder, saved_in = self.attachment.encoder, self.attachment.saved_in
        # transformers 4.37 saves to tmp-checkpoint-N and renames it.
        done = saved_in is not None and (saved_in == folder or saved_in.parent.name == f"tmp-{folder.parent.name}")
        sharded = any(is_sharded(parameter) for parameter in encoder.vit.parameters())
        if sharded or (args.should_save and not (done and folder.is_dir())):  # of shards every process has one
            encoder.save_pretrained(folder)


class WatchTower(TrainerCallback):
    """Logs what the routers do, and ends the training after its first step if something of the tower cannot learn.

    Args:
        attachment: What attach() left on the model.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.encoder = attachment.encoder
        self.monitor = RoutingMonitor(self.encoder)
        self.watch: GradientWatch | None = None  # until it was checked that all gradients came

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch every trained parameter of the tower."""
        self.watch = GradientWatch(self.encoder.vit.named_parameters())

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what the routers decided."""
        self.monitor.note_routing()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what the routers decided; after the first step, look whether all gradients came."""
        self.monitor.note_routing()
        if self.watch is None or not self.encoder.routing_weights():
            return  # no images so far
        missing = self.watch.missing()
        self.watch.close()
        self.watch = None
        if missing:
            raise MissingGradientError(
                f"{len(missing)} trained parameters of the tower got no gradient in the first step.",
                expected="a gradient for every trained parameter",
                got=", ".join(sorted(missing)[:5]),
                fix="adapt blocks whose output is read: --covft_layers",
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the figures to the log entry."""
        self.monitor.log(logs, state)


def _load_from_checkpoint(
    inner: Any, attachment: Attachment, resume_from_checkpoint: str, model: nn.Module | None = None
) -> None:
    # Not called with DeepSpeed, whose own checkpoints hold the adapted tower with everything else.
    check_checkpoint(resume_from_checkpoint)
    inner(resume_from_checkpoint, model)
    load_into(attachment.encoder, Path(resume_from_checkpoint) / FOLDER)


def _load_rng_state(inner: Any, checkpoint: str | None) -> None:
    # transformers 4.37 saves the state of NumPy's generator, which torch from 2.6 on does not load unasked.
    with torch.serialization.safe_globals(_numpy_state()):
        inner(checkpoint)


def _numpy_state() -> list[Any]:
    """What a pickled state of NumPy's generator is made of."""
    import numpy as np

    home = "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
    rebuild = importlib.import_module(home)._reconstruct
    names = [(rebuild, "numpy.core.multiarray._reconstruct"), (rebuild, "numpy._core.multiarray._reconstruct")]
    return [np.ndarray, np.dtype, type(np.dtype(np.uint32)), *names]

"""Adds to a Trainer what the launchers need: saving and loading the adapted tower, figures, and a gradient check.

`covft.CoVFTCallback` does more, for models of transformers. Here it would save the language model's trained weights
twice, because the codebases save and load them, and it needs events that transformers 4.37, which they pin, lacks.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from covft.checkpoints.pretrained import FOLDER, prefix_of
from covft.integrations.mllm.attachment import Attachment, attachment_of
from covft.integrations.training.callback import seal_when_all_have_written
from covft.integrations.training.checkpoints import check_checkpoint, checkpoint_folder, unseal
from covft.integrations.training.precision import train_in_float32
from covft.integrations.training.reentrant import check_tower, key_of
from covft.integrations.training.resuming import check_settings
from covft.integrations.training.tower_callback import TowerCallback
from covft.integrations.training.trainable import check_trainable
from covft.surgery.overrides import Override


def join_trainer(trainer: Any, callback: TowerCallback | None = None) -> None:
    """Add covft's callback and its loading to the Trainer of an attached model, before training.

    Args:
        trainer: The Trainer.
        callback: By default a `LauncherCallback`.
    """
    attachment = attachment_of(trainer.model)
    assert attachment is not None, "attached by the launcher"
    check_tower(attachment.encoder.vit, trainer.args)
    attachment.encoder.conditioning.reentrant_key = key_of(trainer.args)
    widened = train_in_float32(trainer.model)
    if attachment.encoder.saved_in is not None:  # loaded into half precision, which has rounded it
        attachment.encoder.load_into(attachment.encoder.saved_in)
    if trainer.args.process_index == 0:
        encoder = attachment.encoder
        print(f"covft: {encoder.spec}; adapted: {encoder.adapted}")
        encoder.print_trainable_parameters()
        if widened:
            print(f"covft: {widened} trained tensors of the tower are kept in float32, for the optimizer")
    if callback is None and hasattr(trainer.model, "peft_config"):
        AdaptersWithoutTower(trainer.model).install()
    # Before the reporters, which then see its figures.
    trainer.callback_handler.callbacks.insert(0, LauncherCallback() if callback is None else callback)
    trainer._load_from_checkpoint = partial(_load_from_checkpoint, trainer._load_from_checkpoint, attachment)
    trainer._save_checkpoint = partial(_save_checkpoint, trainer._save_checkpoint, trainer)
    trainer._load_rng_state = partial(_load_rng_state, trainer._load_rng_state)


class LauncherCallback(TowerCallback):
    """Saves the adapted tower to `covft/` in every checkpoint and in the run's folder, and watches its training."""

    fix = "adapt blocks whose output is read: --covft_layers"
    _hidden: WithoutTower | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start watching the tower."""
        model = kwargs["model"]
        if self._hidden is not None:
            self._hidden.remove()
            self._hidden = None
        attachment = attachment_of(model)
        assert attachment is not None, "attached by the launcher"
        check_trainable(model, self.missing_gradients)
        tower = {id(parameter) for parameter in attachment.encoder.vit.parameters()}
        self._start(model, [(n, p) for n, p in model.named_parameters() if id(p) in tower])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the routing, forget the last saved folder and check the first step's gradients."""
        if self._monitor is not None:
            self._monitor.note_routing()
        super().on_step_end(args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the tower, and then mark the checkpoint complete."""
        checkpoint = checkpoint_folder(args, state)
        self._save(args, kwargs["model"], checkpoint / FOLDER)
        seal_when_all_have_written(args, checkpoint, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the tower, and hide it from a script that writes what LoRA leaves out."""
        model = kwargs["model"]
        self._save(args, model, Path(str(args.output_dir)) / FOLDER)
        if hasattr(model, "peft_config"):
            self._hidden = WithoutTower(model)
            self._hidden.install()


class PluginCallback(LauncherCallback):
    """Watches the training of the tower, and marks checkpoints complete, where a plug-in saves the tower itself."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint complete."""
        seal_when_all_have_written(args, checkpoint_folder(args, state), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._stop_watching()


class AdaptersWithoutTower(Override):
    """Overrides `save_pretrained` of a PeftModel, and leaves out its context-aware tower.

    With `bias="all"`, peft saves every bias of the model along with its adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "save_pretrained")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save the adapters."""
        attachment, state = attachment_of(self.owner), kwargs.get("state_dict")
        if attachment is not None:
            prefix = prefix_of(attachment.encoder.vit, self.owner)
            state = self.owner.state_dict() if state is None else state
            kwargs["state_dict"] = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        return self.inner(*args, **kwargs)


class WithoutTower(Override):
    """Overrides `named_parameters` of a PeftModel after training, and leaves out its context-aware tower.

    LLaVA writes the trained ones of these to `non_lora_trainables.bin`, and its loader puts them into a model with the
    original tower. The adapted tower is in `covft/`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "named_parameters")

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the other parameters."""
        attachment = attachment_of(self.owner)
        tower = set() if attachment is None else {id(p) for p in attachment.encoder.vit.parameters()}
        return (named for named in self.inner(*args, **kwargs) if id(named[1]) not in tower)


def _load_from_checkpoint(
    inner: Any, attachment: Attachment, resume_from_checkpoint: str, model: nn.Module | None = None
) -> None:
    # Not called with DeepSpeed, whose own checkpoints include the adapted tower.
    check_checkpoint(resume_from_checkpoint)
    check_settings(attachment.encoder, resume_from_checkpoint)
    inner(resume_from_checkpoint, model)
    attachment.encoder.load_into(Path(resume_from_checkpoint) / FOLDER)


def _save_checkpoint(inner: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    if trainer.args.should_save:
        unseal(checkpoint_folder(trainer.args, trainer.state))
    return inner(*args, **kwargs)


def _load_rng_state(inner: Any, checkpoint: str | None) -> None:
    # transformers 4.37 saves the state of NumPy's generator, which torch 2.6 and later refuses by default.
    with torch.serialization.safe_globals(_numpy_state()):
        inner(checkpoint)


def _numpy_state() -> list[Any]:
    """Return the types in a pickled state of NumPy's generator."""
    import numpy as np

    home = "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
    rebuild = importlib.import_module(home)._reconstruct
    names = [(rebuild, "numpy.core.multiarray._reconstruct"), (rebuild, "numpy._core.multiarray._reconstruct")]
    return [np.ndarray, np.dtype, type(np.dtype(np.uint32)), *names]

"""transformers' `save_pretrained` of a wrapped ViT, or of a model around one.

It writes a model that `from_pretrained` loads, with the original FFNs, and the adapted ViT in the sub-folder `covft/`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from covft.checkpoints.beside_adapters import save_beside_adapters
from covft.checkpoints.folder import FOLDER
from covft.checkpoints.saving import check_unpacked
from covft.errors import CheckpointError
from covft.surgery.adapted import AdaptedViT
from covft.surgery.overrides import Override
from covft.surgery.save_guard import check_save_pretrained, running_adapter_save, running_save
from covft.surgery.wrapped import WrappedViT, prefix_of
from covft.utils.sharding import full, is_main_process, is_partitioned, is_sharded
from covft.utils.torch_internals import remove_state_dict_hooks

# A tensor without a meaning in every model that is saved around its original tower. The rest of such a model was tuned
# on the adapted tower. transformers lists tensors that it does not know in a warning, which then says so.
MARK = "the_adapted_tower_is_not_loaded.see_covft.load_model"
# Options of the Hub that push_to_hub takes too.
_HUB_OPTIONS = ("commit_message", "private", "token", "create_pr", "revision", "max_shard_size")


class SaveViT(Override):
    """Overrides `save_pretrained` of the wrapped ViT itself."""

    def __init__(self, encoder: AdaptedViT) -> None:
        super().__init__(encoder.vit, "save_pretrained")
        self.encoder = encoder

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Save the ViT, and upload it if that was asked for."""
        given = self._named(self._own(args), kwargs)
        push, repo_id = given.pop("push_to_hub", False), given.pop("repo_id", None)
        save(self.encoder, self.owner, self.inner, given)
        if push and given.get("is_main_process", True) and is_main_process():
            options = {name: given[name] for name in _HUB_OPTIONS if name in given}
            self.owner.push_to_hub(repo_id or Path(given["save_directory"]).name, **options)


class OriginalStateHook:
    """Gives `save_pretrained` of a model around the ViT the original FFNs; a state-dict hook of the ViT.

    For everything else, such as training and copying, a state dict has the names of the running model.
    """

    def __init__(self, encoder: AdaptedViT) -> None:
        self.encoder = encoder
        self._busy = False

    def __call__(self, vit: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        """Put the original tensors into a state dict that is about to be written, or save beside peft's adapters."""
        if self._busy or vit is not self.encoder.vit:
            return
        adapters, running = running_adapter_save(), running_save()
        if adapters is not None and adapters.state_dict is None:
            with self._writing():
                save_beside_adapters(self.encoder, adapters)
        if adapters is not None or running is None or running.state_dict is not None:
            return
        own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        sharded = [name for name, tensor in own.items() if is_sharded(tensor)]
        if sharded:
            raise CheckpointError(
                "Weights of a context-aware ViT are sharded, and save_pretrained does not gather them.",
                expected="a model on one process, or one that covft.attach knows",
                got=f"{len(sharded)} sharded tensors, such as {sharded[0]}",
                fix="covft.attach(model, ...) instead of covft.wrap(tower, ...)",
            )
        original = self.encoder.original_state(own, prefix)
        for name in own:
            del state[name]
        state.update(original if running.model is vit else marked(original, self.encoder))
        if running.writes and is_main_process():
            with self._writing():
                self.encoder.write(Path(running.directory) / FOLDER)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


def check(vit: nn.Module) -> None:
    """Refuse a transformers that could save a model around this ViT wrongly.

    Raises:
        UnsupportedVersionError: If its `save_pretrained` is not the one that covft knows.
    """
    if hasattr(vit, "save_pretrained"):
        check_save_pretrained()


def install(encoder: AdaptedViT) -> None:
    """Make the ViT, and models around it, save the original weights and the adapted ones."""
    if hasattr(type(encoder.vit), "save_pretrained"):
        SaveViT(encoder).install()
    encoder.vit.register_state_dict_post_hook(OriginalStateHook(encoder))


def remove(vit: nn.Module) -> None:
    """Undo `install`."""
    method = vit.__dict__.get("save_pretrained")
    if isinstance(method, SaveViT):
        method.remove()
    remove_state_dict_hooks(vit, OriginalStateHook)


def save(encoder: AdaptedViT, model: nn.Module, save_pretrained: Any, given: dict[str, Any]) -> Path | None:
    """Save a model that `from_pretrained` loads, and the adapted ViT in its sub-folder `covft/`.

    What was trained outside the ViT is saved as it is. As for any model of transformers, only the first process
    writes. Under FSDP2 every process calls this, without a state dict or with a gathered one; under ZeRO-3 a gathered
    state dict is needed.

    Args:
        encoder: The wrapped ViT.
        model: The model to save: the ViT itself, or one around it.
        save_pretrained: The model's own method.
        given: Its arguments, by name.

    Returns:
        The folder of the adapted ViT; None on a process that wrote nothing.

    Raises:
        CheckpointError: If an option would write something else, or if weights are sharded and not gathered, or experts
            quantised.
    """
    if given.get("distributed_checkpoint"):
        raise CheckpointError(
            "save_pretrained(distributed_checkpoint=True) would write names that from_pretrained does not know.",
            expected="distributed_checkpoint=False",
            got="distributed_checkpoint=True",
            fix="model.save_pretrained(folder)",
        )
    if isinstance(encoder, WrappedViT):
        check_unpacked(encoder)  # before anything is written
    state, writes = given.get("state_dict"), given.get("is_main_process", True) and is_main_process()
    if state is None:
        state = _unsharded_state(model, writes=writes)
    prefix = prefix_of(encoder.vit, model)
    if state or writes:  # a process that only took part has nothing
        original = encoder.original_state(state, prefix)
        if model is not encoder.vit:
            original = marked(original, encoder)
        # transformers takes the state dict of a quantised model itself, whatever it is given: `OriginalStateHook`
        # makes that one right, unless there is another.
        own = given.get("state_dict") is None and getattr(model, "hf_quantizer", None) is not None
        with encoder.in_saved_types():  # transformers writes that of the first parameter into the config
            save_pretrained(**(given if own else {**given, "state_dict": original}))
    vit = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not writes:
        return None
    folder = Path(given["save_directory"]) / FOLDER
    encoder.write(folder, gathered=vit, writes=True)
    return folder


def marked(state: dict[str, Tensor], encoder: AdaptedViT) -> dict[str, Tensor]:
    """Return a state dict with `MARK` in it, unless it has the trained tower itself; an empty one as it is."""
    missing = state and not encoder.keeps_names
    return {**state, MARK: next(iter(state.values())).new_zeros(1)} if missing else state


def _unsharded_state(model: nn.Module, *, writes: bool) -> dict[str, Tensor]:
    """Return the state dict of a model, gathered tensor by tensor; empty on a process that only takes part."""
    state = model.state_dict(keep_vars=True)
    sharded = {name for name, tensor in state.items() if is_sharded(tensor)}
    partitioned = [name for name in sharded if is_partitioned(state[name])]
    if partitioned and writes:
        raise CheckpointError(
            "ZeRO-3 has partitioned the weights, so save_pretrained needs them gathered.",
            expected="state_dict=",
            got=f"{len(partitioned)} parameters that are elsewhere, such as {min(partitioned)}",
            fix="model.save_pretrained(folder, state_dict=accelerator.get_state_dict(engine), "
            "is_main_process=accelerator.is_main_process)",
        )
    if partitioned:
        return {}  # DeepSpeed gives the state dict that it gathers to the first process alone
    unsharded: dict[str, Tensor] = {}
    for name, tensor in state.items():
        value = full(tensor)
        if writes or not sharded:
            unsharded[name] = value.cpu() if name in sharded else value
    return unsharded

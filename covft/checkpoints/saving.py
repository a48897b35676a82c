"""Selects the tensors to save and the metadata of their base model, and writes them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from covft import __version__
from covft.adapters.sources import source_of
from covft.checkpoints.card import model_card
from covft.checkpoints.fingerprint import fingerprint
from covft.checkpoints.folder import CONFIG_NAME, write_folder
from covft.checkpoints.sources import public_revision, public_source
from covft.errors import CheckpointError
from covft.surgery.adapted import AdaptedViT
from covft.surgery.attention import is_update
from covft.surgery.packed import packed_weight
from covft.surgery.wrapped import NULL_TEXT, WrappedViT
from covft.text.cleaning import RULES_VERSION
from covft.utils.sharding import full, is_main_process, is_sharded
from covft.utils.torch_internals import without_checkpointing
from covft.utils.transformers_names import commit_of, saved_names

Encoder = TypeVar("Encoder", bound=AdaptedViT)


def adapted_state_dict(encoder: WrappedViT) -> dict[str, Tensor]:
    """Return what was added or trained, by its names in the ViT, unsharded.

    Where weights are sharded, every process has to call this.
    """
    return {name: full(tensor) for name, tensor in adapted_tensors(encoder).items()}


def adapted_tensors(encoder: WrappedViT, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return what was added or trained, by its names in the ViT, as the modules hold it.

    Args:
        encoder: A wrapped ViT.
        gathered: Tensors by name that replace those of the modules.
    """
    # Modules that torch wraps for activation checkpointing are not seen in the names of a state dict.
    named = ((without_checkpointing(name), p) for name, p in encoder.vit.named_parameters())
    trained = {name for name, parameter in named if parameter.requires_grad} | set(encoder.norms)
    slots, state = _slot_prefixes(encoder), _state(encoder, gathered)
    return {
        name: tensor for name, tensor in state.items() if name.startswith(slots) or name in trained or is_update(name)
    }


def base_state_dict(encoder: WrappedViT, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the ViT's weights as they were before wrapping, by their names then.

    Other parameters that the caller trained have their present values.

    Args:
        encoder: A wrapped ViT.
        gathered: Tensors by name that replace those of the modules.
    """
    original = encoder.original
    # With other names of the same FFN, and second halves.
    slots = (*(f"{path}." for path in original.ffns), f"{NULL_TEXT}.")
    whole = _state(encoder, gathered)
    state = {name: tensor for name, tensor in whole.items() if not (name.startswith(slots) or is_update(name))}
    state.update({name: value for name, value in original.values.items() if name in state})
    for path, ffn in original.ffns.items():
        state.update({f"{path}.{name}": tensor for name, tensor in ffn.state_dict().items()})
    return state


def save(
    encoder: WrappedViT,
    folder: str | Path,
    *,
    gathered: Mapping[str, Tensor] | None = None,
    writes: bool | None = None,
) -> None:
    """Write a saved folder; see `ContextEncoder.save_pretrained`.

    Sharded weights are gathered one by one, in which every process has to take part.

    Args:
        encoder: A wrapped ViT.
        folder: Created if it does not exist.
        gathered: Weights of the ViT by name that another library has gathered; then no process waits for another.
        writes: Whether this process writes. None: every process that calls this, but of sharded weights the first one.

    Raises:
        CheckpointError: If the folder is a file, or weights are on the meta device, or sharded and not in `gathered`,
            or experts are quantised.
        UnsupportedViTError: If other code has removed, renumbered or replaced adapted blocks.
    """
    encoder.check_in_place("save_pretrained()", complete=True)
    check_unpacked(encoder)
    adapted, base = adapted_tensors(encoder, gathered), base_state_dict(encoder, gathered)
    write(encoder, folder, adapted, base, _config, model_card, gathered=gathered is not None, writes=writes)


def check_unpacked(encoder: WrappedViT) -> None:
    """Refuse to save adapted FFNs that were quantised since: files hold what was trained.

    Raises:
        CheckpointError: If one was.
    """
    for layer, slot in encoder.slots().items():
        packed = packed_weight(slot, encoder.spec.blocks[layer].mlp_path)
        if packed is not None:
            raise CheckpointError(
                "The experts are quantised, and a saved folder holds them as they were trained.",
                expected="experts in float32, bfloat16 or float16",
                got=packed,
                fix="save before quantising, and quantise again after covft.load or covft.load_model",
            )


def write(
    encoder: Encoder,
    folder: str | Path,
    adapted: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    config_of: Callable[[Encoder, dict[str, Tensor], dict[str, Tensor]], dict[str, Any]],
    card_of: Callable[[Encoder], str],
    *,
    gathered: bool,
    writes: bool | None,
) -> None:
    """Gather what a changed ViT has added or trained, and write it with what it belongs to.

    Args:
        encoder: The changed ViT.
        folder: Created if it does not exist.
        adapted: What is saved, by its names in the ViT.
        base: The ViT's weights before the change, by their names then.
        config_of: Returns the configuration, for the tensors of both by their names in saved folders.
        card_of: Returns the model card.
        gathered: Whether another library has gathered the weights.
        writes: As for `save`.

    Raises:
        CheckpointError: As for `save`.
    """
    tensors = [*adapted.items(), *sorted(base.items())]
    sharded = {name: tensor for name, tensor in tensors if is_sharded(tensor)}
    if writes is None:
        writes = not sharded or is_main_process()
    if gathered and not writes:
        return
    if gathered:
        _check_gathered(sharded)
    meta = [name for name, tensor in tensors if tensor.is_meta]
    if meta or not writes:
        for tensor in sharded.values():
            full(tensor)  # the process that writes, or any other without an error, waits for this
    if meta and writes:
        raise CheckpointError(
            "Weights on the meta device have no values to save.",
            expected="weights in memory, also at the time of wrap() or tune()",
            got=_first(meta),
            fix="load the ViT's weights on the process that saves, then wrap or tune it, then shard it",
        )
    if writes:
        named = saved_names(encoder.vit)
        unsharded = {named(name): full(tensor).cpu() if name in sharded else tensor for name, tensor in adapted.items()}
        config = config_of(encoder, unsharded, {named(name): tensor for name, tensor in base.items()})
        write_folder(folder, unsharded, config, card_of(encoder))
        encoder.saved_in = Path(folder)


def _check_gathered(sharded: Collection[str]) -> None:
    """Refuse a state dict that does not have all weights that are saved.

    Args:
        sharded: Names of those that it lacks.

    Raises:
        CheckpointError: If there are any.
    """
    if sharded:
        raise CheckpointError(
            "Weights are sharded, and the state dict does not have them.",
            expected="the state dict of the complete model",
            got=f"without {_first(sharded)}",
            fix="model.save_pretrained(folder, state_dict=accelerator.get_state_dict(model)), with ZeRO-3 under "
            "stage3_gather_16bit_weights_on_model_save",
        )


def push(encoder: WrappedViT, repo_id: str, **kwargs: Any) -> str:
    """Save to a repository of the Hugging Face Hub; see `ContextEncoder.push_to_hub`.

    Returns:
        Address of the commit; empty on a process that wrote nothing.
    """
    from huggingface_hub import HfApi

    private = kwargs.pop("private", None)
    api = HfApi(token=kwargs.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save(encoder, folder)
        if not (Path(folder) / CONFIG_NAME).exists():
            return ""
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))


def _config(encoder: WrappedViT, saved: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Any]:
    norms = set(map(saved_names(encoder.vit), encoder.norms))
    extra = sorted(set(saved) & set(base) - norms)
    own = {name: tensor for name, tensor in base.items() if name not in extra}
    config = encoder.covft_config
    cleaning = {"cleaning": RULES_VERSION} if config.instructions == "clean" else {}
    return {"covft": config.to_dict(), "extra": extra, **cleaning, **common_config(encoder, saved, own)}


def common_config(encoder: AdaptedViT, saved: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the configuration of every saved folder has.

    Args:
        encoder: The changed ViT.
        saved: What is saved.
        base: Weights of the ViT that the change leaves as they were.
    """
    return {
        "library_version": __version__,
        "base": {
            "source": public_source(source_of(encoder.vit)),
            "revision": public_revision(commit_of(encoder.vit)),
            "library": encoder.spec.library,
            "class_name": encoder.spec.class_name,
            "fingerprint": fingerprint(base.items()),
        },
        "text": {
            "source": public_source(encoder.text_name),
            "text_dim": encoder.text_dim,
            "revision": public_revision(encoder.text_revision),
        },
        "reading": encoder.reading,
        **_dtypes(saved),
    }


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the most frequent type of the tensors, and the types of the others by name, for the configuration.

    Args:
        tensors: What is saved.
    """
    found = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    dtype = Counter(found.values() or ("float32",)).most_common(1)[0][0]
    return {"dtype": dtype, "other_dtypes": {name: found[name] for name in sorted(found) if found[name] != dtype}}


def _state(encoder: WrappedViT, gathered: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    state: dict[str, Tensor] = encoder.vit.state_dict(keep_vars=True)
    return {**state, **{name: tensor for name, tensor in (gathered or {}).items() if name in state}}


def _first(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:5])


def _slot_prefixes(encoder: WrappedViT) -> tuple[str, ...]:
    return (*(f"{encoder.spec.blocks[layer].mlp_path}." for layer in encoder.layers), f"{NULL_TEXT}.")

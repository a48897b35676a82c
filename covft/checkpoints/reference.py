"""Imports checkpoints that the paper's authors released."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from covft.checkpoints.folder import check_trained_weights, compare_tensors
from covft.errors import CheckpointError
from covft.nn.context import CrossAttentionContext
from covft.nn.experts import Experts
from covft.surgery.slot import AdaptedFFN
from covft.surgery.wrapped import WrappedViT
from covft.utils.arguments import check_kinds

_LAYER_KEY = re.compile(r"(?:^|.*\.)layers\.(\d+)\.(.+)$")
_REFINEMENT = {"fc1": "up", "fc2": "down", "ln": "norm"}


@check_kinds
def import_reference(encoder: WrappedViT, path_or_state_dict: str | Path | Mapping[str, Tensor]) -> None:
    """Put the weights of a checkpoint that the paper's authors released into an encoder, exactly.

    The released arithmetic is that of `CoVFTConfig.reference()`:

        encoder = covft.wrap(vit, bert, layers=range(11, 23), config=CoVFTConfig.reference())
        covft.checkpoints.import_reference(encoder, "path/to/checkpoint")

    Experts, refinements, attention and router of every adapted layer are read, and the norms of the ViT that the
    checkpoint holds. Parameters that cannot change an output (the text half of the keys and their bias) do not exist
    here and are dropped.

    Args:
        encoder: A wrapped ViT with the same layers, experts and widths, context `"cve"`, dense routing.
        path_or_state_dict: A folder or file (`.safetensors`, `.bin`, `.pt`, or an index of shards), or
            the tensors by name; any prefix may precede `layers.{i}.mlp.`.

    Raises:
        CheckpointError: If the encoder is built differently, or tensors are missing, unexpected or of
            another shape; nothing has been changed then.
    """
    _check_reference_settings(encoder)
    if isinstance(path_or_state_dict, Mapping):
        released: Mapping[str, Tensor] = path_or_state_dict
    else:
        released = _read_any(Path(path_or_state_dict))
    by_layer, norms = _released_parts(encoder, released)
    slots = encoder.slots()
    wanted = {
        f"layers.{layer}.mlp.{name}": shape
        for layer, slot in slots.items()
        for name, shape in _reference_shapes(slot).items()
    }
    found = {f"layers.{i}.mlp.{n}": tuple(t.shape) for i, part in by_layer.items() for n, t in part.items()}
    for name, value in norms.items():
        wanted[name] = tuple(encoder.vit.get_parameter(name).shape)
        found[name] = tuple(value.shape)
    compare_tensors(wanted, found, "the released checkpoint")
    for part in (*by_layer.values(), norms):
        check_trained_weights(part, "the released checkpoint")
    with torch.no_grad():
        for layer, slot in slots.items():
            _fill_from_reference(slot, by_layer[layer])
        for name, value in norms.items():
            encoder.vit.get_parameter(name).copy_(value)


def _check_reference_settings(encoder: WrappedViT) -> None:
    settings = encoder.covft_config
    found = (settings.routing, settings.context, settings.activation, settings.expert_rank, settings.attention_rank)
    if found != ("dense", "cve", "quick_gelu", None, None):
        raise CheckpointError(
            "The encoder does not compute what the released implementation computes.",
            expected="routing='dense', context='cve', activation='quick_gelu', expert_rank=None, attention_rank=None",
            got=f"routing={settings.routing!r}, context={settings.context!r}, activation={settings.activation!r}, "
            f"expert_rank={settings.expert_rank}, attention_rank={settings.attention_rank}",
            fix="covft.wrap(vit, text_encoder, layers=..., config=CoVFTConfig.reference())",
        )
    for layer, slot in encoder.slots().items():
        linears = _linears(slot.experts.prototype)
        if len(linears) != 2 or any(linear.bias is None for linear in linears):
            raise CheckpointError(
                f"The experts of layer {layer} are not built like the released ones.",
                expected="two biased linear layers",
                got=f"{len(linears)} linear layers in {type(slot.experts.prototype).__name__}",
            )


def _experts(slot: AdaptedFFN) -> Experts:
    assert isinstance(slot.experts, Experts), "checked with the settings"
    return slot.experts


def _linears(ffn: nn.Module) -> list[nn.Linear]:
    return [module for module in ffn.modules() if isinstance(module, nn.Linear)]


def _released_parts(
    encoder: WrappedViT, released: Mapping[str, Tensor]
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    by_layer: dict[int, dict[str, Tensor]] = {layer: {} for layer in encoder.layers}
    norms: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    foreign: list[str] = []
    marks = ("experts.", "image_resblock.", "text_resblock.", "cross_attn.", "gate.")
    for key, tensor in released.items():
        match = _LAYER_KEY.match(key)
        if match is None or ("vision" not in key and key.startswith(("model.layers.", "lm_head"))):
            continue  # the language model and the projector
        layer, rest = int(match[1]), match[2]
        if rest.startswith("mlp.") and rest.removeprefix("mlp.").startswith(marks):
            if layer in by_layer:
                by_layer[layer][rest.removeprefix("mlp.")] = tensor
            else:
                foreign.append(key)
        elif layer < encoder.spec.depth:
            name = f"{encoder.spec.blocks[layer].path}.{rest}"
            if name in encoder.norms:
                norms[name] = tensor
            elif rest.rpartition(".")[0] in encoder.spec.blocks[layer].norms:
                frozen[name] = tensor
    if foreign:
        raise CheckpointError(
            "The released checkpoint has adapted layers that this encoder does not have.",
            expected=f"layers {list(encoder.layers)}",
            got=", ".join(foreign[:4]) + (" ..." if len(foreign) > 4 else ""),
            fix="covft.wrap(vit, text_encoder, layers=the layers of the checkpoint, config=CoVFTConfig.reference())",
        )
    _refuse_frozen_norms(encoder, frozen)
    return by_layer, norms


def _refuse_frozen_norms(encoder: WrappedViT, released: dict[str, Tensor]) -> None:
    """Refuse norms that the checkpoint has trained and the encoder freezes: outputs would differ."""
    state = encoder.vit.state_dict()
    trained = [
        name
        for name, tensor in released.items()
        if name in state
        and tensor.shape == state[name].shape
        and not torch.allclose(tensor.cpu().float(), state[name].detach().cpu().float(), rtol=2**-7, atol=1e-6)
    ]
    if trained:
        raise CheckpointError(
            "The released checkpoint has trained norms that this encoder freezes.",
            expected=f"train_norms={encoder.covft_config.train_norms!r} to cover every norm that was trained",
            got=", ".join(trained[:4]) + (" ..." if len(trained) > 4 else ""),
            fix="covft.wrap(..., config=CoVFTConfig.reference(train_norms='all'))",
        )


def _reference_shapes(slot: AdaptedFFN) -> dict[str, tuple]:
    context = slot.context
    assert isinstance(context, CrossAttentionContext)
    text_dim, embed_dim = context.context_dim, slot.embed_dim
    shapes: dict[str, tuple] = {}
    for index, expert in enumerate(_experts(slot)):
        for place, linear in zip((0, 2), _linears(expert), strict=True):
            shapes[f"experts.{index}.{place}.weight"] = tuple(linear.weight.shape)
            shapes[f"experts.{index}.{place}.bias"] = tuple(linear.bias.shape)
    for name, block in (("image_resblock", context.image), ("text_resblock", context.text)):
        for theirs, ours in _REFINEMENT.items():
            for kind, tensor in block.get_submodule(ours).named_parameters():
                shapes[f"{name}.{theirs}.{kind}"] = tuple(tensor.shape)
    shapes["cross_attn.q_proj_weight"] = (text_dim, text_dim)
    shapes["cross_attn.k_proj_weight"] = shapes["cross_attn.v_proj_weight"] = (text_dim, embed_dim + text_dim)
    shapes["cross_attn.in_proj_bias"] = (3 * text_dim,)
    shapes["cross_attn.out_proj.weight"], shapes["cross_attn.out_proj.bias"] = (text_dim, text_dim), (text_dim,)
    shapes["gate.weight"], shapes["gate.bias"] = (len(slot.experts), text_dim), (len(slot.experts),)
    return shapes


def _fill_from_reference(slot: AdaptedFFN, part: dict[str, Tensor]) -> None:
    context = slot.context
    assert isinstance(context, CrossAttentionContext)
    for index, expert in enumerate(_experts(slot)):
        for place, linear in zip((0, 2), _linears(expert), strict=True):
            linear.weight.copy_(part[f"experts.{index}.{place}.weight"])
            linear.bias.copy_(part[f"experts.{index}.{place}.bias"])
    for name, block in (("image_resblock", context.image), ("text_resblock", context.text)):
        for theirs, ours in _REFINEMENT.items():
            for kind, tensor in block.get_submodule(ours).named_parameters():
                tensor.copy_(part[f"{name}.{theirs}.{kind}"])
    prefix = "cross_attn."
    attention = {key.removeprefix(prefix): t for key, t in part.items() if key.startswith(prefix)}
    context.attention.load_multihead_attention(attention)
    gate = slot.router.gate
    gate.weight.copy_(part["gate.weight"])  # type: ignore[union-attr, operator]
    gate.bias.copy_(part["gate.bias"])  # type: ignore[union-attr, operator]


def _read_any(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        for pattern in ("*.safetensors.index.json", "*.bin.index.json", "*.safetensors", "*.bin", "*.pt"):
            # Trainer saves its arguments, which are not tensors, in the same folder.
            files = sorted(file for file in path.glob(pattern) if file.name != "training_args.bin")
            if files:
                return {name: tensor for file in files for name, tensor in _read_any(file).items()}
        raise CheckpointError(f"{path} has no weights.", expected=".safetensors, .bin or .pt files")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.", expected="a file, or a folder of weights")
    if path.name.endswith(".index.json"):
        shards = _shards(path)
        absent = [shard for shard in shards if not (path.parent / shard).is_file()]
        if absent:
            raise CheckpointError(f"{path.parent} is incomplete.", expected=", ".join(shards), got=f"no {absent}")
        return {name: t for shard in shards for name, t in _read_any(path.parent / shard).items()}
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read.", expected="tensors by name", got=reason) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} does not hold weights.", expected="tensors by name", got=type(state).__name__)
    return state.get("state_dict", state)


def _shards(path: Path) -> list[str]:
    """Return the names of the files in an index, which are next to it."""
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        beside = all(isinstance(name, str) and Path(name).name == name and "\\" not in name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{path} cannot be read.", expected="an index of weights", got=got) from error
    if not names or not beside or any(name.endswith(".json") for name in names):
        raise CheckpointError(
            f"{path} does not name files of weights next to it.", expected="names without a path", got=str(names)[:200]
        )
    return names

"""The wrapped ViT."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from covft import compression, saving
from covft.adapters.spec import ViTSpec
from covft.compression import CompressionReport
from covft.conditioning import Conditioning, Scope
from covft.config import CoVFTConfig
from covft.errors import (
    ConfigError,
    MergeError,
    MissingContextError,
    ReentrantCheckpointError,
    ShapeError,
    TextEncoderError,
    UnsupportedViTError,
)
from covft.nn.experts import Experts
from covft.nn.losses import load_balance_loss
from covft.slot import AdaptedFFN, Original
from covft.text import CachedTextEncoder, TextEncoder


class ContextEncoder(nn.Module):
    """A ViT whose features depend on the question: what `covft.wrap` returns.

    It holds the ViT that was wrapped, in place, and can stand where it stood: public attributes of the
    ViT (`config`, `dtype`, `embed_dim`, ...) answer through it. The text encoder is no part of its
    state: never saved, trained or moved.

    Attributes:
        vit: The wrapped ViT.
        covft_config: The settings, with `layers` as non-negative indices.
        spec: What covft knows of the ViT.
        layers: Indices of the adapted blocks, ascending.
        norms: Names of the ViT's norm parameters that are trained.
        text_encoder: The frozen text encoder; None after unpickling, or where none is needed.
    """

    text_encoder: TextEncoder | None

    def __init__(
        self,
        vit: nn.Module,
        text_encoder: TextEncoder | None,
        covft_config: CoVFTConfig,
        spec: ViTSpec,
        conditioning: Conditioning,
        original: Original,
    ) -> None:
        super().__init__()
        self.vit = vit
        self.covft_config = covft_config
        self.spec = spec
        self.layers: tuple[int, ...] = tuple(sorted(covft_config.layers or ()))
        self.conditioning = conditioning
        self.original = original
        self.norms: tuple[str, ...] = tuple(original.values)
        self.text_name = None if text_encoder is None else text_encoder.name
        self.context_dim = None if text_encoder is None else text_encoder.width
        # Past nn.Module's own __setattr__: even a text encoder that is a module must not become a child.
        self.__dict__["text_encoder"] = text_encoder
        self.training = vit.training

    # Calling it

    def forward(
        self,
        images: Tensor | None = None,
        text: str | Sequence[str] | Tensor | Mapping[str, Tensor] | None = None,
        *,
        index: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode images in the light of the text.

        Args:
            images: Whatever the ViT takes first, usually `(B, 3, H, W)`; may also come by the ViT's own
                keyword, such as `pixel_values=`.
            text: A question for all images, one per image, features `(S, C)`, or a tokenised batch;
                None takes the text of an open `condition(...)`.
            index: Which text each image belongs to, shape `(B,)`; None where image i has text i.
            **kwargs: Handed on to the ViT.

        Returns:
            What the ViT itself returns, unchanged in type.

        Raises:
            MissingContextError: If there is no text, neither here nor from `condition(...)`.
            ShapeError: If texts and images do not fit together.
            TextEncoderError: If a text is empty.

        Example:
            >>> tokens = encoder(images, ["What is left of the cup?"])  # doctest: +SKIP
        """
        args = () if images is None else (images,)
        if text is None:
            if index is not None:
                raise ShapeError("index= was given without text.", expected="index= beside text", got="text=None")
            return self.vit(*args, **kwargs)
        scope = self._enter(text, index)
        try:
            return self.vit(*args, **kwargs)
        finally:
            self.conditioning.leave(scope)

    @contextlib.contextmanager
    def condition(
        self,
        text: str | Sequence[str] | Tensor | Mapping[str, Tensor] | None,
        index: Tensor | Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Hold the text for calls of the ViT that other code makes.

        Args:
            text: As for calling the encoder.
            index: As for calling the encoder.

        Example:
            >>> with encoder.condition(["How many cups?"]):  # doctest: +SKIP
            ...     output = mllm(pixel_values=pixel_values, input_ids=input_ids)
        """
        scope = self._enter(text, index)
        try:
            yield
        finally:
            self.conditioning.leave(scope)

    def encode_text(self, text: str | Sequence[str] | Mapping[str, Tensor]) -> Tensor:
        """Features of texts, each encoded alone, cached per distinct string.

        Args:
            text: One text, several, or a tokenised batch.

        Returns:
            Shape `(S, C)`, on the ViT's device, without gradient.

        Raises:
            TextEncoderError: If a text is empty, or there is no text encoder.
        """
        encoder = self.text_encoder
        if encoder is None:
            raise TextEncoderError(
                "This encoder has no text encoder.",
                expected="a text encoder, or text features of shape (S, C)",
                got="None" if self.text_name is None else f"{self.text_name} was left behind by pickling",
                fix="encoder.set_text_encoder(covft.text.as_text_encoder(...))",
            )
        if isinstance(encoder, CachedTextEncoder):
            encoder.to(self._device())  # moves what covft itself loaded, nothing else
        if isinstance(text, Mapping):
            encode_tokens = getattr(encoder, "encode_tokens", None)
            if encode_tokens is None:
                raise TextEncoderError(
                    f"{encoder.name} takes questions as strings, not a tokenised batch.",
                    expected="list[str]",
                    got=f"a batch of {', '.join(text)}",
                    fix="pass the strings, or give the text encoder a method encode_tokens(batch)",
                )
            features = encode_tokens(text)
        else:
            features = encoder.encode([text] if isinstance(text, str) else list(text))
        return features.to(self._device())

    def set_text_encoder(self, text_encoder: TextEncoder | None) -> None:
        """Put another text encoder of the same width in place, such as after unpickling.

        Raises:
            ShapeError: If its width is another.
        """
        if text_encoder is not None and self.context_dim is not None and text_encoder.width != self.context_dim:
            raise ShapeError(
                "The text encoder does not fit this encoder.",
                expected=f"width {self.context_dim}",
                got=f"width {text_encoder.width} ({text_encoder.name})",
            )
        self.__dict__["text_encoder"] = text_encoder

    def _enter(self, text: Any, index: Any) -> Scope:
        shared = isinstance(text, str) and index is None
        features = None if text is None else self._features(text)
        return self.conditioning.enter(features, self._index(index, features), shared=shared)

    def _features(self, text: Any) -> Tensor:
        if not isinstance(text, Tensor):
            return self.encode_text(text)
        if text.dim() != 2 or (self.context_dim is not None and text.shape[1] != self.context_dim):
            raise ShapeError(
                "These are no text features for this encoder.",
                expected=f"shape (S, {self.context_dim})",
                got=tuple(text.shape),
                fix="encoder.encode_text(texts)",
            )
        if not text.is_floating_point():
            raise ShapeError(
                "Text features are floating-point numbers.",
                expected="float32, bfloat16, ...",
                got=text.dtype,
                fix="pass token ids as a tokenised batch: {'input_ids': ..., 'attention_mask': ...}",
            )
        return text.to(self._device())

    def _index(self, index: Any, features: Tensor | None) -> Tensor | None:
        if index is None:
            return None
        index = torch.as_tensor(index)
        num_texts = 0 if features is None else len(features)
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ShapeError(
                "index= says which text each image belongs to.",
                expected="whole numbers of shape (B,)",
                got=f"{index.dtype} of shape {tuple(index.shape)}",
            )
        if not torch.compiler.is_compiling() and index.numel():
            lowest, highest = int(index.min()), int(index.max())
            if lowest < 0 or highest >= num_texts:
                raise ShapeError(
                    "index= points at texts that are not there.",
                    expected=f"values in [0, {num_texts - 1}]  ({num_texts} texts)",
                    got=f"values in [{lowest}, {highest}]",
                )
        return index.long().to(self._device())

    def _device(self) -> torch.device:
        return next(self.vit.parameters()).device

    # What the last forward decided

    def slots(self) -> dict[int, AdaptedFFN]:
        """The adapted FFNs, by layer."""
        paths = {layer: self.spec.blocks[layer].mlp_path for layer in self.layers}
        return {layer: self.vit.get_submodule(path) for layer, path in paths.items()}  # type: ignore[misc]

    def routing_weights(self) -> dict[int, Tensor]:
        """Routing weights of the last forward, by layer, shape `(B, E)`, without gradient."""
        return {layer: slot.record.routing.weights_BE for layer, slot in self.slots().items() if slot.record}

    def context_vectors(self) -> dict[int, Tensor]:
        """Context vectors of the last forward, by layer, shape `(B, width)`, without gradient.

        Empty for routings that have no context.
        """
        return {
            layer: slot.record.context_BW
            for layer, slot in self.slots().items()
            if slot.record and slot.record.context_BW is not None
        }

    def aux_loss(self) -> Tensor:
        """Load-balancing loss of the last forward, the mean over layers; 0 unless routing is sparse.

        Returns:
            A scalar to add, with a small factor such as 0.01, to the training loss.

        Raises:
            MissingContextError: If there was no forward yet.
        """
        if self.covft_config.routing != "sparse":
            return torch.zeros((), device=self._device())
        routings = [slot.record.routing for slot in self.slots().values() if slot.record is not None]
        losses = [
            load_balance_loss(routing.logits_BE, routing.expert_ids_BK)
            for routing in routings
            if routing.logits_BE is not None and routing.expert_ids_BK is not None
        ]
        if not losses:
            raise MissingContextError("There is no routing yet to take a loss of.", fix="call the encoder first")
        return torch.stack(losses).mean()

    # Training it

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that are trained."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        trainable = sum(parameter.numel() for parameter in self.trainable_parameters())
        total = sum(parameter.numel() for parameter in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def param_groups(
        self,
        lr: float,
        *,
        experts_lr: float | None = None,
        router_lr: float | None = None,
        norms_lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, by role; biases and norms are not decayed.

        Args:
            lr: Learning rate of every role that has none of its own.
            experts_lr: Of the experts.
            router_lr: Of the router and the context.
            norms_lr: Of the ViT's norms.
            weight_decay: Of the matrices.

        Returns:
            Dicts with `params`, `lr`, `weight_decay` and `name`; every trained parameter is in one.

        Example:
            >>> optimizer = torch.optim.AdamW(encoder.param_groups(lr=2e-5))  # doctest: +SKIP
        """
        rates = {"experts": experts_lr, "router": router_lr, "norms": norms_lr, "other": None}
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.vit.named_parameters():
            if not parameter.requires_grad:
                continue
            role, decays = self.role_of(name), parameter.dim() > 1
            rate = rates[role]
            group = groups.setdefault(
                f"{role}/{'decay' if decays else 'no_decay'}",
                {
                    "params": [],
                    "lr": lr if rate is None else rate,
                    "weight_decay": weight_decay if decays else 0.0,
                },
            )
            group["params"].append(parameter)
        return [{**group, "name": name} for name, group in groups.items()]

    def role_of(self, name: str) -> str:
        """What a parameter of the ViT is for: `"experts"`, `"router"` (with the context), `"norms"` or `"other"`.

        Args:
            name: Its name in the ViT.
        """
        for layer in self.layers:
            prefix = f"{self.spec.blocks[layer].mlp_path}."
            if name.startswith(prefix):
                inner = name.removeprefix(prefix)
                if inner.startswith("experts.shared."):
                    return "other"  # the pretrained FFN that low-rank experts share, which stays frozen
                return "experts" if inner.startswith("experts.") else "router"
        return "norms" if name in self.norms else "other"

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations of the blocks during backward, by the ViT library's own switch.

        Args:
            gradient_checkpointing_kwargs: As transformers takes them; `use_reentrant` must not be True.

        Raises:
            ReentrantCheckpointError: If `use_reentrant=True` was asked for.
            UnsupportedViTError: If the ViT has no such switch.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ReentrantCheckpointError(
                "Reentrant checkpointing gives the experts of a frozen ViT no gradient.",
                expected="use_reentrant=False",
                got="use_reentrant=True",
                fix="encoder.gradient_checkpointing_enable()",
            )
        self._switch_checkpointing(on=True, options=options)

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        self._switch_checkpointing(on=False, options={})

    def _switch_checkpointing(self, *, on: bool, options: dict[str, Any]) -> None:
        vit = self.vit
        if hasattr(vit, "activation_checkpointing_enable"):  # transformers 5
            if on:
                vit.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # type: ignore[operator]
            else:
                vit.activation_checkpointing_disable()  # type: ignore[operator]
        elif hasattr(vit, "gradient_checkpointing_enable"):
            if on:
                vit.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
            else:
                vit.gradient_checkpointing_disable()  # type: ignore[operator]
        elif hasattr(vit, "set_grad_checkpointing"):  # timm, open_clip
            vit.set_grad_checkpointing(on)  # type: ignore[operator]
        else:
            raise UnsupportedViTError(
                f"{type(vit).__name__} has no switch for activation checkpointing.",
                expected="gradient_checkpointing_enable() or set_grad_checkpointing()",
                fix="torch.utils.checkpoint.checkpoint(encoder, images, texts, use_reentrant=False)",
            )

    def set_recompute(self, recompute: str) -> None:
        """Choose what backward computes again of whole experts and of the context, instead of keeping it.

        Args:
            recompute: `"none"`, `"activation"` or `"all"`; see `CoVFTConfig`.

        Raises:
            ConfigError: If it is not known.
        """
        self.covft_config = dataclasses.replace(self.covft_config, recompute=recompute)
        for slot in self.slots().values():
            slot.set_recompute(recompute)

    def skip_experts(self, below: float) -> None:
        """In eval mode, leave out experts whose weight for an image is small; the others' weights are scaled up.

        Not exact, and off (0) unless asked for. Low-rank experts cost too little to be left out.

        Args:
            below: Weights under this are left out; 0 leaves out none.

        Raises:
            ConfigError: If it is not in [0, 1 / experts]: some expert has to be left.
        """
        if not 0 <= below <= 1 / self.covft_config.experts:
            raise ConfigError(
                f"below={below} could leave an image without any expert.",
                expected=f"0 to {1 / self.covft_config.experts:g}  ({self.covft_config.experts} experts)",
                got=below,
            )
        for slot in self.slots().values():
            if isinstance(slot.experts, Experts):
                slot.experts.skip_below = below

    def compress(
        self, rank: int, images: Any = None, text: Any = None, *, show: bool = False, **kwargs: Any
    ) -> CompressionReport:
        """Store trained experts as one FFN that they share and differences of low rank, in place.

        It makes inference cheaper: the shared products are computed once. What is lost is in the report.

        Args:
            rank: Rank of the differences, such as 64.
            images: As for calling the encoder, to measure the error of outputs.
            text: As for calling the encoder.
            show: Whether to show a progress bar; a ViT-L takes some ten seconds.
            **kwargs: As for calling the encoder, such as `grid_thw`.

        Returns:
            Parameters before and after, and errors of weights and outputs.

        Raises:
            UnsupportedViTError: If the experts cannot be compressed; nothing has changed then.
        """
        return compression.compress(self, rank, images, text, show=show, **kwargs)

    def merge(self) -> None:
        """Refused: there is no exact merge.

        Raises:
            MergeError: Always.
        """
        raise MergeError(
            "The experts cannot be merged into one FFN: how they are mixed depends on the image and the text.",
            fix="keep the encoder as it is, or take the ViT back as it was with covft.unwrap(encoder)",
        )

    # Saving it

    def adapted_state_dict(self) -> dict[str, Tensor]:
        """What was added or trained, by the names it has in the ViT: experts, contexts, routers, norms.

        Parameters of the ViT that the caller made trainable are included.
        """
        return saving.adapted_state_dict(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save what was added or trained, with what it belongs to; `covft.load` is the inverse.

        Writes `covft_config.json`, `model.safetensors` and, if there is none, `README.md`. A save that
        is cut short is never taken for a whole one. Where weights are sharded (FSDP2, ZeRO-3) every process
        has to call this, and the first one writes.

        Args:
            folder: Made if it does not exist.

        Raises:
            CheckpointError: If the folder is a file, or weights are on the meta device.
        """
        saving.save(self, folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save to a repository of the Hugging Face Hub.

        Args:
            repo_id: Such as `name/repository`; made if it does not exist.
            **kwargs: `private` and `token`, and the options of `huggingface_hub.HfApi.upload_folder`, such as
                `commit_message`.

        Returns:
            Address of the commit.
        """
        return saving.push(self, repo_id, **kwargs)

    # Standing where the ViT stood

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            vit = self.__dict__.get("_modules", {}).get("vit")
            if vit is None or name.startswith("_"):
                raise
            return getattr(vit, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextEncoder:
        memo[id(self.text_encoder)] = self.text_encoder  # frozen, so copies share it
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "text_encoder": None}

    def extra_repr(self) -> str:
        """One line about the settings, for `print(encoder)`."""
        config = self.covft_config
        shown = {"layers": list(self.layers)}
        shown.update({name: getattr(config, name) for name in ("experts", "routing", "context")})
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

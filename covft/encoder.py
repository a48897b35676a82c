"""The wrapped ViT."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.checkpoints import saving
from covft.conditioning import Conditioning, Generator, Scope
from covft.config import CoVFTConfig
from covft.errors import ConfigError, MergeError, MissingContextError, ShapeError, TextEncoderError
from covft.nn.losses import load_balance_loss
from covft.surgery.activation_checkpointing import set_activation_checkpointing
from covft.surgery.precision import widen
from covft.surgery.slot import Original
from covft.surgery.wrapped import TextSource, WrappedViT
from covft.text import CachedTextEncoder, TextEncoder
from covft.text.base import in_order
from covft.text.cleaning import clean_instruction
from covft.text.inputs import as_index, check_text_features
from covft.utils.arguments import check_kinds
from covft.utils.parameters import param_groups


class ContextEncoder(WrappedViT):
    """A ViT whose features depend on the question: what `covft.wrap` returns.

    It holds the ViT that was wrapped, in place, and can stand where it stood: public attributes of the ViT (`config`,
    `dtype`, `embed_dim`, ...) answer through it. The text encoder is not part of its state: never saved, trained or
    moved.

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
        source = TextSource()
        if text_encoder is not None:
            revision = getattr(text_encoder, "revision", None)
            source = TextSource(text_encoder.name, text_encoder.text_dim, revision)
        super().__init__(vit, covft_config, spec, conditioning, original, source)
        # Past nn.Module's own __setattr__: even a text encoder that is a module must not become a child.
        self.__dict__["text_encoder"] = text_encoder

    # Call

    def forward(
        self,
        images: Tensor | None = None,
        text: str | Sequence[str] | Tensor | Mapping[str, Tensor] | None = None,
        *,
        index: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode images, each conditioned on its text.

        Args:
            images: Whatever the ViT takes first, usually `(B, 3, H, W)`; may also come by the ViT's own keyword, such
                as `pixel_values=`.
            text: A question for all images, one per image, features `(S, C)`, or a tokenised batch; None takes the
                text of an open `condition(...)`.
            index: Which text each image has, shape `(B,)`; None where image i has text i.
            **kwargs: Passed to the ViT.

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
                raise ShapeError("index= was given without text.", expected="text= with index=", got="text=None")
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
        generator = None if torch.compiler.is_compiling() else Generator.around_caller()
        scope = self._enter(text, index, generator)
        try:
            yield
        finally:
            self.conditioning.leave(scope)

    def encode_text(self, text: str | Sequence[str] | Mapping[str, Tensor]) -> Tensor:
        """Encode texts, each alone, cached per distinct string, and cleaned if the settings say so.

        Args:
            text: One text, several, or a tokenised batch.

        Returns:
            Features, shape `(S, C)`, on the ViT's device, without gradient.

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
            texts = [text] if isinstance(text, str) else in_order(text)
            if self.covft_config.instructions == "clean":
                texts = [clean_instruction(entry) if isinstance(entry, str) else entry for entry in texts]
            features = encoder.encode(texts)
        return features.to(self._device())

    @check_kinds
    def set_text_encoder(self, text_encoder: TextEncoder | None) -> None:
        """Replace the text encoder by another of the same width, such as after unpickling.

        Raises:
            ShapeError: If its width is another.
        """
        if text_encoder is not None and self.text_dim is not None and text_encoder.text_dim != self.text_dim:
            raise ShapeError(
                "The text encoder does not fit this encoder.",
                expected=f"width {self.text_dim}",
                got=f"width {text_encoder.text_dim} ({text_encoder.name})",
            )
        self.__dict__["text_encoder"] = text_encoder

    def _enter(self, text: Any, index: Any, generator: Generator | None = None) -> Scope:
        features = text
        if isinstance(text, Tensor):
            check_text_features(text, self.text_dim)
            features = text.to(self._device())
        elif text is not None:
            features = self.encode_text(text)
        if index is not None:
            index = as_index(index, 0 if features is None else len(features)).to(self._device())
        shared = isinstance(text, str) and index is None
        return self.conditioning.enter(features, index, shared=shared, generator=generator)

    def _device(self) -> torch.device:
        return next(self.vit.parameters()).device

    # Inspect the last forward

    def routing_weights(self) -> dict[int, Tensor]:
        """Return the routing weights of the last forward, by layer, shape `(B, E)`, without gradient."""
        return {layer: slot.record.routing.weights_BE for layer, slot in self.slots().items() if slot.record}

    def context_vectors(self) -> dict[int, Tensor]:
        """Return the context vectors of the last forward, by layer, shape `(B, W)`, without gradient.

        Empty for routings that have no context.
        """
        return {
            layer: slot.record.context_BW
            for layer, slot in self.slots().items()
            if slot.record and slot.record.context_BW is not None
        }

    def aux_loss(self) -> Tensor:
        """Return the load-balancing loss of the last forward, the mean over layers; 0 unless routing is sparse.

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

    # Train

    @check_kinds
    def param_groups(
        self,
        lr: float,
        *,
        experts_lr: float | None = None,
        router_lr: float | None = None,
        norms_lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Group the trained parameters for an optimizer, by part; biases and norms are not decayed.

        Args:
            lr: Learning rate of every part without a rate of its own.
            experts_lr: Learning rate of the experts.
            router_lr: Learning rate of the router and the context.
            norms_lr: Learning rate of the ViT's norms.
            weight_decay: Weight decay of the matrices.

        Returns:
            Dicts with `params`, `lr`, `weight_decay` and `name`; every trained parameter is in exactly one.

        Example:
            >>> optimizer = torch.optim.AdamW(encoder.param_groups(lr=2e-5))  # doctest: +SKIP
        """
        rates = {"experts": experts_lr, "router": router_lr, "norms": norms_lr}
        return param_groups(self.vit.named_parameters(), self.part_of, lr=lr, rates=rates, weight_decay=weight_decay)

    def train_in_float32(self) -> int:
        """Keep what is trained of experts, routers, contexts and norms in float32, if the ViT is in half precision.

        An optimizer's small steps are rounded away in half precision. Call it before the optimizer is created; the
        callback, `MLLMTrainer` and the launchers do. The rest of the ViT keeps its type, and so do its outputs. Adapted
        FFNs compute in the type of their tokens, or as autocast says. `covft.load` loads in the type of the ViT.

        Returns:
            Number of parameters that were cast; sharded ones are left as they are.
        """
        return widen(self)

    @check_kinds
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations of the blocks during backward, by the ViT library's own switch.

        Args:
            gradient_checkpointing_kwargs: As transformers takes them; `use_reentrant` must not be True.

        Raises:
            ReentrantCheckpointError: If `use_reentrant=True` was asked for.
            UnsupportedViTError: If the ViT has no such switch.
        """
        set_activation_checkpointing(self.vit, on=True, options=gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        set_activation_checkpointing(self.vit, on=False)

    @check_kinds
    def set_recompute(self, recompute: str) -> None:
        """Choose what backward recomputes of experts and contexts instead of keeping it.

        Args:
            recompute: `"none"`, `"activation"` or `"all"`; see `CoVFTConfig`.

        Raises:
            ConfigError: If it is not known.
        """
        self.covft_config = dataclasses.replace(self.covft_config, recompute=recompute)
        for slot in self.slots().values():
            slot.set_recompute(recompute)

    @check_kinds
    def set_kernels(self, kernels: str) -> None:
        """Choose what runs between the matrix products of experts and contexts: activations, weights, sums.

        Triton kernels read and write each tensor once. They need `recompute="activation"` or `"all"`, a GPU, and an
        activation that they know (GELU, its tanh form, QuickGELU, SiLU; plain or gated); elsewhere, torch's
        operations run. They were never measured on a GPU, so they are off by default. The setting is not saved.

        Args:
            kernels: `"eager"`, torch's operations; `"triton"`, kernels of its own.

        Raises:
            ConfigError: If it is not known, or Triton is not installed.
        """
        if kernels not in ("eager", "triton"):
            raise ConfigError(f"kernels={kernels!r} is not known.", expected="'eager' or 'triton'", got=repr(kernels))
        if kernels == "triton" and importlib.util.find_spec("triton") is None:
            fix = "encoder.set_kernels('eager'), or pip install triton, which torch for CUDA brings along"
            raise ConfigError("Triton is not installed.", expected="the package triton", got="none", fix=fix)
        for slot in self.slots().values():
            slot.set_kernels(kernels)

    def merge(self) -> None:
        """Refuse: there is no exact merge.

        Raises:
            MergeError: Always.
        """
        raise MergeError(
            "The experts cannot be merged into one FFN: their weights depend on the image and the text.",
            fix="keep the encoder as it is, or restore the original ViT with covft.unwrap(encoder)",
        )

    # Save

    def adapted_state_dict(self) -> dict[str, Tensor]:
        """Return what was added or trained, by its names in the ViT: experts, contexts, routers, norms.

        Parameters of the ViT that the caller made trainable are included.
        """
        return saving.adapted_state_dict(self)

    @check_kinds
    def save_pretrained(self, folder: str | Path) -> None:
        """Save what was added or trained, and what it belongs to; `covft.load` is the inverse.

        Writes `covft_config.json`, `model.safetensors` and, if there is none, `README.md`. An encoder that is in the
        folder can be loaded until the new one can, also if the save is cut short. Where weights are sharded (FSDP2,
        ZeRO-3) every process has to call this, and the first one writes.

        Args:
            folder: Created if it does not exist.

        Raises:
            CheckpointError: If the folder is a file or cannot be written to, or weights are on the meta device.
        """
        saving.save(self, folder)

    @check_kinds
    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save to a repository of the Hugging Face Hub.

        Args:
            repo_id: Such as `name/repository`; created if it does not exist.
            **kwargs: `private` and `token`, and the options of `huggingface_hub.HfApi.upload_folder`, such as
                `commit_message`.

        Returns:
            Address of the commit.
        """
        return saving.push(self, repo_id, **kwargs)

    # Stand where the ViT stood

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
        """Return one line about the settings, for `print(encoder)`."""
        config = self.covft_config
        shown = {"layers": list(self.layers)}
        shown.update({name: getattr(config, name) for name in ("experts", "routing", "context")})
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

"""The wrapped ViT."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.checkpoints import saving
from covft.checkpoints.loading import load_into
from covft.conditioning import Conditioning
from covft.conditioning.calls import CalledWithText
from covft.config import CoVFTConfig
from covft.errors import ConfigError, MergeError, MissingContextError
from covft.nn.fused import has_triton
from covft.nn.losses import load_balance_loss
from covft.surgery.dial import Dial, set_strength
from covft.surgery.precision import widen
from covft.surgery.slot import Original
from covft.surgery.trunk import Gate, Trunk, TrunkCache, caching, has_trunk, is_cached, record, resumed
from covft.surgery.wrapped import TextSource, WrappedViT
from covft.text import TextEncoder
from covft.utils.arguments import check_kinds, check_strength
from covft.utils.parameters import param_groups


class ContextEncoder(CalledWithText, WrappedViT):
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
        self._dial: Dial | None = None
        self._gate = Gate()

    @property
    def _cleans_text(self) -> bool:
        return self.covft_config.instructions == "clean"

    @property
    def strength(self) -> float:
        r"""Strength $s$ of what was trained: 0 for the ViT as it was, 1 as trained. Setting it changes no weight.

        Every adapted FFN computes $(1 - s)\, \mathrm{FFN}(x) + s\, \mathrm{CoMoE}(x)$ with the pretrained FFN, and
        every trained norm the same mixture of the pretrained norm and the trained one; since a norm is linear in its
        weights, that is the norm with mixed weights. At 0 only the originals count, so that the outputs are exactly the
        plain ViT's; at 1, where it starts, only what was trained runs, and the dial costs nothing. In between both run.
        A call needs its text at every strength. Other parameters of the ViT that the caller trained, and adapters of
        peft, keep their values.

        It is part of copies and pickles, but never saved. Gradients are those of the mixture. Set it before
        `torch.compile`, or call `torch.compiler.reset()` afterwards.

        Raises:
            ConfigError: If it is set to anything but a number from 0 to 1.
            UnsupportedViTError: If it is set, and the originals are not known (the ViT was wrapped on the meta device),
                or other code has replaced FFNs or norms since.
        """
        return 1.0 if self._dial is None else self._dial.strength

    @strength.setter
    def strength(self, strength: float) -> None:
        self._dial = set_strength(self, self._dial, check_strength(strength))

    def forward(
        self,
        images: Tensor | None = None,
        text: str | Sequence[str] | Tensor | Mapping[str, Tensor] | None = None,
        *,
        index: Tensor | Sequence[int] | None = None,
        trunk: Trunk | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode images, each conditioned on its text.

        Args:
            images: Whatever the ViT takes first, usually `(B, 3, H, W)`; may also come by the ViT's own keyword, such
                as `pixel_values=`.
            text: A question for all images, one per image, features `(S, C)`, or a tokenised batch; None takes the
                text of an open `condition(...)`. With a null text, entries of a list may be None, and without an open
                `condition(...)` None means no text for any image.
            index: Which text each image has, shape `(B,)`; None where image i has text i.
            trunk: What `trunk(images)` has computed, in place of the images and the ViT's other arguments. That of one
                image is for all texts. `trunk[[0, 0, 1]]` repeats and reorders images.
            **kwargs: Passed to the ViT.

        Returns:
            What the ViT itself returns, unchanged in type.

        Raises:
            MissingContextError: If there is no text, neither here nor from `condition(...)`.
            ShapeError: If texts and images do not fit together.
            TextEncoderError: If a text is empty.
            ConfigError: If images or arguments of the ViT are given with a trunk, or the trunk was computed with other
                weights or another strength.

        Example:
            >>> tokens = encoder(images, ["What is left of the cup?"])  # doctest: +SKIP
        """
        if trunk is None:
            return super().forward(images, text, index=index, **kwargs)
        given = [*(["images"] if images is not None else []), *kwargs]
        return resumed(self, self._gate, trunk, given, text, index)

    def trunk(self, images: Tensor | None = None, *, keep: str = "last", **kwargs: Any) -> Trunk:
        """Run the blocks before the first adapted one, whose outputs no text changes.

        `encoder(trunk=..., text=...)` goes on from there, for any number of texts: several questions about one picture
        cost one trunk, and the adapted half of the ViT each.

        Args:
            images: As for calling the encoder.
            keep: `"last"`: the output of the last block of the trunk. `"all"`: those of all its blocks, which are
                needed where hidden states from there are read. One that was not kept raises an error when it is used.
            **kwargs: Passed to the ViT.

        Returns:
            The trunk of these images. If gradients are enabled and the trunk is trained, it has its graph.

        Raises:
            ConfigError: If there is no trunk, because the first block is adapted.
            ShapeError: If how many images there are is not known.
            UnsupportedViTError: If the trunk is random in training mode.

        Example:
            >>> trunk = encoder.trunk(image)  # doctest: +SKIP
            >>> tokens = encoder(trunk=trunk, text=["What is left of the cup?", "How many cups?"])  # doctest: +SKIP
        """
        return record(self, self._gate, () if images is None else (images,), kwargs, keep)

    @property
    def has_trunk(self) -> bool:
        """Whether blocks run before the first adapted one."""
        return has_trunk(self)

    @property
    def caches_trunk(self) -> bool:
        """Whether a `cached_trunk(...)` is open."""
        return is_cached(self)

    @contextlib.contextmanager
    def cached_trunk(self, cache: TrunkCache | None = None) -> Iterator[TrunkCache]:
        """While open, keep the trunk of pictures for later calls, also those that other code makes of the ViT.

        It counts in evaluation mode without gradients, as in `generate`; elsewhere the ViT runs as ever.

        Args:
            cache: Where to keep it; None makes a new one.

        Raises:
            ConfigError: If the trunk is cached already, or there is none.

        Example:
            >>> with encoder.cached_trunk() as cache:  # doctest: +SKIP
            ...     answers = [model.generate(**inputs_for(question)) for question in questions]
        """
        with caching(self, self._gate, TrunkCache() if cache is None else cache) as opened:
            yield opened

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
            raise MissingContextError(
                "The load-balancing loss is that of the last forward, and the encoder has not run yet.",
                expected="encoder(images, texts) before encoder.aux_loss()",
                got="no forward",
            )
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

        Triton kernels read and write each tensor once. They run on a GPU, with `recompute="activation"` or `"all"`,
        where they know the activation (GELU, its tanh form, QuickGELU, SiLU; plain or gated); elsewhere, torch's
        operations run. The setting is not saved.

        Args:
            kernels: `"auto"`, the default: Triton kernels where Triton is installed and they can run; `"eager"`,
                torch's operations; `"triton"`, as `"auto"`, but refused where Triton is not installed.

        Raises:
            ConfigError: If it is not known, or Triton is not installed.
        """
        if kernels not in ("auto", "eager", "triton"):
            known = "'auto', 'eager' or 'triton'"
            raise ConfigError(f"kernels={kernels!r} is not known.", expected=known, got=repr(kernels))
        if kernels == "triton" and not has_triton():
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
            fix="covft.merge(encoder, data), which comes close and says how close; or covft.unwrap(encoder)",
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

    def write(self, folder: Path, gathered: Mapping[str, Tensor] | None = None, writes: bool | None = None) -> None:
        """Write a saved folder, also from gathered weights."""
        saving.save(self, folder, gathered=gathered, writes=writes)

    def load_into(self, folder: str | Path) -> None:
        """Put saved weights into this encoder, which has the same settings."""
        load_into(self, folder)

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

    def extra_repr(self) -> str:
        """Return one line about the settings, for `print(encoder)`."""
        config = self.covft_config
        shown = {"layers": list(self.layers)}
        shown.update({name: getattr(config, name) for name in ("experts", "routing", "context")})
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

"""Records contexts and routing of a tower, sample by sample, in bounded memory.

Shapes: N samples, E experts, W context_dim, T images or tiles of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from covft.analysis.running import Subject, at_rest, subject_of
from covft.analysis.samples import Batch, Data, batches
from covft.analysis.stored import read_arrays, write_arrays
from covft.encoder import ContextEncoder
from covft.errors import ConfigError, LayerIndexError
from covft.utils.arguments import check_kinds, check_sizes

FILE = "covft_recording.safetensors"
"""Name of a saved recording in a folder."""


@dataclass(frozen=True)
class Recording:
    """What a tower did with each sample. A sample of several tiles has their mean.

    Attributes:
        weights: Routing weights by layer, shape `(N, E)`.
        contexts: Context vectors by layer, shape `(N, W)`; empty for routings that have no context.
        texts: Text of each sample; None where it had none, or features in its place.
        kinds: Kind of instruction of each sample; None where it is not known.
        thumbnails: First image of each sample, small, shape `(N, side, side, 3)`, from 0 to 255, its values stretched
            from its smallest to its largest; None where the data have no images of pixels.
    """

    weights: Mapping[int, np.ndarray]
    contexts: Mapping[int, np.ndarray]
    texts: tuple[str | None, ...]
    kinds: tuple[str | None, ...]
    thumbnails: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.texts)

    @property
    def layers(self) -> tuple[int, ...]:
        """The recorded layers, ascending."""
        return tuple(sorted(self.weights))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = [*self.weights.values(), *self.contexts.values()]
        return sum(array.nbytes for array in arrays) + (0 if self.thumbnails is None else self.thumbnails.nbytes)

    @check_kinds
    def save(self, folder: str | Path) -> None:
        """Write the recording to a folder, where `covft report` finds it.

        Args:
            folder: Created if it does not exist.

        Raises:
            CheckpointError: If it cannot be written.
        """
        about = {"texts": self.texts, "kinds": self.kinds}
        arrays = {"weights": self.weights, "contexts": self.contexts, "thumbnails": self.thumbnails}
        write_arrays(Path(folder) / FILE, about, **arrays)

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """Read what `save` wrote.

        Raises:
            CheckpointError: If there is no recording, or it is damaged.
        """
        arrays, about = read_arrays(Path(folder) / FILE, "weights", "contexts")
        texts, kinds = tuple(about["texts"]), tuple(about["kinds"])
        return cls(arrays["weights"], arrays["contexts"], texts, kinds, arrays.get("thumbnails"))


@check_kinds
def record(
    model: nn.Module,
    data: Data,
    *,
    samples: int = 5000,
    batch_size: int = 16,
    layers: Iterable[int] | None = None,
    thumbnails: int = 48,
) -> Recording:
    r"""Run samples through a tower, and record how it routes them and by which context vectors.

    The tower runs as for evaluation, without gradients, and also if it is compiled, eagerly; afterwards its modes, its
    last routing and the state of torch's random generator are as they were. Nothing is recorded at any other time, so
    nothing is paid for it. Under DDP, each process records its own data.

    Memory: at most $4 N L (W + E) + 3 N s^2$ bytes for N samples, L layers, contexts of width W, E experts and
    thumbnails of side s, and the texts; while it is put together, one layer or the thumbnails once more. For 5,000
    samples of a ViT-L (12 layers, W = 768, E = 4) that is 220 MB, of which thumbnails are 35 MB; of one layer alone,
    50 MB.

    Args:
        model: A ViT of `covft.wrap`, a model of `covft.attach`, or either in a module of yours, in DDP or compiled.
        data: Samples or batches; see `covft.analysis.samples`.
        samples: Number of samples after which it stops. They are the first ones: shuffle data that are sorted.
        batch_size: Samples that run together.
        layers: Indices of adapted blocks to record; None records all.
        thumbnails: Side of the thumbnails in pixels; 0 keeps none.

    Returns:
        The recording, one row per sample.

    Raises:
        ConfigError: If a setting cannot be used, or the data have no sample with an image.
        LayerIndexError: If a layer is not adapted.
        UnsupportedViTError: If the tower has no experts.

    Example:
        >>> encoder = covft.wrap(covft.testing.ToyViT(), covft.testing.HashTextEncoder(16))  # doctest: +SKIP
        >>> recording = record(encoder, [(torch.rand(3, 16, 16), "what is left?")])  # doctest: +SKIP
    """
    check_sizes(samples=samples, batch_size=batch_size)
    if not 0 <= thumbnails <= 1024:
        raise ConfigError(f"thumbnails={thumbnails} cannot be used.", expected="a side from 0 to 1024", got=thumbnails)
    subject = subject_of(model)
    chosen = _layers(subject.routed, layers)
    chunks = _Chunks(chosen, thumbnails)
    with at_rest(subject):
        for batch in batches(data, min(batch_size, samples)):
            subject.run(batch)
            chunks.add(subject, batch, samples - chunks.samples)
            if chunks.samples >= samples:
                break
    if not chunks.samples:
        raise ConfigError("The data have no sample with an image.", expected="at least one", got="none")
    return chunks.recording()


def _layers(encoder: ContextEncoder, layers: Iterable[int] | None) -> tuple[int, ...]:
    if layers is None:
        return encoder.layers
    chosen = tuple(sorted({layer + encoder.spec.depth * (layer < 0) for layer in layers}))
    if not chosen or not set(chosen) <= set(encoder.layers):
        raise LayerIndexError(
            f"layers={chosen} are not all adapted.", expected=f"some of {encoder.layers}", got=f"{chosen}"
        )
    return chosen


@dataclass
class _Chunks:
    """What was recorded so far, batch by batch."""

    layers: tuple[int, ...]
    side: int
    samples: int = 0
    _weights: dict[int, list[np.ndarray]] = field(default_factory=dict)
    _contexts: dict[int, list[np.ndarray]] = field(default_factory=dict)
    _texts: list[str | None] = field(default_factory=list)
    _kinds: list[str | None] = field(default_factory=list)
    _thumbnails: list[np.ndarray] = field(default_factory=list)

    def add(self, subject: Subject, batch: Batch, most: int) -> None:
        """Add the last run of a tower.

        Args:
            subject: The tower.
            batch: What it ran on.
            most: Samples that are still wanted.
        """
        weights, contexts = subject.encoder.routing_weights(), subject.encoder.context_vectors()
        if not weights:
            return  # no image in this batch
        index, texts = subject.samples_of(batch, len(next(iter(weights.values()))))
        seen = index[index >= 0].unique()[:most].tolist()
        if not seen:
            return
        for layer in self.layers:
            self._weights.setdefault(layer, []).append(_means(weights[layer], index, seen))
            if layer in contexts:
                self._contexts.setdefault(layer, []).append(_means(contexts[layer], index, seen))
        self._texts += [text if isinstance(text := texts.get(row), str) else None for row in seen]
        self._kinds += [batch.kinds[row] for row in seen]
        if self.side and batch.images is not None:
            first = [int((index == row).nonzero()[0]) for row in seen]
            self._thumbnails.append(pictures(batch.images[first], self.side))
        self.samples += len(seen)

    def recording(self) -> Recording:
        """Join what was recorded; a layer's chunks are freed before the next one's are joined."""
        pictured = sum(map(len, self._thumbnails)) == self.samples
        return Recording(
            weights={layer: np.concatenate(self._weights.pop(layer)) for layer in list(self._weights)},
            contexts={layer: np.concatenate(self._contexts.pop(layer)) for layer in list(self._contexts)},
            texts=tuple(self._texts),
            kinds=tuple(self._kinds),
            thumbnails=np.concatenate(self._thumbnails) if pictured and self._thumbnails else None,
        )


def _means(rows: Tensor, index: Tensor, seen: list[int]) -> np.ndarray:
    """Return the mean over the rows of each sample, in float32."""
    rows = rows.float().cpu()
    return torch.stack([rows[index == row].mean(dim=0) for row in seen]).numpy()


def pictures(images: Tensor, side: int) -> np.ndarray:
    """Shrink preprocessed images to pictures, from 0 to 255, each stretched from its smallest value to its largest.

    Args:
        images: Shape `(B, 3, H, W)`.
        side: Longest side in pixels of what is returned, which is square; sides that are left over are black.

    Returns:
        Pictures, shape `(B, side, side, 3)`.
    """
    values = images.detach().float().cpu()
    height, width = values.shape[-2:]
    scale = side / max(height, width)
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    small = nn.functional.interpolate(values, size, mode="area")
    flat = small.flatten(1)
    low, high = flat.amin(1).view(-1, 1, 1, 1), flat.amax(1).view(-1, 1, 1, 1)
    small = (small - low) / (high - low).clamp_min(1e-12) * 255
    square = torch.zeros(len(small), 3, side, side)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    square[..., top : top + size[0], left : left + size[1]] = small
    return square.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

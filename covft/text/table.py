"""Precomputed features of known texts, kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm  # comes with huggingface_hub

from covft.errors import TextEncoderError
from covft.text.base import CachedTextEncoder, TextEncoder, check_texts, shown
from covft.utils.arguments import check_kinds
from covft.utils.files import check_file_path, write_tensors

# Metadata of the file, with name and sha256; the format is what `write_tensors` adds.
_ABOUT = {"covft": "text features", "format": "pt", "version": "1"}
_CHUNK = 256  # texts between two steps of a progress bar


class FeatureTable(CachedTextEncoder):
    """Looks texts up instead of encoding them, for training on a data set whose questions are known.

    It has the name of the encoder that made the features, so a tower trained with it is saved under that encoder.

    Args:
        digests: SHA-256 of each text, shape `(S, 32)`, uint8.
        features: Features of each text, shape `(S, C)`.
        name: Name of the encoder that made the features.
        fallback: Encodes texts that are not in the table; None makes them an error.

    Raises:
        TextEncoderError: If the shapes do not match, or the fallback has another width.

    Example:
        >>> from covft.testing import HashTextEncoder
        >>> table = FeatureTable.precompute(HashTextEncoder(8), ["how many?", "where?"])
        >>> table.encode(["where?"]).shape
        torch.Size([1, 8])
    """

    @check_kinds
    def __init__(self, digests: Tensor, features: Tensor, name: str, fallback: TextEncoder | None = None) -> None:
        shape, kinds = tuple(features.shape), (digests.dtype, features.is_floating_point())
        if len(shape) != 2 or not features.numel() or digests.shape != (shape[0], 32) or kinds != (torch.uint8, True):
            raise TextEncoderError(
                "These are not features of texts.",
                expected="digests (S, 32), uint8, and features (S, C), floating-point, S >= 1",
                got=f"{tuple(digests.shape)}, {digests.dtype}, and {shape}, {features.dtype}",
            )
        if fallback is not None and fallback.text_dim != features.shape[1]:
            raise TextEncoderError(
                "The fallback is another encoder than the one that made the features.",
                expected=f"width {features.shape[1]} ({name})",
                got=f"width {fallback.text_dim} ({fallback.name})",
            )
        super().__init__(name, cache_bytes=0)
        self.text_dim = int(features.shape[1])
        self.fallback = fallback
        self._features = features
        self._rows = {bytes(digest): row for row, digest in enumerate(digests.numpy())}

    def __len__(self) -> int:
        """Number of texts S."""
        return len(self._rows)

    @classmethod
    @check_kinds
    def precompute(
        cls, text_encoder: TextEncoder, texts: Iterable[str], path: str | Path | None = None, *, show: bool = False
    ) -> FeatureTable:
        """Encode texts, each distinct one once.

        Args:
            text_encoder: See `covft.text.as_text_encoder`.
            texts: Any number of texts; they may repeat.
            path: A `.safetensors` file to write; None keeps the table in memory.
            show: Whether to show a progress bar.

        Raises:
            TextEncoderError: If a text is empty, or there are no texts.
            CheckpointError: If the path is a folder, or cannot be written to.
        """
        if path is not None:
            check_file_path(Path(path))
        distinct = list(dict.fromkeys(check_texts(list(texts))))
        if not distinct:
            raise TextEncoderError("A table needs texts to encode.", expected="at least one text", got="none")
        rows: list[Tensor] = []
        with tqdm(total=len(distinct), unit="text", desc="encoding texts", disable=not show) as bar:
            for start in range(0, len(distinct), _CHUNK):
                chunk = distinct[start : start + _CHUNK]
                rows.append(text_encoder.encode(chunk).cpu())
                bar.update(len(chunk))
        table = cls(_matrix(map(_digest, distinct)), torch.cat(rows), text_encoder.name)
        if path is not None:
            table.save(path)
        return table

    @check_kinds
    def save(self, path: str | Path) -> None:
        """Write the table atomically, with a digest of its content.

        Args:
            path: A `.safetensors` file.
        """
        tensors = {"digests": _matrix(self._rows), "features": self._features}
        about = {**_ABOUT, "name": self.name}
        write_tensors(Path(path), tensors, {**about, "sha256": _sha256(tensors, about)})

    @classmethod
    @check_kinds
    def load(cls, path: str | Path, fallback: TextEncoder | None = None) -> FeatureTable:
        """Read a table.

        Args:
            path: A file that `save` wrote.
            fallback: Encodes texts that are not in the table.

        Raises:
            TextEncoderError: If the file is missing, truncated, damaged or not a table.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = dict(file.metadata() or {})
                if not _ABOUT.items() <= about.items() or set(file.keys()) != {"digests", "features"}:
                    raise TextEncoderError(
                        f"{path} does not hold text features.",
                        expected="a file that `covft precompute` of this version wrote",
                        got=f"{dict(list(about.items())[:5])}"[:200],
                        fix="covft precompute",
                    )
                tensors = {name: file.get_tensor(name) for name in ("digests", "features")}
        except (OSError, SafetensorError) as error:
            raise TextEncoderError(f"{path} cannot be read.", got=str(error)) from error
        stated = about.pop("sha256", None)
        if stated != _sha256(tensors, about) or not bool(tensors["features"].isfinite().all()):
            raise TextEncoderError(
                f"{path} is damaged: its content has changed since it was written.",
                expected=f"sha256 {str(stated)[:12]}..., and finite features",
                got=f"sha256 {_sha256(tensors, about)[:12]}...",
                fix="copy it again, or covft precompute",
            )
        return cls(tensors["digests"], tensors["features"], about["name"], fallback)

    def _encode_one(self, text: str) -> Tensor:
        row = self._rows.get(_digest(text))
        if row is not None:
            return self._features[row : row + 1]
        if self.fallback is None:
            raise TextEncoderError(
                f"The table has no features of {shown(text)}.",
                expected=f"one of the {len(self)} precomputed texts",
                got="another text",
                fix="FeatureTable.load(path, fallback=text_encoder), or precompute the texts of all data",
            )
        return self.fallback.encode([text])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _sha256(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Return the digest of all that a file holds but the digest itself."""
    digest = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _matrix(digests: Iterable[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)

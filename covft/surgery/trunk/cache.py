"""Outputs of the trunk by the content of pictures, for calls of the tower that other code makes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from covft.conditioning import TowerCall
from covft.errors import ConfigError, ShapeError, UnsupportedViTError
from covft.surgery.overrides import Override
from covft.surgery.trunk.runs import Gate, check_trunk, is_running, record, resume, weights
from covft.surgery.trunk.states import States, picked_arguments
from covft.surgery.wrapped import WrappedViT
from covft.utils.arguments import check_kinds

# Picks the arguments of some images of a call, and what identifies each image.
_Images = tuple[Callable[[list[int]], Any], list[bytes]]


class TrunkCache:
    """Keeps what the trunk computed of pictures, the most recently used first, up to a number of bytes.

    A picture is known by its content: the bytes, shapes and types of what the tower gets of it. When weights of the
    trunk change, everything is dropped.

    Args:
        max_bytes: Bound on what is kept. One picture of CLIP-L at 336 pixels takes 2.4 MB in float32.
        keep: `"last"`: the output of the last block of the trunk. `"all"`: those of all blocks, which a model needs
            that reads hidden states from there. A tower that does so by itself is found out.

    Attributes:
        hits: Pictures that were found.
        misses: Pictures that were not.
        nbytes: Bytes that are kept.

    Raises:
        ConfigError: If a setting cannot work.

    Example:
        >>> with encoder.cached_trunk(covft.TrunkCache()) as cache:  # doctest: +SKIP
        ...     answers = [model.generate(**inputs_for(question)) for question in questions]
    """

    @check_kinds
    def __init__(self, max_bytes: int = 2**30, keep: str = "last") -> None:
        if max_bytes < 1 or keep not in ("last", "all"):
            raise ConfigError(
                "These settings leave no cache.",
                expected="max_bytes of at least 1, and keep='last' or 'all'",
                got=f"max_bytes={max_bytes}, keep={keep!r}",
            )
        self.max_bytes, self.keep = max_bytes, keep
        self.hits = self.misses = self.nbytes = 0
        self._entries: OrderedDict[bytes, States] = OrderedDict()
        self._weights: tuple[Any, ...] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of pictures that are kept."""
        return len(self._entries)

    def clear(self) -> None:
        """Drop all pictures; the counts of hits and misses stay."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def match(self, weights: tuple[Any, ...]) -> None:
        """Drop everything that was computed with other weights or settings."""
        if weights != self._weights:
            self.clear()
            self._weights = weights

    def find(self, key: bytes) -> States | None:
        """Return the states of a picture, and count; None if they are not kept."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
                self._entries.move_to_end(key)
            return found

    def put(self, key: bytes, states: States) -> None:
        """Keep the states of a picture, and drop the least recently used ones beyond the bound."""
        size = states.nbytes
        with self._lock:
            if key in self._entries or size > self.max_bytes:
                return
            self._entries[key] = states
            self.nbytes += size
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._entries.popitem(last=False)[1].nbytes


@contextlib.contextmanager
def caching(wrapped: WrappedViT, gate: Gate, cache: TrunkCache) -> Iterator[TrunkCache]:
    """While open, let calls of the tower take from a cache what it keeps of their pictures.

    Args:
        wrapped: The wrapped ViT.
        gate: Of this ViT.
        cache: The cache.

    Raises:
        ConfigError: If another cache is open for this tower, or it has no trunk.
    """
    check_trunk(wrapped)
    if is_cached(wrapped):
        raise ConfigError("The trunk of this tower is cached already.", fix="one `with encoder.cached_trunk(...)`")
    override = _CachedTower(wrapped, gate, cache)
    override.install()
    try:
        yield cache
    finally:
        override.remove()


def is_cached(wrapped: WrappedViT) -> bool:
    """Return whether a cache is open for this tower."""
    return isinstance(wrapped.vit.__dict__.get("forward"), _CachedTower)


class _CachedTower(Override):
    """Replaces the forward of a tower: pictures that were seen before start after the trunk."""

    def __init__(self, wrapped: WrappedViT, gate: Gate, cache: TrunkCache) -> None:
        super().__init__(wrapped.vit, "forward")
        self.wrapped, self.gate, self.cache = wrapped, gate, cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the tower, without its trunk for pictures that are kept."""
        args = self._own(args)
        if torch.compiler.is_compiling() or is_running() or torch.is_grad_enabled() or self.owner.training:
            return self.inner(*args, **kwargs)
        try:
            return self._resumed(args, kwargs)
        except UnsupportedViTError:
            if self.cache.keep == "all":
                raise
            self.cache.keep = "all"  # the tower itself reads outputs of the trunk
            self.cache.clear()
            return self._resumed(args, kwargs)

    def _resumed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        images = self._images(args, kwargs)
        if not images:  # it is not known what belongs to which
            return self.inner(*args, **kwargs)
        self.cache.match(weights(self.wrapped))
        with resume(self.wrapped, self.gate, self._states(images)):
            return self.inner(*args, **kwargs)

    def _images(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Images | None:
        """Return a function that picks the arguments of some images, and what identifies each."""
        call = TowerCall.read(self.wrapped.conditioning.format, self.owner, args, kwargs)
        count = call.num_images if call.segments is None else len(call.segments)
        if not count:
            return None
        call = TowerCall(call.format, count, None, call.segments)
        pick = functools.partial(picked_arguments, args, kwargs, call)
        try:
            return pick, [_digest(pick([image])) for image in range(count)]
        except ShapeError:
            return None

    def _states(self, images: _Images) -> States:
        pick, keys = images
        found: dict[bytes, Any] = {key: self.cache.find(key) for key in dict.fromkeys(keys)}
        missing = [key for key, states in found.items() if states is None]
        if missing:
            args, kwargs = pick([keys.index(key) for key in missing])
            recorded = record(self.wrapped, self.gate, args, kwargs, self.cache.keep).states
            for place, key in enumerate(missing):
                found[key] = recorded.picked([place])
                self.cache.put(key, found[key])
            if missing == keys:
                return recorded
        return States.joined([found[key] for key in keys])


def _digest(given: Any) -> bytes:
    """Return a hash of the content of arguments."""
    leaves, form = tree_flatten(given)
    digest = hashlib.blake2b(repr(form).encode(), digest_size=32)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            digest.update(repr(leaf).encode())
            continue
        digest.update(f"{tuple(leaf.shape)} {leaf.dtype} {leaf.device}".encode())
        digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()

"""A bounded cache of text features."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

from covft.errors import TextEncoderError
from covft.utils.arguments import check_kinds

DEFAULT_CACHE_BYTES = 256 * 2**20


class FeatureCache:
    """Features per distinct key, bounded in bytes; the least recently used are dropped first.

    Args:
        max_bytes: Bound on features and keys together; 0 caches nothing.
    """

    @check_kinds
    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        if max_bytes < 0:
            raise TextEncoderError("A cache cannot have a negative size.", expected=">= 0", got=max_bytes)
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._rows: OrderedDict[Hashable, Tensor] = OrderedDict()
        # Models are called from several threads (DataParallel, data pipelines); an eviction between a look-up and its
        # move to the end would raise.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Hashable) -> Tensor | None:
        """Return the features of a key, shape `(C,)`, or None."""
        with self._lock:
            row = self._rows.get(key)
            if row is not None:
                self._rows.move_to_end(key)
            return row

    def put(self, key: Hashable, row: Tensor) -> None:
        """Cache features of shape `(C,)`, and drop the least recently used to make room."""
        size = _entry_bytes(key, row)
        if size > self.max_bytes:
            return
        with self._lock:
            if key in self._rows:
                self.num_bytes -= _entry_bytes(key, self._rows.pop(key))
            self._rows[key] = row
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                old_key, old_row = self._rows.popitem(last=False)
                self.num_bytes -= _entry_bytes(old_key, old_row)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._rows.clear()
            self.num_bytes = 0


def _entry_bytes(key: Hashable, row: Tensor) -> int:
    parts = key if isinstance(key, tuple) else (key,)
    return row.numel() * row.element_size() + sum(sys.getsizeof(part) for part in parts)

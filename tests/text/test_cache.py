"""The bounded cache of text features."""

import sys

import pytest
import torch

from covft.errors import TextEncoderError
from covft.text import FeatureCache


def _bytes(key, row):
    return sys.getsizeof(key) + row.numel() * row.element_size()


def test_the_least_recently_used_entry_is_dropped():
    row = torch.zeros(10)
    cache = FeatureCache(max_bytes=2 * _bytes("a", row))
    cache.put("a", row)
    cache.put("b", row)
    assert cache.get("a") is row
    cache.put("c", row)
    assert (cache.get("a") is row, cache.get("b"), cache.get("c") is row) == (True, None, True)


def test_the_bound_holds_for_rows_and_keys():
    cache = FeatureCache(max_bytes=10_000)
    for index in range(1000):
        cache.put(f"question {index} " + "x" * index, torch.zeros(16))
        assert cache.num_bytes <= 10_000
    assert 0 < len(cache) < 30


def test_bytes_are_counted_right_after_replacing_and_clearing():
    cache = FeatureCache(max_bytes=10_000)
    cache.put("a", torch.zeros(100))
    cache.put("a", torch.zeros(7))
    assert cache.num_bytes == _bytes("a", torch.zeros(7))
    cache.clear()
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_an_entry_larger_than_the_cache_evicts_nothing():
    cache = FeatureCache(max_bytes=500)
    cache.put("small", torch.zeros(4))
    cache.put("large", torch.zeros(4000))
    assert cache.get("small") is not None
    assert cache.get("large") is None


def test_zero_caches_nothing_and_less_is_refused():
    cache = FeatureCache(0)
    cache.put("a", torch.zeros(1))
    assert len(cache) == 0
    with pytest.raises(TextEncoderError, match=">= 0"):
        FeatureCache(-1)

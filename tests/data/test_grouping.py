"""The order of rows: every row once, one kind per global batch, equal work for the ranks."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covft.data import ModalityGroupedSampler
from covft.errors import ConfigError

lengths = st.lists(st.integers(-300, 300).filter(bool), min_size=1, max_size=120)
sizes = {"batch_size": st.integers(1, 5), "world_size": st.integers(1, 4), "pool": st.integers(1, 3)}


def batches(sampler, size):
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


@settings(max_examples=100, deadline=None)
@given(lengths, st.fixed_dictionaries(sizes), st.integers(0, 9))
def test_every_row_once_and_batches_of_one_kind(lengths, options, epoch):
    sampler = ModalityGroupedSampler(lengths, **options)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    assert sorted(sampler) == list(range(len(lengths)))
    size = options["batch_size"] * options["world_size"]
    pure = sum(len([length for length in lengths if (length > 0) is kind]) // size for kind in (True, False))
    for batch in batches(sampler, size)[:pure]:
        assert len(batch) == size
        assert len({lengths[row] > 0 for row in batch}) == 1


@settings(max_examples=100, deadline=None)
@given(lengths, st.fixed_dictionaries(sizes))
def test_ranks_have_equal_work(lengths, options):
    size, world = options["batch_size"], options["world_size"]
    sampler = ModalityGroupedSampler(lengths, **options)
    pure = sum(len([x for x in lengths if (x > 0) is kind]) // (size * world) for kind in (True, False))
    for batch in batches(sampler, size * world)[:pure]:
        work = [sum(abs(lengths[row]) for row in batch[rank * size : (rank + 1) * size]) for rank in range(world)]
        each = [abs(lengths[row]) for row in batch]
        assert max(work) - min(work) <= max(each) - min(each)


def test_the_rank_with_least_work_gets_the_longest_row():
    order = list(ModalityGroupedSampler(list(range(1, 9)), 4, world_size=2))
    work = [sum(row + 1 for row in order[start : start + 4]) for start in (0, 4)]
    assert work == [18, 18]


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(0, 5))
def test_the_seed_and_the_epoch_decide(lengths, seed):
    one, two = (ModalityGroupedSampler(lengths, 2, seed=seed) for _ in range(2))
    assert list(one) == list(one) == list(two)


def test_epochs_and_seeds_differ():
    lengths = list(range(1, 65))
    sampler = ModalityGroupedSampler(lengths, 4, world_size=2)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    orders.append(list(ModalityGroupedSampler(lengths, 4, world_size=2, seed=1)))
    assert all(one != two for one, two in itertools.combinations(orders, 2))
    # ... and not only the order of the same batches.
    members = [{frozenset(order[start : start + 8]) for start in range(0, 64, 8)} for order in orders]
    assert all(one != two for one, two in itertools.combinations(members, 2))


def test_text_does_not_always_come_last():
    lengths = [5] * 16 + [-5] * 16
    kinds = set()
    for seed in range(8):
        order = list(ModalityGroupedSampler(lengths, 4, seed=seed))
        kinds.add(tuple(lengths[row] > 0 for row in order[::4]))
    assert len(kinds) > 3


def test_a_pool_pads_less():
    lengths = [1 + (number * 37) % 101 for number in range(256)]

    def padding(pool):
        found = batches(ModalityGroupedSampler(lengths, 8, pool=pool), 8)
        return sum(
            max(lengths[row] for row in batch) * len(batch) - sum(lengths[row] for row in batch) for batch in found
        )

    assert padding(16) < padding(1) / 4


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 1, "world_size": 0}, {"batch_size": 1, "pool": 0}]
)
def test_sizes_that_cannot_work(options):
    with pytest.raises(ConfigError, match="is below 1"):
        ModalityGroupedSampler([1, 2], **options)


def test_a_length_of_zero_says_nothing():
    with pytest.raises(ConfigError, match="1 rows have length 0"):
        ModalityGroupedSampler([1, 0, -2], 1)

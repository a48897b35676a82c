import pytest
import torch

from covft.analysis.diagnosis.entries import Entry, read_entries, split
from covft.analysis.diagnosis.kinds import find_kinds
from covft.errors import ConfigError, ShapeError

IMAGE = torch.zeros(3, 4, 4)
DATA = [(IMAGE, f"what is thing {i}?", "ab"[i % 2]) for i in range(20)]


def kinds_of(entries):
    return {entry.text: entry.kind for entry in entries}


def test_random_entries_of_a_sequence_and_the_first_of_an_iterator():
    assert [entry.sample for entry in read_entries(iter(DATA), None, 5, 0)] == DATA[:5]
    one, same, other = (read_entries(DATA, None, 5, seed) for seed in (0, 0, 1))
    assert one == same
    assert one != other
    assert len(read_entries(DATA, None, 50, 0)) == 20


def test_kinds_are_read_or_given_as_a_list_or_a_function():
    truth = {text: kind for _, text, kind in DATA}
    plain = [entry[:2] for entry in DATA]
    assert kinds_of(read_entries(DATA, None, 20, 0)) == truth
    assert kinds_of(read_entries(plain, [kind for *_, kind in DATA], 20, 0)) == truth
    assert kinds_of(read_entries(plain, lambda entry: truth[entry[1]], 20, 0)) == truth
    assert set(kinds_of(read_entries(plain, None, 20, 0)).values()) == {None}


def test_what_only_the_loss_can_read_needs_kinds():
    numbers = list(range(20))
    found = read_entries(numbers, ["a", "b"] * 10, 20, 0)
    assert {entry.sample: entry.kind for entry in found} == {number: "ab"[number % 2] for number in numbers}
    with pytest.raises(ConfigError, match="cannot be read"):
        read_entries(numbers, None, 20, 0)


def test_kinds_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="not as many as the entries"):
        read_entries(DATA, ["a"], 20, 0)
    with pytest.raises(ConfigError, match="10 of 20 without"):
        read_entries([entry[: 2 + i % 2] for i, entry in enumerate(DATA)], None, 20, 0)
    with pytest.raises(ConfigError, match="several kinds"):
        read_entries([(torch.zeros(2, 3, 4, 4), ["a?", "b?"], ["a", "b"])], None, 20, 0)
    with pytest.raises(ConfigError, match="are a mapping"):
        read_entries({"a": 1}, None, 20, 0)


def test_halves_have_each_entry_once():
    labels = ["a"] * 9 + ["b"] * 6
    train, held_out = split(labels, 0)
    assert {kind: (len(train[kind]), len(held_out[kind])) for kind in "ab"} == {"a": (4, 5), "b": (3, 3)}
    assert sorted(train["a"] + held_out["a"]) == list(range(9))
    assert sorted(train["b"] + held_out["b"]) == list(range(9, 15))


def features(texts):
    numbers = [int(text.split()[-1]) / 100 if "thing" in text else 0 for text in texts]
    return torch.tensor([[1.0, n] if "left" in text else [n, 1.0] for text, n in zip(texts, numbers, strict=True)])


@pytest.mark.parametrize("how", ["words", "features of an encoder", "features given"])
def test_kinds_are_found_in_texts(how):
    texts = [f"{'left left left' if i % 3 else 'right right right'} of thing {i}" for i in range(24)]
    given = list(features(texts)) if how == "features given" else texts
    entries = [Entry(None, text, None) for text in given]
    kinds, silhouette = find_kinds(entries, features if how == "features of an encoder" else None, 0)
    assert silhouette > 0.2
    assert len(set(kinds)) == 2
    assert all(kind == kinds[1 if i % 3 else 0] for i, kind in enumerate(kinds))
    first, second = kinds[1], kinds[0]  # by size
    assert (first.partition(":")[0], second.partition(":")[0]) == ("1", "2")
    if how != "features given":
        assert "left left" in first
        assert "right right" in second


def test_too_few_texts_have_no_kinds():
    with pytest.raises(ConfigError, match="too few different texts"):
        find_kinds([Entry(None, "what is it?", None)] * 9, None, 0)
    with pytest.raises(ConfigError, match="9 of 9 without"):
        find_kinds([Entry(None, None, None)] * 9, None, 0)

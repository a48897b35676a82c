import dataclasses
import math

import pytest

from covft.analysis.diagnosis.verdict import Evidence, PairEvidence, decide
from covft.errors import ConfigError


def pair(first="a", second="b", alignment=0.0, low=-0.1, high=0.1, p_value=0.001):
    return PairEvidence(first, second, alignment, low, high, p_value)


CONFLICT = Evidence(
    p_value=0.001,
    pairs=(pair(),),
    gain=(0.1, 0.3),
    own_gains={"a": 0.1, "b": 0.1},
    harmed=(),
    kept=0.9,
    layers=(4, 5, 3, 2),
    depth=6,
)
ALIGNED = pair(alignment=0.9, low=0.8, high=1.0)


@pytest.mark.parametrize(
    ("choice", "changes"),
    [
        ("context", {}),
        ("context", {"gain": (-0.1, 0.1)}),  # the kinds gain alone
        ("context", {"pairs": (ALIGNED,), "harmed": (("a", "b"),)}),
        ("freeze", {"gain": (-0.1, 0.1), "own_gains": {"a": -0.1, "b": 0.0}}),
        ("lora", {"p_value": 0.06}),
        ("lora", {"p_value": 0.06, "harmed": (("a", "b"),)}),
        ("lora", {"pairs": (ALIGNED,)}),
        ("lora", {"pairs": (pair(alignment=0.4, low=0.2, high=0.6),)}),  # not shown to be below 0.5
        ("lora", {"pairs": (pair(p_value=0.06),)}),
        ("lora", {"pairs": (pair(alignment=math.nan, low=math.nan, high=math.nan),)}),
        ("tune", {"pairs": (ALIGNED,), "kept": 0.79}),
        ("tune", {"pairs": (ALIGNED,), "gain": (-0.1, 0.1)}),  # what low rank keeps of nothing says nothing
    ],
)
def test_the_rule(choice, changes):
    found = decide(dataclasses.replace(CONFLICT, **changes))
    assert found.choice == choice
    assert (found.experts is None, found.layers == ()) == ((choice != "context"),) * 2


def test_proposals():
    found = decide(CONFLICT)
    assert (found.layers, found.experts, found.groups) == ((3, 4, 5), 2, (("a",), ("b",)))
    apart = "'a' and 'b' are more than 60 degrees apart (alignment +0.00, -0.10 to +0.10)"
    assert apart in found.reasons[0]
    pairs = (
        pair("a", "b"),
        pair("a", "c"),
        pair("b", "c", p_value=0.5),
        pair("c", "d"),
        pair("a", "d"),
        pair("b", "d"),
    )
    found = decide(dataclasses.replace(CONFLICT, pairs=pairs))
    assert (found.experts, found.groups) == (3, (("a",), ("b", "c"), ("d",)))


def test_harm_is_told_by_name():
    assert any("'b' raises the loss of 'a'" in reason for reason in decide(
        dataclasses.replace(CONFLICT, harmed=(("b", "a"),))).reasons)  # fmt: skip


def test_one_kind_has_no_verdict():
    with pytest.raises(ConfigError, match="two kinds"):
        decide(dataclasses.replace(CONFLICT, pairs=()))

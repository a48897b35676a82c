"""The error tree: types and messages; errors survive copies and pickles."""

import copy
import inspect
import pickle

import pytest

from covft import errors
from covft.errors import CoVFTError

BUILTINS = {
    "ArgumentError": TypeError,
    "ConfigError": ValueError,
    "UnknownViTError": LookupError,
    "UnsupportedViTError": ValueError,
    "LayerIndexError": IndexError,
    "ShapeError": ValueError,
    "MissingContextError": RuntimeError,
    "ReentrantCheckpointError": RuntimeError,
    "MissingGradientError": RuntimeError,
    "TextEncoderError": ValueError,
    "CheckpointError": RuntimeError,
    "EvaluationError": RuntimeError,
    "MergeError": TypeError,
    "MissingDependencyError": ImportError,
    "UnsupportedVersionError": RuntimeError,
}
CLASSES = [getattr(errors, name) for name in BUILTINS]


def test_every_error_is_in_the_table_and_in_all():
    defined = {n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, CoVFTError)}
    assert defined == {*BUILTINS, "CoVFTError"}
    assert set(errors.__all__) == defined
    assert len(errors.__all__) == len(defined)


@pytest.mark.parametrize("cls", CLASSES)
def test_each_error_is_ours_and_the_builtin(cls):
    for wanted in (CoVFTError, BUILTINS[cls.__name__]):
        with pytest.raises(wanted, match=r"^Nothing works\.$"):
            raise cls("Nothing works.")


def test_the_docstring_draws_every_error():
    for name, builtin in BUILTINS.items():
        assert f"─ {name}({builtin.__name__})" in errors.__doc__


def test_the_message_has_problem_expected_got_known_and_fix():
    error = errors.LayerIndexError(
        "layers=range(11, 30) asks for blocks this ViT does not have.",
        expected="indices in [-24, 23]",
        got="24, 25",
        known="a, b",
        fix="covft.wrap(vit, text_encoder, layers=range(11, 23))",
    )
    assert str(error).splitlines() == [
        "layers=range(11, 30) asks for blocks this ViT does not have.",
        "  Expected: indices in [-24, 23]",
        "  Got:      24, 25",
        "  Known:    a, b",
        "  Fix:      covft.wrap(vit, text_encoder, layers=range(11, 23))",
    ]


def test_missing_parts_are_not_printed():
    assert str(CoVFTError("No.")) == "No."
    assert str(CoVFTError("No.", got=0)) == "No.\n  Got:      0"
    assert str(CoVFTError("No.", got="")) == "No.\n  Got:      "


@pytest.mark.parametrize("cls", [CoVFTError, *CLASSES])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_errors_survive_copies_and_pickles(cls, duplicate):
    error = cls("No.", expected=(2, 3), got=[1], known="x", fix="do()")
    again = duplicate(error)
    assert type(again) is cls
    assert str(again) == str(error)
    assert [getattr(again, n) for n in ("problem", "expected", "got", "known", "fix")] == [
        "No.", (2, 3), [1], "x", "do()",
    ]  # fmt: skip

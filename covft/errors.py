"""The errors that covft raises, each a `CoVFTError` and the builtin exception that fits.

    CoVFTError
    ├── ArgumentError(TypeError)              an argument of another kind than the function takes
    ├── ConfigError(ValueError)               a setting that cannot work
    ├── UnknownViTError(LookupError)          no adapter knows how this model is built
    ├── UnsupportedViTError(ValueError)       known, but it cannot be wrapped as it stands
    ├── LayerIndexError(IndexError)           blocks that the ViT does not have
    ├── ShapeError(ValueError)                images, texts, features or indices that do not fit
    ├── MissingContextError(RuntimeError)     a wrapped ViT was called without text
    ├── ReentrantCheckpointError(RuntimeError)  activation checkpointing that would lose gradients
    ├── MissingGradientError(RuntimeError)    a parameter that should train got no gradient
    ├── TextEncoderError(ValueError)          a text or a text encoder that cannot be used
    ├── CheckpointError(RuntimeError)         a saved folder that is incomplete, damaged or of other weights
    ├── EvaluationError(RuntimeError)         an evaluation that failed or has no numbers
    ├── MergeError(TypeError)                 what was trained cannot be folded into weights
    ├── MissingDependencyError(ImportError)   an extra that is not installed
    └── UnsupportedVersionError(RuntimeError)  a library whose internals covft does not know

Every message says what was asked, what was expected, what was got, and what to do:

    LayerIndexError: layers=range(11, 30) asks for blocks this ViT does not have.
      Expected: indices in [-24, 23]  (timm VisionTransformer, 24 blocks)
      Got:      24, 25, 26, 27, 28, 29
      Fix:      covft.wrap(vit, text_encoder, layers=range(11, 23))
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "CoVFTError",
    "ConfigError",
    "EvaluationError",
    "LayerIndexError",
    "MergeError",
    "MissingContextError",
    "MissingDependencyError",
    "MissingGradientError",
    "ReentrantCheckpointError",
    "ShapeError",
    "TextEncoderError",
    "UnknownViTError",
    "UnsupportedVersionError",
    "UnsupportedViTError",
]


class CoVFTError(Exception):
    """Base of every error that covft raises.

    Args:
        problem: What was asked and why it cannot be, one sentence.
        expected: What would have been accepted, with real numbers or names.
        got: What came instead.
        known: Candidates, closest first, when a name was not found.
        fix: One line of code or one command that solves it.

    Example:
        >>> print(CoVFTError("experts=0 leaves no FFN.", expected="experts >= 1", got=0))
        experts=0 leaves no FFN.
          Expected: experts >= 1
          Got:      0
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: object = None,
        got: object = None,
        known: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem = problem
        self.expected = expected
        self.got = got
        self.known = known
        self.fix = fix
        super().__init__(self._message())

    def _message(self) -> str:
        rows = [("Expected", self.expected), ("Got", self.got), ("Known", self.known), ("Fix", self.fix)]
        lines = [self.problem]
        lines += [f"  {name + ':':<9} {value}" for name, value in rows if value is not None]
        return "\n".join(lines)


class ArgumentError(CoVFTError, TypeError):
    """An argument of another kind than the function takes."""


class ConfigError(CoVFTError, ValueError):
    """A setting that cannot work."""


class UnknownViTError(CoVFTError, LookupError):
    """No adapter knows how this model is built."""


class UnsupportedViTError(CoVFTError, ValueError):
    """The model is known but cannot be wrapped as it stands (no FFN, already wrapped, in DDP)."""


class LayerIndexError(CoVFTError, IndexError):
    """Blocks that the ViT does not have."""


class ShapeError(CoVFTError, ValueError):
    """Images, texts, features or indices that do not fit together."""


class MissingContextError(CoVFTError, RuntimeError):
    """A wrapped ViT was called without text."""


class ReentrantCheckpointError(CoVFTError, RuntimeError):
    """Activation checkpointing of the reentrant kind, which would give the experts no gradient."""


class MissingGradientError(CoVFTError, RuntimeError):
    """A parameter that should train got no gradient."""


class TextEncoderError(CoVFTError, ValueError):
    """A text or a text encoder that cannot be used."""


class CheckpointError(CoVFTError, RuntimeError):
    """A saved folder that is incomplete, damaged, or made for other base weights."""


class EvaluationError(CoVFTError, RuntimeError):
    """An evaluation failed, or its result files lack a number."""


class MergeError(CoVFTError, TypeError):
    """What was trained cannot be folded into the ViT's weights, such as experts, whose routing depends on the input."""


class MissingDependencyError(CoVFTError, ImportError):
    """An optional dependency is not installed; the message names the pip extra."""


class UnsupportedVersionError(CoVFTError, RuntimeError):
    """An installed library works inside in a way that covft does not know."""

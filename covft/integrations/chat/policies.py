"""What a new question does to the features of a picture that was shown before."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """A way to treat a new question about a picture that was shown before.

    Attributes:
        shows_again: Whether the picture stands before the new question again, with features for that question.
        rewrites: Whether the picture's features change where they stood first, so that all after them is computed anew.
    """

    shows_again: bool
    rewrites: bool


POLICIES = {
    "reencode": Policy(shows_again=False, rewrites=True),
    "keep": Policy(shows_again=False, rewrites=False),
    "append": Policy(shows_again=True, rewrites=False),
}

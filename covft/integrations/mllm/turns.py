"""Splits a decoded prompt into the user's turns, also where a question or an answer spells the marks of the template.

The text is read as a conversation: a question ends at the mark that an answer follows, and a later question begins only
where an answer has ended. A question with such a mark in it then stays in one piece, up to the last mark. Where two
readings are left, the turn is unclear.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from covft.integrations.mllm.turn_marks import TurnMarks, pattern


@dataclass(frozen=True)
class Turn:
    """A user's turn.

    Attributes:
        text: What the user says, with its placeholders.
        closed: Whether a mark ends it.
        unclear: Whether it could also end elsewhere.
    """

    text: str
    closed: bool = True
    unclear: bool = False


class TurnSplitter:
    """Finds user turns in decoded text.

    Args:
        marks: Marks of the chat template.
        special: Pattern of special tokens.
        begin: The token that begins a text; None without one.
    """

    def __init__(self, marks: TurnMarks, special: str, begin: str | None) -> None:
        self.start = re.compile(pattern(marks.start))
        self.end = re.compile(pattern(marks.end)) if marks.end else None
        self.answer = re.compile(pattern((*marks.end, *marks.answer_start)))
        self.bare_answer = re.compile(pattern(marks.answer_start or marks.end))
        self.answers_end = bool(marks.answer_end)
        over = [pattern(marks.answer_end), re.escape(begin or "")]
        self.over = re.compile("|".join(filter(None, over)) or "(?!)")
        self.another_turn = re.compile(rf"\s*(?:{special}|\Z)")
        self.same_ends = bool(marks.end) and marks.end == marks.answer_end

    def split(self, text: str, *, answered: bool = False) -> list[Turn]:
        """Split a text.

        Args:
            text: A decoded prompt, or a part of it.
            answered: Whether the text is known to end where an answer begins.
        """
        starts = [match.span() for match in self.start.finditer(text)]
        turns, first = [], 0
        while first < len(starts):
            begin, following = starts[first][1], first + 1
            while following < len(starts) and not self._is_over(text[begin : starts[following][0]]):
                following += 1
            is_last = following == len(starts)
            end = len(text) if is_last else starts[following][0]
            turns.append(self._question(text[begin:end], is_last=is_last, answered=answered and is_last))
            first = following
        return turns

    def begins_answer(self, text: str) -> bool:
        """Return whether a text begins with the mark of an answer."""
        return any(p.match(text.lstrip()) for p in (self.answer, self.bare_answer))

    def _is_over(self, segment: str) -> bool:
        """Whether a turn can begin after this text, which begins with a question."""
        answers = list(self.answer.finditer(segment)) or list(self.bare_answer.finditer(segment))
        if answers:
            return not self.answers_end or self.over.search(segment, answers[-1].end()) is not None
        ends = [] if self.end is None else list(self.end.finditer(segment))
        return bool(ends) and self.another_turn.fullmatch(segment, ends[-1].end()) is not None

    def _question(self, segment: str, *, is_last: bool, answered: bool) -> Turn:
        """Cut the question off a text that begins with it and holds no other turn of the user."""
        marks = list(self.answer.finditer(segment)) or list(self.bare_answer.finditer(segment))
        if not marks:
            return self._unanswered(segment)
        first, last = marks[0], marks[-1]
        if len(marks) == 1:
            return Turn(segment[: first.start()])
        over = self.over.search(segment, first.end(), marks[1].start())
        if over is not None and not answered:  # another answer, or a turn of somebody else
            follows = over.end() == marks[1].start() or self.another_turn.match(segment, over.end()) is not None
            return Turn(segment[: first.start()], unclear=not follows)
        at_end = is_last and not segment[last.end() :].strip()
        other_start = self.start.search(segment, first.end()) is not None
        clear = at_end and (answered or not (self.same_ends or other_start))
        return Turn(segment[: last.start()], unclear=not clear)

    def _unanswered(self, segment: str) -> Turn:
        ends = [] if self.end is None else list(self.end.finditer(segment))
        if not ends:
            return Turn(segment, closed=False)
        unclear = len(ends) > 1 and self.another_turn.match(segment, ends[0].end()) is None
        return Turn(segment[: ends[0].start()], unclear=unclear)

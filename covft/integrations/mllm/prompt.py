"""Reads the user's instruction from a prompt."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from covft.data.chat_template import any_of, round_trip
from covft.data.conversation import TURNS
from covft.errors import ConfigError, MissingContextError
from covft.integrations.mllm.turn_marks import TurnMarks, learn_marks, special_strings
from covft.integrations.mllm.turns import Turn, TurnSplitter

_TIMESTAMP = r"<\d+(?:\.\d+)? seconds>"  # Qwen3-VL's processor writes one before each frame of a video
_IGNORED = -100  # label of tokens that belong to the prompt
_FIX = "model(..., context_text=['the question of row 0', ...]), and the same for generate(...)"


class PromptReader:
    """Finds the user's turns in token ids by the marks of the tokenizer's chat template.

    It drops image placeholders, special tokens, system prompts and answers.

    Args:
        tokenizer: A tokenizer or a processor of transformers; None reads nothing.
        image_ids: Ids of image placeholders.
        turns: User turns that make the instruction: `"all"`, joined by a space, the `"first"` or the `"last"`.
        system: The system prompt; needed only if the template puts it into the user's turn unmarked.
        empty_instruction: Instruction of rows without one; None raises an error for such a row.

    Raises:
        ConfigError: If `turns` is unknown, or `tokenizer` is neither a tokenizer nor a processor.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_ids: Iterable[int] = (),
        *,
        turns: str = "all",
        system: str | None = None,
        empty_instruction: str | None = None,
    ) -> None:
        if turns not in TURNS:
            raise ConfigError(
                f"turns={turns!r} is not known.", expected=" | ".join(TURNS), got=repr(turns), fix="turns='all'"
            )
        template = getattr(tokenizer, "chat_template", None)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        if tokenizer is not None and not hasattr(tokenizer, "batch_decode"):
            raise ConfigError(
                f"{type(tokenizer).__name__} is not a tokenizer.",
                expected="a tokenizer or processor of transformers, or None if every call gets context_text",
                got=type(tokenizer).__name__,
            )
        self.tokenizer: Any = tokenizer
        self.turns, self.system, self.empty_instruction = turns, system, empty_instruction
        # As attach() takes them; saved with the tower, and restored by load_model().
        self.settings = {"turns": turns, "system": system, "empty_instruction": empty_instruction}
        self.image_ids = frozenset(image_ids)
        self.marks: TurnMarks | None = None
        self.splitter: TurnSplitter | None = None
        self.has_null_text = False  # whether rows without an instruction have no text, instead of an error
        self.problem = "attach() was given no tokenizer."
        if tokenizer is None:
            return
        try:
            self.marks = learn_marks(tokenizer, template)
        except ConfigError as error:  # raised by read(): calls with context_text= need no marks
            self.problem = error.problem
            return
        if system is not None:
            self.system = round_trip(tokenizer, system).strip()
        shown = {tokenizer.convert_ids_to_tokens(i) for i in self.image_ids if 0 <= i < len(tokenizer)}
        body = f"{any_of({*special_strings(tokenizer), *shown})}|{_TIMESTAMP}"
        special = any_of(special_strings(tokenizer))
        self.splitter = TurnSplitter(self.marks, special, getattr(tokenizer, "bos_token", None))
        self._dropped = re.compile(rf"[ \t]*(?:{body})(?:[ \t]*(?:{body}))*[ \t]*")

    def read(
        self, input_ids: Tensor, rows: Iterable[int], *, attention_mask: Any = None, labels: Any = None
    ) -> list[Any]:
        """Read the instruction of each row; None, with a null text, where the user says nothing.

        Args:
            input_ids: Shape `(R, L)`.
            rows: Indices of the rows to read.
            attention_mask: Shape `(R, L)`, 0 for padding; masks of other shapes are ignored.
            labels: Shape `(R, L)`, -100 for tokens of the prompt; labels of other shapes are ignored.

        Raises:
            MissingContextError: If a row has no user turn, or only empty ones, or can be read in two ways.
        """
        rows = list(rows)
        ids = input_ids[rows].tolist() if rows else []
        masks = attention_mask[rows].tolist() if _fits(attention_mask, input_ids) else [None] * len(rows)
        targets = labels[rows].tolist() if _fits(labels, input_ids) else [None] * len(rows)
        return [self._row(*row) for row in zip(rows, ids, masks, targets, strict=True)]

    def _row(self, row: int, ids: list[int], mask: list[int] | None, labels: list[int] | None) -> str | None:
        if self.marks is None:
            if self.empty_instruction is not None:
                return self.empty_instruction
            raise MissingContextError(
                f"The instruction cannot be read from the prompt. {self.problem}",
                expected="a tokenizer whose chat template marks user turns",
                got="none",
                fix=_FIX,
            )
        if mask is not None:
            kept = [position for position, counts in enumerate(mask) if counts]
            ids = [ids[position] for position in kept]
            labels = None if labels is None else [labels[position] for position in kept]
        turns = self._answered(ids, labels) or self._users(self._decode(ids))
        said = [turn for turn in turns if turn.text or turn.unclear]
        if not said and self.empty_instruction is not None:
            return self.empty_instruction
        if not said and self.has_null_text:
            return None
        if not said:
            raise MissingContextError(
                f"The user turns in row {row} of the prompt are empty."
                if turns
                else f"Row {row} of the prompt has no user turn.",
                expected=f"{' '.join(self.marks.start)} ... {' '.join(self.marks.end or self.marks.answer_start)}",
                got=repr(self._decode(ids)[:120]),
                fix=_FIX,
            )
        chosen = {"all": said, "first": said[:1], "last": said[-1:]}[self.turns]
        if any(turn.unclear for turn in chosen):
            raise MissingContextError(
                f"Row {row} of the prompt can be read in two ways: a mark of the chat template occurs in its text.",
                expected=f"{' '.join((*self.marks.end, *self.marks.answer_start))} once after each question, "
                "labels that are -100 up to the answers, or context_text",
                got=repr(next(turn.text for turn in chosen if turn.unclear)[:120]),
                fix=_FIX,
            )
        return " ".join(turn.text for turn in chosen)

    def _answered(self, ids: list[int], labels: list[int] | None) -> list[Turn]:
        """Find the turns outside of learned answers; none if the labels cut turns, as in some codebases."""
        if labels is None or all(label == _IGNORED for label in labels):
            return []
        parts = [
            (is_prompt, self._decode([token for token, _ in part]))
            for is_prompt, part in itertools.groupby(
                zip(ids, labels, strict=True), key=lambda pair: pair[1] == _IGNORED
            )
        ]
        found: list[Turn] = []
        for (is_prompt, text), (_, after) in zip(parts, [*parts[1:], (False, None)], strict=True):
            if is_prompt:
                turns = self._users(text, answered=after is not None)
                cut = after is not None and turns and not (turns[-1].closed or self._begins_answer(after))
                found += turns[:-1] if cut else turns
        return found if any(turn.text for turn in found) else []

    def _begins_answer(self, text: str) -> bool:
        return self.splitter is not None and self.splitter.begins_answer(text)

    def _users(self, text: str, *, answered: bool = False) -> list[Turn]:
        assert self.splitter is not None
        start = text.find(self.system) if self.system else -1
        if start >= 0 and self.splitter.start.search(text, start, start + len(self.system or "")):
            text = text[start + len(self.system or "") :]  # a system prompt that spells the marks
        turns = self.splitter.split(text, answered=answered)
        return [dataclasses.replace(turn, text=self._clean(turn.text)) for turn in turns]

    def _decode(self, ids: list[int]) -> str:
        kept: list[int] = []
        for token in ids:
            # One placeholder per image suffices. Negative ids are placeholders of other codebases.
            if token >= 0 and not (token in self.image_ids and kept and kept[-1] == token):
                kept.append(token)
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _clean(self, text: str) -> str:
        assert self.marks is not None
        marked = self.marks.system_prompt()
        if marked is not None:
            text = marked.sub("", text, count=1)
        text = self._dropped.sub(" ", text).strip()
        if self.system and self.marks.system is not None and text.startswith(self.system):
            text = text[len(self.system) :].strip()
        return text

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptReader:
        return self  # immutable


def _fits(values: Any, input_ids: Tensor) -> bool:
    return isinstance(values, Tensor) and values.shape == input_ids.shape

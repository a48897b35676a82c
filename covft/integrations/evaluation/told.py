"""The conditioning audit as an evaluation: another text for the tower alone, the prompt unchanged, in any engine.

`telling` takes an attached model and holds for all its calls, whoever makes them, in the engine's own batches. A class
of an engine opens it around what asks the model:

    def generate_until(self, requests):                             # lmms-eval, a sub-class of a chat class
        with telling(self.attached, self.text, questions=[request.args[0] for request in requests]):
            return super().generate_until(requests)

    def __init__(self, ...):                                        # VLMEvalKit, whose model lives as long as the run
        self.telling = telling(model, text)
        self.telling.__enter__()

With `"right"` the tower reads what it would read anyway, and a sentence that the engine has put around a question is
warned about once, unless the encoder's setting `instructions="clean"` removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations.mllm.attachment import Attachment, attachment_of
from covft.text.cleaning import clean_instruction, engine_sentences
from covft.utils.arguments import check_kinds

GENERIC = "Describe the image."
TEXTS = ("right", "swapped", "generic", "blank")
"""What a tower can be told: its question's text, that of another question, one text for all, features of zeros."""


@contextlib.contextmanager
@check_kinds
def telling(
    model: nn.Module, text: str = "right", *, questions: Iterable[str] = (), generic: str = GENERIC
) -> Iterator[Told]:
    """Tell the tower of an attached model another text than its prompts have, while the context is open.

    Args:
        model: A multimodal LLM whose tower reads text, after `covft.attach`, `covft.tune` or `covft.load_model`.
        text: `"right"`: that of the prompt. `"swapped"`: that of another question, the same one in every run and in
            every process if `questions` are given. `"generic"`: the same text for all. `"blank"`: features of zeros.
        questions: All questions that will be asked, to draw from for `"swapped"`. Without them, those that were asked
            before are drawn from, and the first one is told the generic text.
        generic: The text of `"generic"`.

    Yields:
        What tells the tower; it counts.

    Raises:
        ConfigError: If `text` is not known.
        UnsupportedViTError: If the model is not attached, or its tower reads no text.

    Example:
        >>> with telling(model, "swapped"):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    if text not in TEXTS:
        raise ConfigError(
            f"text={text!r} is not known.", expected=" | ".join(TEXTS), got=repr(text), fix="text='right'"
        )
    attachment = attachment_of(model)
    if attachment is None or (text != "right" and attachment.encoder.text_dim is None):
        raise UnsupportedViTError(
            "There is no tower that can be told a text.",
            expected="an attached model whose tower reads text",
            got=type(model).__name__,
            fix="covft.load_model(folder)",
        )
    told = Told(attachment, text, list(questions), generic)
    attachment.reader = told  # type: ignore[assignment]  # it reads as the other one does
    try:
        yield told
    finally:
        attachment.reader = told.reader


class Told:
    """Stands for the reader of an attached model's prompts, and gives other texts than it reads.

    Attributes:
        reader: The model's own reader.
        counts: How many texts were given, by kind: `"right"`, `"swapped"`, `"generic"`, `"blank"`.
    """

    def __init__(self, attachment: Attachment, text: str, questions: list[str], generic: str) -> None:
        self.reader = attachment.reader
        self.counts = dict.fromkeys(TEXTS, 0)
        self._encoder, self._text, self._generic = attachment.encoder, text, generic
        self._cleans = attachment.routed is not None and attachment.routed.covft_config.instructions == "clean"
        self._known = list(dict.fromkeys(self._seen(question) for question in questions))
        self._is_complete = bool(questions)
        self._has_warned = False

    def read(self, input_ids: Tensor, rows: Iterable[int], *, attention_mask: Any = None, labels: Any = None) -> Any:
        """Return what the tower is told about some rows; arguments as for `PromptReader.read`.

        Returns:
            A text for each row, or features of zeros, shape `(R, C)`.
        """
        rows = list(rows)
        if self._text == "blank":
            self.counts["blank"] += len(rows)
            return torch.zeros(len(rows), self._encoder.text_dim or 0)
        if self._text == "generic":
            self.counts["generic"] += len(rows)
            return [self._generic] * len(rows)
        read = self.reader.read(input_ids, rows, attention_mask=attention_mask, labels=labels)
        if self._text == "swapped":
            return [self._other(text) for text in read]
        self.counts["right"] += len(rows)
        self._warn_of_engine(read)
        return read

    def _seen(self, text: str) -> str:
        """Return what the tower sees of a text."""
        return clean_instruction(text) if self._cleans else text

    def _other(self, text: str | None) -> str:
        """Return the text of another question, drawn by the question itself."""
        own = None if text is None else self._seen(text)
        others = [question for question in self._known if question != own]
        if own is not None and not self._is_complete and own not in self._known:
            self._known.append(own)
        if not others:
            self.counts["generic"] += 1
            return self._generic
        self.counts["swapped"] += 1
        drawn = int.from_bytes(hashlib.sha256((own or "").encode()).digest()[:8], "big")
        return others[drawn % len(others)]

    def _warn_of_engine(self, texts: Iterable[str | None]) -> None:
        """Warn once of a sentence that the engine has added and the tower reads."""
        if self._cleans or self._has_warned or not self._encoder.conditioning.needs_text:
            return
        found = [sentence for text in texts if text is not None for sentence in engine_sentences(text)]
        if found:
            self._has_warned = True
            warnings.warn(
                f"The tower reads what the engine adds to questions, such as {found[0]!r}: it was trained with "
                'instructions="as_given", on texts that hardly had it. Training with instructions="clean" removes such '
                "sentences on both sides.",
                UserWarning,
                stacklevel=2,
            )

    def __getattr__(self, name: str) -> Any:
        if name == "reader":  # not set yet
            raise AttributeError(name)
        return getattr(self.reader, name)

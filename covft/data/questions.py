"""Reads questions about images, without answers."""

from __future__ import annotations

from collections.abc import Mapping

from covft.data.broken import DataError
from covft.data.checks import short
from covft.data.llava import LlavaRows
from covft.data.rows import IMAGE_TAG, Row, names_of
from covft.data.turns import check_text


class QuestionRows(LlavaRows):
    r"""Reads rows of `image` and `question`, to be answered or embedded.

    A row is `{"image": name or list of names, "question": ..., "id": ...}`; `image` and `id` can be left out. Its one
    message is the user's: the images, then the question.

    Args:
        annotation: JSONL with one row per line, or a JSON list.
        images: As for `LlavaRows`.

    Raises:
        ConfigError: If an argument is of the wrong type.
        DataError: If the file or the folder cannot be read.

    Example:
        >>> rows = QuestionRows("questions.jsonl", images="pictures")  # doctest: +SKIP
        >>> rows[0].messages  # doctest: +SKIP
        ({'role': 'user', 'content': '<image>\nWhat is left of the cup?'},)
    """

    def __getitem__(self, index: int) -> Row:
        """Read a row; raises `DataError` if it is unusable."""
        record = self.records[index]
        try:
            return _row(record)
        except DataError as error:
            raise error.at(self.place(index)) from error.__cause__


def _row(record: object) -> Row:
    if not isinstance(record, Mapping):
        raise DataError(f"The row is not a JSON object but {type(record).__name__}.")
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"The row has no question: {short(question)}.")
    check_text(question, "The question")
    if IMAGE_TAG in question:
        raise DataError(f"The question contains {IMAGE_TAG}; the images are those of the field image.")
    images = names_of(record.get("image", record.get("images")))
    content = "\n".join([*[IMAGE_TAG] * len(images), question])
    return Row(messages=({"role": "user", "content": content},), images=images, id=str(record.get("id", "")))

"""Extracts the instructions of a data set, for precomputed text features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from covft.data.broken import DataError
from covft.data.conversation import instruction_text
from covft.data.files import check_path, open_regular
from covft.data.images import ImageStore
from covft.data.internvl import InternVLRows
from covft.data.llava import LlavaRows
from covft.data.questions import QuestionRows
from covft.data.rows import RowSource
from covft.text.cleaning import clean_instruction
from covft.utils.arguments import check_kinds


@check_kinds
def open_rows(path: str | Path, images: str | Path | ImageStore | None = None) -> RowSource:
    """Open LLaVA's JSON or JSONL, InternVL's meta file, or rows of `image` and `question`.

    Args:
        path: The file; a meta file is a JSON object whose values have an `annotation`.
        images: As for `LlavaRows`; a meta file names its folders itself.

    Raises:
        DataError: If the file or the folder cannot be read.
    """
    with open_regular(check_path(path, "The annotation file"), "The annotation file") as file:
        start = file.read(4096).decode(errors="replace")
    is_rows = '"conversations"' in start or '"messages"' in start
    is_meta = start.lstrip("\ufeff \t\r\n").startswith("{") and '"annotation"' in start and not is_rows
    if is_meta:
        return InternVLRows(path)
    return LlavaRows(path, images) if is_rows or '"question"' not in start else QuestionRows(path, images)


@check_kinds
def instructions_of(
    source: RowSource, turns: str = "all", *, empty_instruction: str | None = None, clean: bool = False
) -> Iterator[str | None]:
    """Extract the instruction of each row, without opening images.

    Args:
        source: The rows.
        turns: User turns that make the instruction: `"all"`, joined by a space, the `"first"` or the `"last"`.
        empty_instruction: Instruction of rows whose user turns hold no text.
        clean: Whether to clean them, for a ViT with `instructions="clean"`.

    Yields:
        The instruction; None for an unusable row.
    """
    for number in range(len(source)):
        try:
            text = instruction_text(source[number], turns) or empty_instruction
            yield clean_instruction(text) if text and clean else text
        except DataError:
            yield None

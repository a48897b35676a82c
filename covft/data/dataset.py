"""Turns rows of any source into training samples: tokens, labels, images and the instruction."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from covft.data.augment import JpegAugment
from covft.data.broken import BrokenLog, BrokenRow, DataError
from covft.data.chat_template import Tokenizer
from covft.data.checks import flag, function, short, string, whole
from covft.data.conversation import IGNORE_INDEX, Encoded, encode_conversation, instruction_text
from covft.data.placeholders import ImageText
from covft.data.records import row_number
from covft.data.rows import Row, RowSource, parse_row
from covft.data.tiling import NoTiling, Tiling
from covft.data.turns import IMAGE_TAG, check_text
from covft.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from PIL import Image

_MOST_CHARACTERS = 1 << 20  # a tokenizer takes up to 512 bytes for each


class ConversationDataset(Dataset[dict[str, Any]]):
    """Encodes conversations about images, ready for a `Collator`.

    Unusable rows are never skipped silently: a warning names file and row, `broken` lists them, and the next usable row
    (always the same one) replaces them. Past `max_broken` they are an error.

    Args:
        source: `LlavaRows`, `InternVLRows`, or another `RowSource`.
        tokenizer: A tokenizer of transformers.
        image_processor: An image processor of transformers, or a function from an RGB image to a tensor (3, H, W).
            Optional if no row has an image.
        image_text: The text that replaces an `<image>` tag.
        tiling: Splits an image into those that the tower sees: `NoTiling()`, `PadToSquare()` or `DynamicTiling()`.
            The images of a row share the limit of tiles.
        max_length: Longest sequence, in tokens; longer ones are truncated. A row that would lose an image or all of its
            answers is broken. Without a limit, a row may name any number of images.
        turns: User turns that make the instruction: `"all"`, joined by a space, the `"first"` or the `"last"`.
        empty_instruction: Instruction of rows whose user turns hold only images; None makes such a row broken.
        null_text: Whether such rows have no text instead, for a tower with a null text.
        chat_template: A template instead of the tokenizer's own, or the name of one of several.
        end_of_turn: Text that ends an answer; None looks for the special token after it.
        system: System message of rows that have none.
        images_only: Whether to keep only the images of the user's turns, as in LLaVA's stage 1.
        augment: Augmentation for the data sets that ask for it. It depends on row and `seed` only, so that a resumed
            run sees the same images as an uninterrupted one.
        max_broken: Limit of broken rows: a number, or a fraction of all rows.
        seed: Seed of the augmentation.

    Attributes:
        broken: The broken rows met so far, by this process and by the workers of its DataLoaders.

    Raises:
        ConfigError: If a setting is invalid.
    """

    def __init__(
        self,
        source: RowSource,
        tokenizer: Any,
        image_processor: Callable[..., Any] | None = None,
        *,
        image_text: ImageText | None = None,
        tiling: Tiling | None = None,
        max_length: int | None = None,
        turns: str = "all",
        empty_instruction: str | None = None,
        null_text: bool = False,
        chat_template: str | None = None,
        end_of_turn: str | None = None,
        system: str | None = None,
        images_only: bool = False,
        augment: Callable[[Image.Image, random.Random], Image.Image] | None = None,
        max_broken: int | float = 0.01,
        seed: int = 0,
    ) -> None:
        instruction_text([{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}], turns)  # checks `turns`
        _check_parts(source, tokenizer, image_processor, image_text, tiling, augment)
        if max_length is not None:
            whole(max_length, "max_length", least=1)
        for name, value in (
            ("empty_instruction", empty_instruction),
            ("chat_template", chat_template),
            ("end_of_turn", end_of_turn),
            ("system", system),
        ):
            if value is not None:
                string(value, name)
        flag(images_only, "images_only")
        flag(null_text, "null_text")
        whole(seed, "seed")
        self.source = source
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_text = ImageText() if image_text is None else image_text
        self.tiling = NoTiling() if tiling is None else tiling
        self.max_length = max_length
        self.turns = turns
        self.empty_instruction = empty_instruction
        self.null_text = null_text
        self.chat_template = chat_template
        self.end_of_turn = end_of_turn
        self.system = system
        self.images_only = images_only
        self.augment = JpegAugment() if augment is None else augment
        self.seed = seed
        # Without a processor only rows without images are usable; these need no placeholder.
        self._image_id = self.image_text.token_id(tokenizer) if image_processor is not None else None
        self._log = BrokenLog(len(source), max_broken)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a sample, or the next usable one.

        Returns:
            `input_ids` and `labels` (L,), `pixel_values` (tiles, 3, H, W) or None, `num_tiles` (per image),
            `context_text` (the instruction; None for no text) and `row` (index of the row that was read).

        Raises:
            ConfigError: If the index is not an integer, or the annotation file has changed.
            DataError: If more rows are broken than `max_broken` allows.
        """
        rows = len(self)
        index = row_number(index, rows)
        for step in range(rows):
            row = (index + step) % rows
            try:
                return self._sample(row)
            except DataError as error:
                self._log.add(error.at(self.source.place(row)))
        raise DataError(f"None of the {rows} rows is usable.", got=str(self.broken[0]))

    @property
    def broken(self) -> tuple[BrokenRow, ...]:
        """The broken rows met so far, in order."""
        return self._log.entries()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a preprocessed image, for the `Collator`."""
        from PIL import Image as PILImage

        _, *shape = self._pixels(self.tiling(PILImage.new("RGB", (64, 64)))).shape
        return shape[0], shape[1], shape[2]

    def modality_lengths(self) -> list[int]:
        """Count the words of each row, negative for rows without images, for `ModalityGroupedSampler`.

        Reads the annotations once, and no images. An unreadable row counts as one word with an image.
        """
        lengths = [1] * len(self)
        scan = getattr(self.source, "scan", None)
        if scan is None:
            scan = self._scan_rows
        for row, record in scan():
            try:
                found = record if isinstance(record, Row) else parse_row(record, add_missing_tag=True)
            except DataError:
                continue
            words = sum(len(message["content"].split()) for message in found.messages)
            lengths[row] = max(words, 1) * (1 if found.images else -1)
        return lengths

    def _scan_rows(self) -> Iterator[tuple[int, Row]]:
        for row in range(len(self)):
            try:
                yield row, self.source[row]
            except DataError:
                continue

    def check(self, rows: Iterable[int] | None = None) -> list[BrokenRow]:
        """Read rows with their images and list the broken ones, without replacement or limit.

        Args:
            rows: Indices of the rows; None reads all.
        """
        if rows is not None and not isinstance(rows, Iterable):
            raise ConfigError("rows is not a list of rows.", expected="indices, or None for all", got=short(rows))
        found = []
        for row in range(len(self)) if rows is None else rows:
            try:
                self._sample(row)
            except DataError as error:
                place = self.source.place(row)
                found.append(BrokenRow(place.file, place.row, place.line, error.reason))
        return found

    def _sample(self, index: int) -> dict[str, Any]:
        row = self.source[index]
        if not isinstance(row, Row):
            raise ConfigError("The source does not return rows.", expected="covft.data.Row", got=short(row))
        self._check_size(row)
        text = instruction_text(row, self.turns) or self.empty_instruction
        if not text and not self.null_text:
            raise DataError("The user's turns hold only images, so there is no instruction to condition on.")
        images = [self._cut(index, row, name) for name in row.images]
        counts = [len(tiles) for tiles in images]
        encoded = self._encode(row, counts)
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "pixel_values": self._pixels(list(itertools.chain(*images))) if images else None,
            "num_tiles": counts,
            "context_text": text or None,
            "row": index,
        }

    def _check_size(self, row: Row) -> None:
        """Refuse text that no tokenizer reads, and more than fits into `max_length`, before anything is read."""
        for message in row.messages:
            check_text(message["content"], "The conversation")
        characters = sum(len(message["content"]) for message in row.messages)
        if characters > _MOST_CHARACTERS:
            raise DataError(f"The conversation has {characters:,} characters, more than {_MOST_CHARACTERS:,}.")
        images = len(row.images)
        least = images * self.image_text.per_tile
        if self.max_length is not None and least > self.max_length:
            raise DataError(
                f"The row names {images} images of at least {least:,} tokens: max_length={self.max_length} "
                "truncates images."
            )

    def _cut(self, index: int, row: Row, name: str) -> list[Image.Image]:
        image = self.source.image(index, name)
        if row.augment:
            image = self.augment(image, random.Random(f"{self.seed}/{index}/{name}"))
        most = row.max_tiles if row.max_tiles is not None else getattr(self.tiling, "max_tiles", None)
        return self.tiling(image, most if most is None else max(1, most // len(row.images)))

    def _encode(self, row: Row, tiles: list[int]) -> Encoded:
        messages = [dict(message) for message in row.messages]
        if self.images_only:
            for message in messages:
                if message["role"] == "user":
                    message["content"] = IMAGE_TAG * message["content"].count(IMAGE_TAG)
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        input_ids, labels = encode_conversation(
            self.tokenizer,
            self.image_text.expand(messages, tiles),
            chat_template=self.chat_template,
            end_of_turn=self.end_of_turn,
        )
        length = len(input_ids)
        input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        expected = self.image_text.per_tile * sum(tiles)
        if self._image_id is not None and int((input_ids == self._image_id).sum()) != expected:
            got = int((input_ids == self._image_id).sum())
            why = (
                f"max_length={self.max_length} truncates images" if got < expected else "the text itself contains some"
            )
            raise DataError(f"The row has {got} image tokens, but its images need {expected}: {why}.")
        if not bool((labels[1:] != IGNORE_INDEX).any()):
            raise DataError(f"max_length={self.max_length} leaves no answer in a row of {length} tokens.")
        return Encoded(input_ids, labels)

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        if self.image_processor is None:
            raise ConfigError("The data set has rows with images, but no image_processor.")
        processor = getattr(self.image_processor, "image_processor", self.image_processor)
        try:
            if hasattr(processor, "preprocess"):
                pixels = processor(images=images, return_tensors="pt")["pixel_values"]
            else:
                tensors = [processor(image) for image in images]
                same = all(tensor.shape == tensors[0].shape for tensor in tensors)
                pixels = torch.stack(tensors) if same else torch.empty(0)
        except torch.cuda.OutOfMemoryError:
            raise
        except (ValueError, ArithmeticError, RuntimeError) as error:  # images one pixel wide, for example
            raise DataError(f"The image processor refuses an image: {error}") from error
        if pixels.ndim != 4 or len(pixels) != len(images):
            raise ShapeError(
                "The image processor does not return one tensor per image.",
                expected=f"({len(images)}, 3, H, W)",
                got=tuple(pixels.shape) if pixels.numel() else "tensors of several sizes",
                fix="an image processor that does not tile images itself; use tiling=DynamicTiling()",
            )
        return pixels


def _check_parts(source: Any, tokenizer: Any, image_processor: Any, image_text: Any, tiling: Any, augment: Any) -> None:
    """Check the objects that a data set is made of; raises ConfigError."""
    missing = [name for name in ("__len__", "__getitem__", "place", "image") if not hasattr(source, name)]
    if missing or isinstance(source, type):
        raise ConfigError(
            "The source does not provide rows.",
            expected="LlavaRows, InternVLRows, DatasetsRows or a RowSource",
            got=f"{short(source)} without {', '.join(missing)}" if missing else short(source),
        )
    if isinstance(tokenizer, type) or not isinstance(tokenizer, Tokenizer):
        raise ConfigError(
            "The tokenizer cannot render a conversation.",
            expected="a tokenizer of transformers, which has apply_chat_template",
            got=short(tokenizer),
        )
    for name, value in (("image_processor", image_processor), ("tiling", tiling), ("augment", augment)):
        if value is not None and not hasattr(value, "preprocess"):
            function(value, name)
        if isinstance(value, type):
            raise ConfigError(f"{name} is a class.", expected="an object", got=short(value), fix=f"{value.__name__}()")
    if image_text is not None and not isinstance(image_text, ImageText):
        raise ConfigError("image_text is not an ImageText.", got=short(image_text), fix='ImageText("<image>")')

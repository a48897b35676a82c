"""Rows of any source as samples for training: tokens, labels, images and the instruction."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from covft.data.augment import JpegAugment
from covft.data.broken import BrokenLog, BrokenRow, DataError
from covft.data.conversation import IGNORE_INDEX, Encoded, encode_conversation, instruction_text
from covft.data.placeholders import ImageText
from covft.data.rows import IMAGE_TAG, Row, RowSource
from covft.data.tiling import NoTiling, Tiling
from covft.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from PIL import Image


class ConversationDataset(Dataset[dict[str, Any]]):
    """Conversations about images, ready for a `Collator`.

    A row that cannot be used is never left out in silence: it is reported with file and row by a warning, kept in
    `broken`, and the next usable row stands in for it (always the same one); past `max_broken` it is an error.

    Args:
        source: `LlavaRows`, `InternVLRows`, or anything like them.
        tokenizer: A tokenizer of transformers.
        image_processor: An image processor of transformers, or any function from an RGB picture to a tensor (3, H, W).
            It may be left out if no row has an image.
        image_text: What stands for an image in the text.
        tiling: How a picture becomes the pictures that the tower sees: `NoTiling()`, `PadToSquare()` or
            `DynamicTiling()`. Several images of a row share the limit of tiles.
        max_length: Longest sequence, in tokens. What follows is cut off; a row of which no answer or not every image
            would be left is broken.
        turns: User turns that make the instruction: `"all"`, joined by a space, the `"first"` or the `"last"`.
        empty_instruction: What it reads where the user says nothing besides the images; None makes such a row broken.
        chat_template: A template instead of the tokenizer's own.
        end_of_turn: What ends an answer; None looks for the special token after it.
        system: System message for rows that have none.
        images_only: Whether the language model sees the images alone of the user's turns, as in LLaVA's stage 1.
        augment: What is done to images of data sets that ask for augmentation. It is drawn by row and `seed`, the same
            in every epoch and process, so that a resumed run sees what an uninterrupted one would have seen.
        max_broken: How many rows may be broken: a number, or a fraction of all rows.
        seed: Of the augmentation.

    Attributes:
        broken: The rows found to be broken so far, by this process and by the workers of its DataLoaders.

    Raises:
        ConfigError: If a setting cannot work.
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
        chat_template: str | None = None,
        end_of_turn: str | None = None,
        system: str | None = None,
        images_only: bool = False,
        augment: Callable[[Image.Image, random.Random], Image.Image] | None = None,
        max_broken: int | float = 0.01,
        seed: int = 0,
    ) -> None:
        instruction_text(
            [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}], turns
        )  # are these turns known?
        self.source = source
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_text = ImageText() if image_text is None else image_text
        self.tiling = NoTiling() if tiling is None else tiling
        self.max_length = max_length
        self.turns = turns
        self.empty_instruction = empty_instruction
        self.chat_template = chat_template
        self.end_of_turn = end_of_turn
        self.system = system
        self.images_only = images_only
        self.augment = JpegAugment() if augment is None else augment
        self.seed = seed
        # Without a processor only rows without images are usable, and those need no placeholder.
        self._image_id = self.image_text.token_id(tokenizer) if image_processor is not None else None
        self._log = BrokenLog(len(source), max_broken)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample.

        Returns:
            `input_ids` and `labels` (L,), `pixel_values` (tiles, 3, H, W) or None, `num_tiles` (one number per image),
            `context_text` (what the text encoder reads) and `row` (the number of the row that was taken).

        Raises:
            DataError: If more rows are broken than `max_broken` allows.
        """
        rows = len(self)
        if not -rows <= index < rows:
            raise IndexError(f"row {index} of {rows}")
        for step in range(rows):
            row = (index + step) % rows
            try:
                return self._sample(row)
            except DataError as error:
                self._log.add(error.at(self.source.place(row)))
        raise DataError(f"None of the {rows} rows can be used.", got=str(self.broken[0]))

    @property
    def broken(self) -> tuple[BrokenRow, ...]:
        """The rows found to be broken so far, in the order in which they were met."""
        return self._log.entries()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the image processor makes, for the `Collator`."""
        from PIL import Image as PILImage

        _, *shape = self._pixels(self.tiling(PILImage.new("RGB", (64, 64)))).shape
        return shape[0], shape[1], shape[2]

    def modality_lengths(self) -> list[int]:
        """Length of each row in words, negative where it has no image; for `ModalityGroupedSampler`.

        It reads the annotations once, and no image. A row that cannot be read counts as one word about an image.
        """
        lengths = [1] * len(self)
        scan = getattr(self.source, "scan", None)
        if scan is None:
            for row in range(len(self)):
                try:
                    found = self.source[row]
                except DataError:
                    continue
                words = sum(len(message["content"].split()) for message in found.messages)
                lengths[row] = max(words, 1) * (1 if found.images else -1)
            return lengths
        for row, record in scan():
            if isinstance(record, dict) and isinstance(record.get("conversations"), list):
                turns = [turn.get("value") for turn in record["conversations"] if isinstance(turn, dict)]
                words = sum(len(value.split()) for value in turns if isinstance(value, str))
                lengths[row] = max(words, 1) * (1 if record.get("image") or record.get("images") else -1)
        return lengths

    def check(self, rows: Iterable[int] | None = None) -> list[BrokenRow]:
        """Read rows, images included, and say which are broken; nothing stands in for them and no limit holds.

        Args:
            rows: Their numbers; None reads all.
        """
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
        text = instruction_text(row, self.turns) or self.empty_instruction
        if not text:
            raise DataError("The user says nothing besides the images, so there is no instruction to condition on.")
        pictures = [self._cut(index, row, name) for name in row.images]
        tiles = [len(cut) for cut in pictures]
        encoded = self._encode(row, tiles)
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "pixel_values": self._pixels([tile for cut in pictures for tile in cut]) if pictures else None,
            "num_tiles": tiles,
            "context_text": text,
            "row": index,
        }

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
        whole = len(input_ids)
        input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        expected = self.image_text.per_tile * sum(tiles)
        if self._image_id is not None and int((input_ids == self._image_id).sum()) != expected:
            got = int((input_ids == self._image_id).sum())
            why = f"max_length={self.max_length} cuts off images" if got < expected else "the text itself holds some"
            raise DataError(f"The row has {got} image tokens where its images take {expected}: {why}.")
        if not bool((labels[1:] != IGNORE_INDEX).any()):
            raise DataError(f"max_length={self.max_length} leaves no answer of {whole} tokens.")
        return Encoded(input_ids, labels)

    def _pixels(self, pictures: list[Image.Image]) -> torch.Tensor:
        if self.image_processor is None:
            raise ConfigError("There are rows with images, and no image_processor was given.")
        processor = getattr(self.image_processor, "image_processor", self.image_processor)
        try:
            if hasattr(processor, "preprocess"):
                pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
            else:
                tensors = [processor(picture) for picture in pictures]
                same = all(tensor.shape == tensors[0].shape for tensor in tensors)
                pixels = torch.stack(tensors) if same else torch.empty(0)
        except ValueError as error:  # what image processors say to pictures one pixel wide and the like
            raise DataError(f"The image processor refuses an image: {error}") from error
        if pixels.ndim != 4 or len(pixels) != len(pictures):
            raise ShapeError(
                "The image processor does not give one tensor per picture.",
                expected=f"({len(pictures)}, 3, H, W)",
                got=tuple(pixels.shape) if pixels.numel() else "several sizes",
                fix="an image processor that does not cut pictures itself; tiling=DynamicTiling() does",
            )
        return pixels

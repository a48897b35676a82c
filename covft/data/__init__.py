"""Training data in the formats of LLaVA and InternVL: rows, images, labels, batches.

A source (`LlavaRows`, `InternVLRows`, `DatasetsRows`) reads rows, `ConversationDataset` turns them into samples,
`Collator` batches these, and `ModalityGroupedSampler` orders them. Unusable rows are reported with file and row.
"""

from covft.data.augment import JpegAugment
from covft.data.broken import BrokenRow, DataError, Place
from covft.data.collator import Collator, drop_dummies
from covft.data.conversation import IGNORE_INDEX, Encoded, encode_conversation, instruction_text, to_messages
from covft.data.dataset import ConversationDataset
from covft.data.decoding import ImageDecoder
from covft.data.grouping import ModalityGroupedSampler
from covft.data.hub import DatasetsRows
from covft.data.images import ImageFolder, ImageStore
from covft.data.instructions import instructions_of, open_rows
from covft.data.internvl import InternVLRows
from covft.data.llava import LlavaRows
from covft.data.meta import MetaEntry, read_meta
from covft.data.placeholders import ImageText
from covft.data.questions import QuestionRows
from covft.data.records import JsonRecords
from covft.data.rows import IMAGE_TAG, Row, RowSource, parse_row
from covft.data.shards import TarImages
from covft.data.spans import answer_spans
from covft.data.templates import CHAT_TEMPLATES
from covft.data.tiling import DynamicTiling, NoTiling, PadToSquare, Tiling, pad_to_square, tile_grid, tile_image
from covft.text.cleaning import clean_instruction

__all__ = [
    "CHAT_TEMPLATES",
    "IGNORE_INDEX",
    "IMAGE_TAG",
    "BrokenRow",
    "Collator",
    "ConversationDataset",
    "DataError",
    "DatasetsRows",
    "DynamicTiling",
    "Encoded",
    "ImageDecoder",
    "ImageFolder",
    "ImageStore",
    "ImageText",
    "InternVLRows",
    "JpegAugment",
    "JsonRecords",
    "LlavaRows",
    "MetaEntry",
    "ModalityGroupedSampler",
    "NoTiling",
    "PadToSquare",
    "Place",
    "QuestionRows",
    "Row",
    "RowSource",
    "TarImages",
    "Tiling",
    "answer_spans",
    "clean_instruction",
    "drop_dummies",
    "encode_conversation",
    "instruction_text",
    "instructions_of",
    "open_rows",
    "pad_to_square",
    "parse_row",
    "read_meta",
    "tile_grid",
    "tile_image",
    "to_messages",
]

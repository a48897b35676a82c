"""What the tower is told about each question: text features, and the controls that replace them.

Shapes: S distinct questions, K states of a question, C width of the features.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from covft.errors import TextEncoderError
from study.data.prepared import encode_texts
from study.data.tasks import TASKS
from study.data.tokenizer import build_tokenizer
from study.runs.settings import RunSettings
from study.runs.tables import Table

WIDTH = 384  # of MiniLM; all text encoders and controls have it, so that the towers have the same parameters


def text_rows(settings: RunSettings, table: Table, *, states: bool) -> Tensor:
    """Return what the tower is told for each distinct question of a table, `(S, C)`, or states `(S, K, C)`.

    Args:
        settings: The run.
        table: The questions.
        states: Whether the method reads states of tokens; where an encoder has none, its features are the one state.
    """
    if settings.control == "blank":
        rows = torch.zeros(len(table.texts), WIDTH)
    elif settings.control == "generic":
        generic = TASKS["caption"].phrasings[0].format("the picture")
        rows = encode(settings.text_encoder, (generic,), states=states)
        rows = rows.expand(len(table.texts), *rows.shape[1:]).clone()
    elif settings.control == "oracle":
        rows = torch.zeros(len(table.texts), WIDTH)
        rows[torch.arange(len(table.texts)), [list(TASKS).index(task) for task in table.tasks]] = 1.0
    else:
        rows = encode(settings.text_encoder, tuple(table.texts), states=states)
    return rows[:, None] if states and rows.dim() == 2 else rows


@lru_cache(maxsize=8)
def encode(name: str, texts: tuple[str, ...], *, states: bool = False) -> Tensor:
    """Encode texts.

    Args:
        name: `minilm`, `bag_of_words` or `random`.
        texts: The texts.
        states: Whether states of tokens are wanted, where the encoder has them.
    """
    if name == "bag_of_words":
        return bag_of_words(texts)
    if name == "random":
        return torch.stack([_random(text) for text in texts])
    return encode_texts(texts, states=states)


def bag_of_words(texts: tuple[str, ...]) -> Tensor:
    """Return how often each word of the study is in each text, one feature per word."""
    ids = build_tokenizer().get_vocab()
    if len(ids) > WIDTH:
        raise TextEncoderError("The study has more words than features.", expected=f"<= {WIDTH}", got=len(ids))
    rows = torch.zeros(len(texts), WIDTH)
    for row, text in zip(rows, texts, strict=True):
        for word in text.split():
            row[ids[word]] += 1
    return rows


def _random(text: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))

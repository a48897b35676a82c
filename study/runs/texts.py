"""What the tower is told about each question: text features, and the controls that replace them.

Shapes: S distinct questions, K states of a question, C width of the features.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from covft.errors import TextEncoderError
from study.data.prepared import encode_texts
from study.data.tasks import TASKS
from study.data.tokenizer import build_tokenizer
from study.runs.settings import RunSettings
from study.runs.tables import Table

_known: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}  # MiniLM's features, and its states
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
        rows = encode(settings.text_encoder, (generic(),), states=states)
        rows = rows.expand(len(table.texts), *rows.shape[1:]).clone()
    elif settings.control == "oracle":
        rows = torch.zeros(len(table.texts), WIDTH)
        rows[torch.arange(len(table.texts)), [list(TASKS).index(task) for task in table.tasks]] = 1.0
    else:
        rows = encode(settings.text_encoder, tuple(table.texts), states=states)
    return rows[:, None] if states and rows.dim() == 2 else rows


def texts_read(settings: RunSettings, table: Table) -> tuple[str, ...]:
    """Return the texts of a table that a run encodes, distinct."""
    if settings.control in ("blank", "oracle"):
        return ()
    return (generic(),) if settings.control == "generic" else tuple(dict.fromkeys(table.texts))


def generic() -> str:
    """Return the one text of the control that has one for all questions."""
    return TASKS["caption"].phrasings[0].format("the picture")


def encode(name: str, texts: tuple[str, ...], *, states: bool = False) -> Tensor:
    """Encode texts. What MiniLM has encoded is kept.

    Args:
        name: `minilm`, `bag_of_words` or `random`.
        texts: The texts.
        states: Whether states of tokens are wanted, where the encoder has them.
    """
    if name == "bag_of_words":
        return bag_of_words(texts)
    if name == "random":
        return torch.stack([_random(text) for text in texts])
    known = _known[states]
    if missing := tuple(text for text in dict.fromkeys(texts) if text not in known):
        keep(missing, states, encode_texts(missing, states=states))
    return torch.stack([known[text] for text in texts])


def keep(texts: tuple[str, ...], states: bool, rows: Tensor) -> None:
    """Keep what MiniLM has made of texts.

    Args:
        texts: The texts.
        states: Whether the rows are states of tokens.
        rows: One row per text.
    """
    _known[states].update(zip(texts, rows, strict=True))


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

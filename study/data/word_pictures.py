"""Scenes as text: the word pictures that the language model is pretrained on.

A word picture is 36 bags of words ("red circle top left"), one per patch, in the places of the 36 image tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from covft.data import IGNORE_INDEX
from study.data.scenes import CELL, GRID, PLACES, SIZE, Scene
from study.data.tokenizer import BLANK
from study.towers import PATCH

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Bags = list[list[str]]


def word_picture(scene: Scene, dropped: float, rng: np.random.Generator) -> Bags:
    """Describe each patch of a scene by its content and its place.

    Args:
        scene: The scene.
        dropped: Probability of dropping a word.
        rng: Source of the dropping.
    """
    side, per_cell = SIZE // PATCH, CELL // PATCH
    content = {thing.cell: thing.words if len(thing.words) == 2 else ("photo", *thing.words) for thing in scene.things}
    bags = []
    for patch in range(side * side):
        cell = patch // side // per_cell * GRID + patch % side // per_cell
        words = [*content.get(cell, (BLANK,)), *PLACES[cell].split()]
        bags.append([word for word in words if rng.random() >= dropped])
    return bags


def word_picture_batch(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[tuple[Bags, list[tuple[str, str]]]]
) -> dict[str, torch.Tensor]:
    """Make a batch of word pictures, each with questions and answers that do not attend to one another.

    Args:
        model: The language model, for its embeddings.
        tokenizer: The study's tokenizer.
        texts: Word pictures with their questions and answers.

    Returns:
        `inputs_embeds` (B, L, D), where a bag is the sum of its words' embeddings; `attention_mask` (B, 1, L, L), an
        additive mask; `position_ids` and `labels` (B, L).
    """
    rows, bags = [], []
    for picture, turns in texts:
        prefix = ["<bos>", *["<image>"] * len(picture)]
        # (word, whether it belongs to an answer, turn, position)
        row = [(word, False, 0, i) for i, word in enumerate(prefix)]
        for turn, (question, answer) in enumerate(turns, start=1):
            words = ["<user>", *question.split(), "<answer>"]
            asked = len(words)
            words += [*answer.split(), "<eos>"]
            row += [(word, i >= asked, turn, len(prefix) + i) for i, word in enumerate(words)]
        rows.append(row)
        bags += picture
    pad = int(tokenizer.pad_token_id)
    vocabulary = tokenizer.get_vocab()
    longest, fullest = max(map(len, rows)), max(map(len, bags))
    ids, labels, turn_of, positions = (torch.full((len(rows), longest), fill) for fill in (pad, IGNORE_INDEX, -1, 0))
    for i, row in enumerate(rows):
        words, labelled, row_turns, row_positions = zip(*row, strict=True)
        tokens = torch.tensor([vocabulary[word] for word in words])
        ids[i, : len(row)] = tokens
        labels[i, : len(row)] = torch.where(torch.tensor(labelled), tokens, IGNORE_INDEX)
        turn_of[i, : len(row)] = torch.tensor(row_turns)
        positions[i, : len(row)] = torch.tensor(row_positions)
    # a word attends to the picture and to its own turn, up to itself, as if each question were asked alone
    own = (turn_of[:, :, None] == turn_of[:, None, :]) | (turn_of[:, None, :] == 0)
    visible = own & torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    in_bags = torch.tensor([[vocabulary[word] for word in bag] + [pad] * (fullest - len(bag)) for bag in bags])
    embed = model.get_input_embeddings()
    embedded = embed(ids).clone()
    # the embedding of the padding is always zero, so it adds nothing to a bag
    embedded[ids == vocabulary["<image>"]] = embed(in_bags).sum(1)
    return {
        "inputs_embeds": embedded,
        "attention_mask": mask[:, None],
        "position_ids": positions,
        "labels": labels,
    }

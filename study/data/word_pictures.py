"""Scenes as text: the word pictures that the language model is pretrained on.

A word picture is 36 bags of words ("small red circle top left"), one per patch, in the places of the 36 image tokens.
With fewer image tokens, each is the mean over a square of patches, as in the study's LLaVA.

Shapes: R rows, P patches, W words of the fullest bag, L words of a row's questions and answers, D embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from covft.data import IGNORE_INDEX
from study.data.scenes import CELL, GRID, PLACES, SIZE, Scene
from study.data.tokenizer import BLANK
from study.towers import PATCH

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Turns = list[tuple[str, str]]
SIDE = SIZE // PATCH


def word_picture(scene: Scene) -> list[list[str]]:
    """Describe each patch of a scene: what is in its cell, where an arrow from there leads, and the place."""
    content = {
        thing.cell: [thing.size, *(thing.words if len(thing.words) == 2 else ("photo", *thing.words))]
        for thing in scene.things
    }
    for arrow in scene.arrows:
        content[arrow.start] = [*content[arrow.start], "arrow", arrow.direction]
        content.setdefault((arrow.start + arrow.end) // 2, ["arrow"])
    bags = []
    for patch in range(SIDE * SIDE):
        cell = patch // SIDE * PATCH // CELL * GRID + patch % SIDE * PATCH // CELL
        bags.append([*content.get(cell, [BLANK]), *PLACES[cell].split()])
    return bags


@dataclass
class WordPictures:
    """Word pictures with questions and answers, as tensors.

    Attributes:
        bags_RPW: Words of the patches, padded.
        ids_RL: Words of all questions and answers of a row.
        labels_RL: The words of the answers; `IGNORE_INDEX` elsewhere.
        turns_RL: Which question each word belongs to, from 1; -1 for padding.
        offsets_RL: Position in its own turn.
        bos: Id of `<bos>`, which comes before the picture.
        pad: Id of the padding.
    """

    bags_RPW: torch.Tensor
    ids_RL: torch.Tensor
    labels_RL: torch.Tensor
    turns_RL: torch.Tensor
    offsets_RL: torch.Tensor
    bos: int
    pad: int

    def __len__(self) -> int:
        """Number of rows R."""
        return len(self.ids_RL)

    def to(self, device: torch.device | str) -> WordPictures:
        """Return them on a device."""
        tensors = (self.bags_RPW, self.ids_RL, self.labels_RL, self.turns_RL, self.offsets_RL)
        return WordPictures(*(tensor.to(device) for tensor in tensors), self.bos, self.pad)

    def batch(
        self, model: torch.nn.Module, picked: torch.Tensor, *, side: int = SIDE, dropped: float = 0.0
    ) -> dict[str, torch.Tensor]:
        """Make a batch whose questions do not attend to one another.

        Args:
            model: The language model, for its embeddings.
            picked: The rows.
            side: Square root of the number of image tokens, a divisor of 6.
            dropped: Probability of dropping a word of a bag.

        Returns:
            `inputs_embeds` (B, L, D), where a bag is the sum of its words' embeddings; `attention_mask` (B, 1, L, L),
            an additive mask; `position_ids` and `labels` (B, L).
        """
        embed = model.get_input_embeddings()
        words = self.bags_RPW[picked]
        kept = (words != self.pad) & (torch.rand(words.shape, device=words.device) >= dropped)
        bags = (embed(words) * kept[..., None]).sum(2)
        rows, each = len(picked), SIDE // side
        image = bags.view(rows, side, each, side, each, -1).mean((2, 4)).flatten(1, 2)
        ids, turns = self.ids_RL[picked], self.turns_RL[picked]
        before = 1 + side * side
        first = embed(ids.new_full((rows, 1), self.bos))
        turn_of = torch.cat([turns.new_zeros(rows, before), turns], 1)
        longest = turn_of.shape[1]
        # a word attends to the picture and to its own turn, up to itself, as if each question were asked alone
        own = (turn_of[:, :, None] == turn_of[:, None, :]) | (turn_of[:, None, :] == 0)
        visible = own & torch.ones(longest, longest, dtype=torch.bool, device=own.device).tril()
        mask = torch.zeros(visible.shape, device=own.device).masked_fill(~visible, torch.finfo(torch.float32).min)
        places = torch.arange(before, device=ids.device).expand(rows, -1)
        return {
            "inputs_embeds": torch.cat([first, image, embed(ids)], 1),
            "attention_mask": mask[:, None],
            "position_ids": torch.cat([places, before + self.offsets_RL[picked]], 1),
            "labels": torch.cat([ids.new_full((rows, before), IGNORE_INDEX), self.labels_RL[picked]], 1),
        }


def make_word_pictures(tokenizer: PreTrainedTokenizerFast, texts: list[tuple[Scene, Turns]]) -> WordPictures:
    """Tokenise word pictures, once.

    Args:
        tokenizer: The study's tokenizer.
        texts: Scenes with their questions and answers.
    """
    vocabulary = tokenizer.get_vocab()
    pad = int(tokenizer.pad_token_id)
    pictures = [[[vocabulary[word] for word in bag] for bag in word_picture(scene)] for scene, _ in texts]
    ids, labels, turn_of, offsets = [], [], [], []
    for _, turns in texts:
        row: list[tuple[int, int, int, int]] = []
        for turn, (question, answer) in enumerate(turns, start=1):
            asked = [vocabulary[word] for word in ("<user>", *question.split(), "<answer>")]
            given = [vocabulary[word] for word in (*answer.split(), "<eos>")]
            row += [(word, IGNORE_INDEX, turn, i) for i, word in enumerate(asked)]
            row += [(word, word, turn, i) for i, word in enumerate(given, start=len(asked))]
        columns = zip(*row, strict=True)
        for found, column in zip((ids, labels, turn_of, offsets), columns, strict=True):
            found.append(torch.tensor(column))
    padded = [
        torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=fill)
        for found, fill in ((ids, pad), (labels, IGNORE_INDEX), (turn_of, -1), (offsets, 0))
    ]
    fullest = max(len(bag) for picture in pictures for bag in picture)
    bags = torch.tensor([[bag + [pad] * (fullest - len(bag)) for bag in picture] for picture in pictures])
    return WordPictures(bags, *padded, int(tokenizer.bos_token_id), pad)

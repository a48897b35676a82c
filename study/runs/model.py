"""LLaVA in miniature: transformers' own tower, projector and language model, with fewer tokens between them.

Shapes: B pictures, R questions, D width of the tower, T tokens per picture for the language model, H width of the
language model, L words, A words of an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from covft.integrations.building.pooling import averaged_squares
from covft.tuning.q_moe import CONNECTOR
from study.trunk import PassThrough, blocks_of, depth, upper_blocks

READ = -2  # the hidden state that is read: the output of the last block but one, as in LLaVA


class Miniature(nn.Module):
    """LLaVA whose picture tokens are averaged over squares before the projector.

    Args:
        llava: LLaVA, whose tower is tuned or not.
        encoder: The tower's encoder; None for a plain tower.
        tokens: Tokens per picture T, a square number.
        before: Ids of the words in front of the picture.
        autocast: Whether to compute in bfloat16, with weights in float32.
    """

    before: Tensor

    def __init__(self, llava: Any, encoder: Any, tokens: int, before: Sequence[int], *, autocast: bool = False) -> None:
        super().__init__()
        self.llava, self.tokens, self.autocast = llava, tokens, autocast
        self.__dict__["encoder"] = encoder  # not a child: the tower is
        self.register_buffer("before", torch.tensor([list(before)]), persistent=False)

    def read(self, inputs: Tensor, text: Tensor | None) -> Tensor:
        """Run the tower; return the patch tokens that LLaVA reads.

        Args:
            inputs: What the tower takes: pictures, or states where it starts in the middle (`started_at`).
            text: Text features of each picture, `(B, C)`, or states `(B, K, C)`; None if the tower reads none.
        """
        with self._precision():
            return self.encoder(inputs, text).last_hidden_state[:, 1:]

    def project(self, patches: Tensor, text: Tensor | None) -> Tensor:
        """Average patches over squares, and project them to the width of the language model, `(B, T, H)`.

        Args:
            patches: What `read` returned.
            text: As for `read`; of those methods that route in the projector too.
        """
        routed = text is not None and CONNECTOR in self.encoder.vit._modules
        with self._precision(), self.encoder.condition(text) if routed else nullcontext():
            return self.llava.model.multi_modal_projector(averaged_over_squares(patches, self.tokens))

    def answer_logits(self, pictures: Tensor, ids: Tensor, start: Tensor, length: int) -> Tensor:
        """Return the logits of each word of the answers, `(R, A, V)`.

        Args:
            pictures: Projected tokens of each question's picture, `(R, T, H)`.
            ids: Questions and answers, padded on the right, `(R, L)`.
            start: Position in `ids` whose output is the first word of the answer, `(R,)`.
            length: Number of words A.
        """
        model = self.llava.model.language_model
        before = self.before.shape[1]
        words = torch.cat([self.before.expand(len(ids), -1), ids], dim=1)
        embedded = model.get_input_embeddings()(words)
        sequence = torch.cat([embedded[:, :before], pictures.to(embedded.dtype), embedded[:, before:]], dim=1)
        first = before + self.tokens
        places = start[:, None] + torch.arange(first, first + length, device=start.device)
        with self._precision():
            # padding is on the right, where the causal mask hides it
            hidden = model(inputs_embeds=sequence, use_cache=False).last_hidden_state
            places = places.clamp(max=hidden.shape[1] - 1)  # beyond the end there is no label
            answers = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
            return self.llava.lm_head(answers)

    def _precision(self) -> torch.autocast:
        # without the cache of weights, which a recorded step would keep from before the optimizer's
        return torch.autocast(self.before.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False)


def averaged_over_squares(patches: Tensor, tokens: int) -> Tensor:
    """Average a square of patches, `(B, N, D)`, down to a smaller square of tokens."""
    side, left = round(patches.shape[1] ** 0.5), round(tokens**0.5)
    return patches if side == left else averaged_squares(patches, side // left)


def first_trained(tower: nn.Module) -> int:
    """Return the first block with trained parameters.

    It is 0 if what comes before the blocks is trained too, and the last block, which is not read, if nothing is.
    """
    last = depth(tower) - 1
    first = last
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad and not name.startswith(f"{CONNECTOR}."):  # those run after the tower
            _, found, rest = name.partition("layers." if "layers." in name else "layer.")
            first = min(first, int(rest.partition(".")[0]) if found and name.startswith("encoder.") else 0)
    return first


@contextmanager
def started_at(tower: nn.Module, first: int) -> Iterator[None]:
    """While open, the tower starts at a block (0: at the pictures), and ends at the last one that is read.

    `last_hidden_state` then is the hidden state that LLaVA reads.
    """
    blocks = blocks_of(tower)
    last, unread = len(blocks) - 1, blocks[-1]
    norm = tower._modules.get("layernorm")  # Dinov2's, after the blocks
    blocks[last] = PassThrough()
    if norm is not None:
        tower.layernorm = PassThrough()
    try:
        if first:
            with upper_blocks(tower, first):
                yield
        else:
            yield
    finally:
        blocks[last] = unread
        if norm is not None:
            tower.layernorm = norm

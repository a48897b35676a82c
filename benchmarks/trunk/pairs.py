"""Measure two questions about each picture, as a benchmark asks them: `python -m benchmarks.trunk.pairs`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import covft
from benchmarks.trunk.chats import QUESTIONS, ChatSize, llava
from covft.integrations.mllm.trunk import kept_trunk, trunk_cache

SIZE = ChatSize(width=384, depth=12, image=224, patch=16, layers=tuple(range(5, 11)))


class _Clock:
    """Sums up the CPU seconds of a tower's calls. A run of its trunk inside one ends early, without the second hook."""

    def __init__(self, tower: nn.Module) -> None:
        self.seconds = 0.0
        self._begun: float | None = None
        tower.register_forward_pre_hook(self._begin)
        tower.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        if self._begun is None:
            self._begun = time.process_time()

    def _end(self, *_: Any) -> None:
        assert self._begun is not None
        self.seconds += time.process_time() - self._begun
        self._begun = None


def pairs(size: ChatSize, pictures: int = 4) -> dict[str, tuple[float, float]]:
    """Ask about noise, in turns without and with a cache.

    Args:
        size: Sizes of the model.
        pictures: How many there are, with two questions each.

    Returns:
        CPU seconds of `generate` and of the tower in it, without and with a cache.
    """
    from PIL import Image

    model, processor = llava(size)
    tower = _Clock(covft.get_encoder(model).vit)
    cache = trunk_cache(model)
    found = {"without": [0.0, 0.0], "with": [0.0, 0.0]}
    for number in range(-1, pictures):  # the first warms up
        image = Image.effect_noise((size.image, size.image), 90).convert("RGB")
        answers: dict[str, list[Any]] = {name: [] for name in found}
        for question in QUESTIONS:
            asked = [{"role": "user", "content": f"{processor.image_token}\n{question}"}]
            prompt = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            for name, sums in found.items():
                before, start = tower.seconds, time.process_time()
                with torch.no_grad(), kept_trunk(model, cache if name == "with" else None):
                    answers[name].append(model.generate(**inputs, max_new_tokens=2, do_sample=False).tolist())
                if number >= 0:
                    sums[0] += time.process_time() - start
                    sums[1] += tower.seconds - before
        assert answers["with"] == answers["without"]
    assert cache.hits == cache.misses == pictures + 1
    return {name: (sums[0], sums[1]) for name, sums in found.items()}


if __name__ == "__main__":
    result = pairs(SIZE)
    for place, part in enumerate(("generate", "tower")):
        without, kept = (result[name][place] for name in ("without", "with"))
        print(f"{part}: {without:.2f} s without, {kept:.2f} s with a cache: {kept / without:.2f}")

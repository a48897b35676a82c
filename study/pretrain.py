"""How the two small networks whose weights are committed came about: `python -m study pretrain`.

The ViT learns CLIP-style, from captions such as the web's: they leave things out, mostly say "digit" and
"word" without reading them, and never say where anything is. What is read or located in a picture is
therefore not what the tower was trained for, which is the situation that tuning a tower is meant for.

The language model learns from text alone, as a real LLaVA's did: it answers the miniature's questions about
word pictures, in which 36 bags of words ("red circle top left") stand where the 36 image tokens will stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from study.llava import IGNORE, new_language_model
from study.scenes import CELL, GRID, PLACES, SIZE, Scene, as_batch, make_scenes
from study.tasks import Example, make_examples
from study.towers import ASSETS, PATCH, save_asset, small_vit_config
from study.words import BLANK, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PRETRAIN_SEED = 7919  # the scenes of pretraining are not the scenes of the study


@dataclass(frozen=True)
class PretrainSettings:
    """What the two pretrainings depend on.

    Attributes:
        scenes: Scenes to learn from (drawn from the training tiles, with a seed of their own).
        vit_steps: Steps of the ViT.
        vit_batch: Pictures per step of the ViT.
        vit_lr: Highest learning rate of the ViT.
        mention: How often a caption mentions: a thing at all, a shape's colour, which digit, which word.
        lm_steps: Steps of the language model.
        lm_batch: Word pictures per step of the language model, each with eight or nine questions in a row.
        lm_lr: Highest learning rate of the language model.
        dropped: Share of the words of a word picture that are blanked.
        seed: Seed of both.
    """

    scenes: int = 16000
    vit_steps: int = 500
    vit_batch: int = 256
    vit_lr: float = 1e-3
    mention: tuple[float, float, float, float] = (0.8, 0.7, 0.3, 0.2)
    lm_steps: int = 1000
    lm_batch: int = 24
    lm_lr: float = 2e-3
    dropped: float = 0.1
    seed: int = 0


def web_caption(scene: Scene, mention: tuple[float, float, float, float], rng: np.random.Generator) -> str:
    """A caption that leaves things out, in no order."""
    said = []
    for thing in scene.things:
        if rng.random() > mention[0]:
            continue
        if thing.kind == "shape":
            said.append(thing.name if rng.random() < mention[1] else thing.tile.name)
        elif thing.kind == "photo":
            said.append(thing.name)
        else:
            read = rng.random() < mention[2 if thing.kind == "digit" else 3]
            said.append(thing.name if read else thing.kind)
    rng.shuffle(said)
    return " , ".join(said) or "the picture"


def word_picture(scene: Scene, dropped: float, rng: np.random.Generator) -> list[list[str]]:
    """A scene as 36 bags of words, one per patch: what lies there and where the patch is."""
    side, per_cell = SIZE // PATCH, CELL // PATCH
    lying = {thing.cell: thing.words if len(thing.words) == 2 else ("photo", *thing.words) for thing in scene.things}
    bags = []
    for slot in range(side * side):
        cell = slot // side // per_cell * GRID + slot % side // per_cell
        words = [*lying.get(cell, (BLANK,)), *PLACES[cell].split()]
        bags.append([word for word in words if rng.random() >= dropped])
    return bags


def pretrain_vit(settings: PretrainSettings, report: Callable[[int, float], None]) -> torch.nn.Module:
    """Contrastive pretraining with transformers' own CLIPModel; returns its vision tower."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, projection_dim=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = small_vit_config()
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))
    scenes = make_scenes("train", settings.scenes, PRETRAIN_SEED)
    rng = np.random.default_rng(settings.seed)
    tokenizer.padding_side = "right"

    def loss_of(picked: np.ndarray) -> torch.Tensor:
        chosen = [scenes[i] for i in picked]
        captions = [f"<bos> {web_caption(scene, settings.mention, rng)} <eos>" for scene in chosen]
        batch = tokenizer(captions, padding=True, return_tensors="pt")
        pictures = torch.from_numpy(as_batch(chosen))
        return model(batch.input_ids, pictures, batch.attention_mask, return_loss=True).loss

    _learn(model, loss_of, len(scenes), settings.vit_steps, settings.vit_batch, settings.vit_lr, rng, report)
    return model.vision_model


def pretrain_language_model(settings: PretrainSettings, report: Callable[[int, float], None]) -> torch.nn.Module:
    """Answers about word pictures: one question of every task about each."""
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    model = new_language_model(tokenizer)
    scenes = make_scenes("train", settings.scenes, PRETRAIN_SEED)
    talks = conversations(scenes, make_examples(scenes, seed=PRETRAIN_SEED))
    rng = np.random.default_rng(settings.seed)

    def loss_of(picked: np.ndarray) -> torch.Tensor:
        texts = [(word_picture(scenes[i], settings.dropped, rng), talks[i]) for i in picked]
        return model(**text_batch(model, tokenizer, texts)).loss

    _learn(model, loss_of, len(scenes), settings.lm_steps, settings.lm_batch, settings.lm_lr, rng, report)
    return model


def conversations(scenes: list[Scene], examples: list[Example]) -> list[list[tuple[str, str]]]:
    """Questions and answers, scene by scene."""
    talks: list[list[tuple[str, str]]] = [[] for _ in scenes]
    for example in examples:
        talks[example.scene].append((example.question, example.answer))
    return talks


def text_batch(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[tuple[list[list[str]], list[tuple[str, str]]]],
) -> dict[str, torch.Tensor]:
    """Word pictures, each with several questions that do not see each other, with labels on the answers.

    Returns:
        `inputs_embeds` (B, L, D), where a bag of words is the sum of its words' embeddings, `attention_mask`
        (B, 1, L, L) to be added to the scores, `position_ids` and `labels` (B, L).
    """
    rows, bags = [], []
    for slots, turns in texts:
        picture = ["<bos>", *["<image>"] * len(slots)]
        # word, whether it is part of an answer, its turn, its position
        row = [(word, False, 0, i) for i, word in enumerate(picture)]
        for turn, (question, answer) in enumerate(turns, start=1):
            words = ["<user>", *question.split(), "<answer>"]
            asked = len(words)
            words += [*answer.split(), "<eos>"]
            row += [(word, i >= asked, turn, len(picture) + i) for i, word in enumerate(words)]
        rows.append(row)
        bags += slots
    pad = int(tokenizer.pad_token_id)
    known = tokenizer.get_vocab()
    longest, fullest = max(map(len, rows)), max(map(len, bags))
    ids, labels, turn_of, positions = (torch.full((len(rows), longest), fill) for fill in (pad, IGNORE, -1, 0))
    for i, row in enumerate(rows):
        words, said, turns_of_row, places = zip(*row, strict=True)
        tokens = torch.tensor([known[word] for word in words])
        ids[i, : len(row)] = tokens
        labels[i, : len(row)] = torch.where(torch.tensor(said), tokens, IGNORE)
        turn_of[i, : len(row)] = torch.tensor(turns_of_row)
        positions[i, : len(row)] = torch.tensor(places)
    # a word sees the picture and its own turn, up to itself: as if every question had been asked alone
    own = (turn_of[:, :, None] == turn_of[:, None, :]) | (turn_of[:, None, :] == 0)
    seen = own & torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    in_bags = torch.tensor([[known[word] for word in bag] + [pad] * (fullest - len(bag)) for bag in bags])
    embed = model.get_input_embeddings()
    # the padding's embedding is zero and stays so, so that it adds nothing to a bag
    embedded = embed(ids).clone()
    embedded[ids == known["<image>"]] = embed(in_bags).sum(1)
    return {
        "inputs_embeds": embedded,
        "attention_mask": mask[:, None],
        "position_ids": positions,
        "labels": labels,
    }


def _learn(
    model: torch.nn.Module,
    loss_of: Callable[[np.ndarray], torch.Tensor],
    count: int,
    steps: int,
    batch: int,
    lr: float,
    rng: np.random.Generator,
    report: Callable[[int, float], None],
) -> None:
    """AdamW over random batches, cosine decay after a short warm-up."""
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for step in range(steps):
        loss = loss_of(rng.choice(count, batch, replace=False))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    model.eval()


def pretrain(settings: PretrainSettings, folder: Path = ASSETS, show: bool = True) -> dict[str, dict]:
    """Pretrain both networks, measure them on validation scenes and save them with their settings.

    Returns:
        What was written beside each set of weights.
    """
    from study.probe import measure_language_model, presence_auc, probe_tower
    from study.progress import bar

    known = asdict(settings)
    for_vit = {key: known[key] for key in known if not key.startswith("lm_") and key != "dropped"}
    for_text = {key: known[key] for key in known if not key.startswith("vit_") and key != "mention"}
    with bar("Pretraining the small ViT", settings.vit_steps, show) as report:
        vit = pretrain_vit(settings, report)
    seen = probe_tower(vit) | {"pooled_presence_auc": presence_auc(vit)}
    vit_card = save_asset(folder, "small_vit", vit, for_vit, seen)
    with bar("Pretraining the language model", settings.lm_steps, show) as report:
        language_model = pretrain_language_model(settings, report)
    scores = measure_language_model(language_model)
    return {
        "small_vit": vit_card,
        "language_model": save_asset(folder, "language_model", language_model, for_text, scores),
    }

"""Pretraining of the two small networks whose weights are committed: `python -m study pretrain`.

The ViT learns CLIP-style, from captions like the web's: they omit things, mostly say "digit" and "word" without
reading them, and never say where anything is. So reading and locating is what the tower was not pretrained for,
which is when tuning it pays.

The language model learns from text only, like LLaVA's: it answers the study's questions about word pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from study.data.scenes import Scene, as_batch, make_scenes
from study.data.tasks import Example, make_examples
from study.data.tokenizer import build_tokenizer
from study.data.word_pictures import word_picture, word_picture_batch
from study.llava import new_language_model
from study.probe import measure_language_model, presence_auc, probe_tower
from study.progress import progress_bar
from study.towers import small_vit_config
from study.weights import ASSETS, save_weights

PRETRAIN_SEED = 7919  # so that pretraining has other scenes than the study


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of both pretrainings.

    Attributes:
        scenes: Training scenes, made of training tiles.
        vit_steps: Steps of the ViT.
        vit_batch: Images per step of the ViT.
        vit_lr: Peak learning rate of the ViT.
        mention: Probabilities that a caption mentions a thing, the colour of a shape, which digit, which word.
        lm_steps: Steps of the language model.
        lm_batch: Word pictures per step of the language model, each with eight or nine questions.
        lm_lr: Peak learning rate of the language model.
        dropped: Probability of dropping a word of a word picture.
        seed: Seed of both networks.
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
    """Write an incomplete caption in random order."""
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


def pretrain_vit(settings: PretrainSettings, report: Callable[[int, float], None]) -> torch.nn.Module:
    """Pretrain transformers' own CLIPModel by contrast; return its vision tower."""
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
        images = torch.from_numpy(as_batch(chosen))
        return model(batch.input_ids, images, batch.attention_mask, return_loss=True).loss

    _learn(model, loss_of, len(scenes), settings.vit_steps, settings.vit_batch, settings.vit_lr, rng, report)
    return model.vision_model


def pretrain_language_model(settings: PretrainSettings, report: Callable[[int, float], None]) -> torch.nn.Module:
    """Pretrain the language model on word pictures, with one question per task."""
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    model = new_language_model(tokenizer)
    scenes = make_scenes("train", settings.scenes, PRETRAIN_SEED)
    turns = turns_by_scene(scenes, make_examples(scenes, seed=PRETRAIN_SEED))
    rng = np.random.default_rng(settings.seed)

    def loss_of(picked: np.ndarray) -> torch.Tensor:
        texts = [(word_picture(scenes[i], settings.dropped, rng), turns[i]) for i in picked]
        return model(**word_picture_batch(model, tokenizer, texts)).loss

    _learn(model, loss_of, len(scenes), settings.lm_steps, settings.lm_batch, settings.lm_lr, rng, report)
    return model


def turns_by_scene(scenes: list[Scene], examples: list[Example]) -> list[list[tuple[str, str]]]:
    """Group questions and answers by scene."""
    turns: list[list[tuple[str, str]]] = [[] for _ in scenes]
    for example in examples:
        turns[example.scene].append((example.question, example.answer))
    return turns


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
    """Train with AdamW on random batches, with cosine decay after a short warm-up."""
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for done in range(1, steps + 1):
        loss = loss_of(rng.choice(count, batch, replace=False))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(done, loss.item())
    model.eval()


def pretrain(settings: PretrainSettings, folder: Path = ASSETS, show: bool = True) -> dict[str, dict]:
    """Pretrain both networks, measure them on validation scenes and save them.

    Returns:
        The card of each network, by name.
    """
    fields = asdict(settings)
    vit_fields = {name: fields[name] for name in fields if not name.startswith("lm_") and name != "dropped"}
    lm_fields = {name: fields[name] for name in fields if not name.startswith("vit_") and name != "mention"}
    with progress_bar("Pretraining the small ViT", settings.vit_steps, show) as report:
        vit = pretrain_vit(settings, report)
    vit_scores = probe_tower(vit) | {"pooled_presence_auc": presence_auc(vit)}
    vit_card = save_weights(folder, "small_vit", vit, vit_fields, vit_scores)
    with progress_bar("Pretraining the language model", settings.lm_steps, show) as report:
        language_model = pretrain_language_model(settings, report)
    lm_scores = measure_language_model(language_model)
    return {
        "small_vit": vit_card,
        "language_model": save_weights(folder, "language_model", language_model, lm_fields, lm_scores),
    }

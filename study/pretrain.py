"""Pretraining of the two small networks whose weights are committed: `python -m study pretrain`.

The ViT learns CLIP-style, from captions like the web's: they omit things, mostly say "digit" and "word" without
reading them, and never say where anything is or where an arrow leads. So reading and locating is what the tower was
not pretrained for, which is when tuning it pays.

The language model learns from text only, like LLaVA's: it answers the study's questions about word pictures.

Both take their tiles from the prepared file where there is one, so a GPU machine needs no other data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from covft.errors import ConfigError
from study.data.scenes import Scene, make_scenes
from study.data.tasks import Example, make_examples
from study.data.tokenizer import build_tokenizer
from study.data.word_pictures import Turns, WordPictures, make_word_pictures
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
        captions: Captions of each scene.
        mention: Probabilities that a caption mentions a thing, the colour of a shape, which digit, which word, a size.
        lm_steps: Steps of the language model.
        lm_batch: Word pictures per step of the language model, each with all of its questions.
        lm_lr: Peak learning rate of the language model.
        questions: Questions of each task about a scene.
        sides: Square roots of the numbers of image tokens; each step draws one.
        dropped: Probability of dropping a word of a word picture.
        seed: Seed of both networks.
    """

    scenes: int = 16000
    vit_steps: int = 800
    vit_batch: int = 256
    vit_lr: float = 1e-3
    captions: int = 3
    mention: tuple[float, float, float, float, float] = (0.8, 0.7, 0.3, 0.2, 0.2)
    lm_steps: int = 4000
    lm_batch: int = 96
    lm_lr: float = 2e-3
    questions: int = 2
    sides: tuple[int, ...] = (6, 6, 3, 2)
    dropped: float = 0.03
    seed: int = 0


def web_caption(scene: Scene, mention: tuple[float, float, float, float, float], rng: np.random.Generator) -> str:
    """Write an incomplete caption in random order."""
    said = []
    for thing in scene.things:
        if rng.random() > mention[0]:
            continue
        if thing.kind == "shape":
            words = thing.name if rng.random() < mention[1] else thing.tile.name
        elif thing.kind == "photo":
            words = thing.name
        else:
            read = rng.random() < mention[2 if thing.kind == "digit" else 3]
            words = thing.name if read else thing.kind
        said.append(f"{thing.size} {words}" if rng.random() < mention[4] else words)
    rng.shuffle(said)
    return " , ".join(said) or "the picture"


def pretrain_vit(
    settings: PretrainSettings, report: Callable[[int, float], None], device: str = "cpu"
) -> torch.nn.Module:
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
    model.to(device)
    scenes = make_scenes("train", settings.scenes, PRETRAIN_SEED)
    rng = np.random.default_rng(settings.seed)
    tokenizer.padding_side = "right"
    captions = [
        f"<bos> {web_caption(scene, settings.mention, rng)} <eos>" for _ in range(settings.captions) for scene in scenes
    ]
    texts = tokenizer(captions, padding=True, return_tensors="pt").to(device)
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).to(device)

    def loss_of(picked: torch.Tensor) -> torch.Tensor:
        rows = picked + len(scenes) * int(rng.integers(settings.captions))
        images = pixels[picked].permute(0, 3, 1, 2).float() / 127.5 - 1
        return model(texts.input_ids[rows], images, texts.attention_mask[rows], return_loss=True).loss

    _learn(model, loss_of, len(scenes), settings.vit_steps, settings.vit_batch, settings.vit_lr, rng, report)
    return model.vision_model.cpu()


def pretrain_language_model(
    settings: PretrainSettings, report: Callable[[int, float], None], device: str = "cpu"
) -> torch.nn.Module:
    """Pretrain the language model on word pictures, with questions of every task."""
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    model = new_language_model(tokenizer).to(device)
    scenes = make_scenes("train", settings.scenes, PRETRAIN_SEED)
    data = training_word_pictures(scenes, settings.questions).to(device)
    rng = np.random.default_rng(settings.seed)

    def loss_of(picked: torch.Tensor) -> torch.Tensor:
        side = settings.sides[int(rng.integers(len(settings.sides)))]
        return model(**data.batch(model, picked, side=side, dropped=settings.dropped)).loss

    _learn(model, loss_of, len(data), settings.lm_steps, settings.lm_batch, settings.lm_lr, rng, report)
    return model.cpu()


def training_word_pictures(scenes: list[Scene], questions: int) -> WordPictures:
    """Return word pictures of scenes, as often as they have different questions."""
    texts = []
    for seed in range(questions):
        turns = turns_by_scene(scenes, make_examples(scenes, seed=PRETRAIN_SEED + seed))
        texts += list(zip(scenes, turns, strict=True))
    return make_word_pictures(build_tokenizer(), texts)


def turns_by_scene(scenes: list[Scene], examples: list[Example]) -> list[Turns]:
    """Group questions and answers by scene."""
    turns: list[Turns] = [[] for _ in scenes]
    for example in examples:
        turns[example.scene].append((example.question, example.answer))
    return turns


def _learn(
    model: torch.nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    count: int,
    steps: int,
    batch: int,
    lr: float,
    rng: np.random.Generator,
    report: Callable[[int, float], None],
) -> None:
    """Train with AdamW on random batches, with cosine decay after a short warm-up."""
    from transformers import get_cosine_schedule_with_warmup

    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for done in range(1, steps + 1):
        picked = torch.from_numpy(rng.choice(count, batch, replace=False)).to(device)
        loss = loss_of(picked)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if done % 20 == 0 or done == steps:  # reading the loss waits for the device
            report(done, loss.item())
    model.eval()


def pretrain(
    settings: PretrainSettings, folder: Path = ASSETS, show: bool = True, device: str | None = None
) -> dict[str, dict]:
    """Pretrain both networks, measure them on validation scenes and save them.

    Args:
        settings: Settings of both.
        folder: Folder for the weights.
        show: Whether to show progress bars.
        device: Where to train; by default on a CUDA device where there is one.

    Returns:
        The card of each network, by name.

    Raises:
        ConfigError: If there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r} is not there.", expected="a CUDA device, or cpu", fix="--device cpu")
    fields = asdict(settings)
    of_vit = ("scenes", "vit_steps", "vit_batch", "vit_lr", "captions", "mention", "seed")
    of_lm = ("scenes", "lm_steps", "lm_batch", "lm_lr", "questions", "sides", "dropped", "seed")
    with progress_bar("Pretraining the small ViT", settings.vit_steps, show) as report:
        vit = pretrain_vit(settings, report, device)
    vit_scores = probe_tower(vit) | {"pooled_presence_auc": presence_auc(vit)}
    vit_card = save_weights(folder, "small_vit", vit, {name: fields[name] for name in of_vit}, vit_scores)
    with progress_bar("Pretraining the language model", settings.lm_steps, show) as report:
        language_model = pretrain_language_model(settings, report, device)
    lm_scores = measure_language_model(language_model)
    lm_card = save_weights(folder, "language_model", language_model, {name: fields[name] for name in of_lm}, lm_scores)
    return {"small_vit": vit_card, "language_model": lm_card}

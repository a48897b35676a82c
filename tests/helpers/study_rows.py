"""Rows of the study with planted scores: what tables and verdicts have to find is known."""

import json
import zlib

import numpy as np

GROUPS = {
    "general": ("existence", "choice", "choice_german", "attributes"),
    "knowledge": ("word", "digit", "diagram"),
    "vision": ("pairs", "photo", "count", "relation", "size"),
}
TWELVE = tuple(task for tasks in GROUPS.values() for task in tasks)
DEFAULTS = {
    "size": "small", "method": "covft", "options": {}, "control": "none", "tokens": 4, "layers": [2, 3, 4],
    "experts": 4, "routing": "dense", "context": "cve", "text_encoder": "minilm", "language": "full",
    "projector": True, "tasks": list(TWELVE), "fraction": 1.0, "steps": 100, "held_out_questions": 20,
}  # fmt: skip


def percents(mean, vision=0.0, **tasks):
    """Return percents of the twelve tasks: all `mean`, those of vision higher, some given."""
    return {task: mean + vision * (task in GROUPS["vision"]) for task in TWELVE} | tasks


def planted(label, scores, studies, seeds=(0, 1, 2), noise=0.1, questions=20, **settings):
    """Return rows, one per seed, whose scores are exactly the given percents.

    Questions have a difficulty that all rows share; `noise` moves it in each row, so that differences vary from
    question to question. Without noise, whoever scores higher answers every question that the other answers.
    """
    rows = []
    for seed in seeds:
        hits = {}
        for task, percent in scores.items():
            difficulty = np.random.default_rng(zlib.crc32(task.encode())).permutation(questions) / questions
            own = np.random.default_rng([zlib.crc32(f"{label} {task}".encode()), seed]).normal(0, noise, questions)
            order = np.argsort(np.argsort(difficulty + own))
            hits[task] = "".join("1" if place < percent * questions / 100 else "0" for place in order)
        rows.append(
            {
                "name": f"{label.replace(' ', '-')}-seed{seed}", "label": label, "studies": list(studies),
                "settings": {**DEFAULTS, "held_out_questions": questions, **settings, "seed": seed},
                "seed": seed, "split": "test",
                "scores": {task: 100 * hits[task].count("1") / questions for task in hits}, "hits": hits, "floors": {},
                "trained": {"tower": 1000, "all": 5000},
                "losses": [2.0 - i / 64 - 0.01 * seed for i in range(64)],
                "seconds": {"prepare": 1.0, "train": 60.0, "score": 5.0},
                "device": "cpu", "versions": {"torch": "2.14.1"}, "date": "2026-11-26",
            }
        )  # fmt: skip
    return rows


def write(rows, folder):
    """Write each row to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (folder / f"{row['name']}.json").write_text(json.dumps(row))
    return folder


def world(**changed):
    """Return rows of every study, in which CoVFT is what the paper says, and the question makes half of its gain.

    Args:
        **changed: Mean scores of some runs, by label with `_` for what is not a letter or digit.
    """

    def run(label, mean, studies, vision=0.0, **settings):
        key = "".join(c if c.isalnum() else "_" for c in label)
        percent = percents(changed.get(key, mean), vision)
        trained = settings.get("tasks", TWELVE)
        return planted(label, {task: percent[task] for task in TWELVE if task in trained}, studies, **settings)

    rows = [
        *run("frozen", 40, ["methods", "controls", "fraction", "tokens"], method="frozen"),
        *run("full", 45, ["methods", "context", "placement", "diversity"], method="full"),
        *run("bitfit", 40, ["methods"], method="bitfit"),
        *run("lora, r=8", 35, ["methods"], method="lora", options={"r": 8}),
        *run("covft", 50, ["methods", "controls", "context", "placement", "experts", "diversity"], 20),
        *run("covft, texts shuffled", 45, ["controls"], 10, control="shuffled"),
        *run("covft, text = name of the task", 50, ["controls"], 20, control="oracle"),
        *run("covft, uniform routing", 45, ["controls"], control="uniform"),
        *run("covft, question to the tower only", 20, ["controls"], control="tower_only"),
        *run("covft, context=image", 45, ["context"], 5, context="image"),
        *run("covft, context=text", 50, ["context"], 10, context="text"),
        *run("covft, routing=sparse", 50, ["context"], 10, routing="sparse"),
        *run("covft, routing=random", 40, ["context"], routing="random"),
        *run("covft, layers=0,1,2", 45, ["placement"], layers=[0, 1, 2]),
        *run("covft, layers=0,1,2,3,4", 65, ["placement"], layers=[0, 1, 2, 3, 4]),
        *run("covft, experts=2", 50, ["experts", "diversity"], 10, experts=2),
        *run("covft, experts=8", 45, ["experts", "diversity"], 30, experts=8),
        *run("covft, text_encoder=random", 45, ["text_encoder"], text_encoder="random"),
        *run("lora, r=512", 45, ["matched"], method="lora", options={"r": 512}),
    ]
    for count, gains in ((3, (15, 10, 5)), (6, (10, 10, 10))):
        few = list(GROUPS["vision"][:3]) + list(TWELVE[: count - 3])
        for experts, gain in zip((2, 4, 8), gains, strict=True):
            of = "" if experts == 4 else f", experts={experts}"
            rows += run(f"covft{of}, {count} tasks", 50 + gain, ["diversity"], tasks=few, experts=experts)
        rows += run(f"full, {count} tasks", 50, ["diversity"], tasks=few, method="full")
    for part, (studies, settings) in {
        "50% of the data": (["fraction"], {"fraction": 0.5}),
        "25% of the data": (["fraction"], {"fraction": 0.25}),
        "1 tokens": (["tokens"], {"tokens": 1}),
        "36 tokens": (["tokens"], {"tokens": 36}),
        "tower=backbone": (["tower"], {"tower": "backbone"}),
    }.items():
        for method, mean in (("frozen", 35), ("full", 40), ("covft", 45)):
            rows += run(f"{method}, {part}", mean, studies, method=method, **settings)
    return [*rows, *forgetting()]


def forgetting(seeds=(0, 1, 2)):
    """Return rows of a language model tuned on three tasks: full learns more and forgets more than LoRA."""
    new, old = TWELVE[:3], TWELVE[3:]
    rows = []
    for label, language, gained, lost in (("full", "full", 30, 15), ("lora", {"method": "lora"}, 25, 5)):
        label = f"frozen, language={label}"
        earlier = planted(label, dict.fromkeys(TWELVE, 40), [], seeds)
        after = {task: 40 + gained if task in new else 40 - lost for task in TWELVE}
        settings = {"method": "frozen", "language": language, "tasks": list(new), "upstream": list(old)}
        later = planted(label, after, ["forgetting"], seeds, **settings)
        rows += [{**row, "before": base["scores"]} for row, base in zip(later, earlier, strict=True)]
    return rows

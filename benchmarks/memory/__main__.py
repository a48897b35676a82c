"""Count bytes per GPU, and write them into `docs/guides/many-gpus.md`: `python -m benchmarks.memory`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.memory.models import SIZES, Model
from benchmarks.memory.states import STRATEGIES, Counts, states

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "many-gpus.md"
SECTION = re.compile(r"(?<=<!-- python -m benchmarks.memory -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)
GPU = 80e9
LENGTHS = (1024, 2048, 4096)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' + '---:|' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def section() -> str:
    """Return the tables."""
    models = [Model(name, lora) for name in SIZES for lora in (False, True)]
    parts = [_counts(models), "Weights, gradients and optimizer, GB per GPU:", *map(_states, models)]
    return "\n\n".join(["", *parts, _activations(models), _accelerate(models[::2]), ""])


def _title(model: Model) -> str:
    return f"{model.name}, {'LoRA' if model.lora else 'full'}"


def _counts(models: list[Model]) -> str:
    rows = [
        [_title(m), *(f"{n:,}" for n in (m.counts.trained, m.counts.frozen, m.counts.block, m.counts.root))]
        for m in models
    ]
    return table(["language model", "trained", "frozen", "largest layer", "outside layers"], rows)


def _states(model: Model) -> str:
    counts, of_row = model.counts, model.of_row(2048)[1] + model.of_image
    rows = []
    for strategy in STRATEGIES:
        for gpus in (1, 8):
            found = states(counts, strategy, gpus)
            parts = [found.weights, found.gradients, found.copies, found.optimizer, found.buffers, found.total]
            fitting = int((GPU - found.total) // of_row)
            rows.append(
                [f"{strategy}, {gpus} GPU{'s' * (gpus > 1)}", *(f"{part / 1e9:.1f}" for part in parts),
                 str(fitting) if fitting > 0 else "does not fit"]
            )  # fmt: skip
    header = [_title(model), "weights", "gradients", "float32 copies", "moments", "buffers", "sum", "rows that fit"]
    return table(header, rows)


def _activations(models: list[Model]) -> str:
    rows = []
    for model in models:
        row = [_title(model), f"{model.of_image / 1e9:.2f}"]
        for length in LENGTHS:
            without, checkpointed = model.of_row(length)
            row.append(f"{without / 1e9:.1f} / {checkpointed / 1e9:.1f}")
        rows.append(row)
    lengths = [f"{length:,} tokens" for length in LENGTHS]
    return "\n\n".join(
        [
            "Activations, GB: of one image in the tower, and of one row in the language model, without / with "
            "activation checkpointing of its layers:",
            table(["", "one image", *lengths], rows),
        ]
    )


def estimates(model: Any) -> tuple[int, int]:
    """Return what `accelerate estimate-memory --dtypes float32` counts: bytes of the weights, and of training."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    size, _ = calculate_maximum_sizes(model)
    return size, max(estimate_training_usage(size, "float32").values())


def _accelerate(models: list[Model]) -> str:
    rows = []
    for model in models:
        fresh = Model(model.name, model.lora)
        size, training = estimates(fresh.plain)
        total = sum(p.numel() for p in fresh.plain.parameters())
        ours = states(Counts(total, 0), "DDP", 1)
        rows.append(
            [model.name, *(f"{n / 1e9:.1f}" for n in (size, ours.weights, training, ours.total - ours.buffers))]
        )
    return "\n\n".join(
        [
            "The plain models, everything trained in float32 on one GPU, GB:",
            table(["", "accelerate, weights", "here", "accelerate, training", "here, without buffers"], rows),
        ]
    )


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(SECTION.sub(lambda _: section(), PAGE.read_text()))


if __name__ == "__main__":
    main()

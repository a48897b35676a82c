"""The CoVFT paper's tables, as far as they say something about each other.

Numbers are those of arXiv 2603.21077. `against_itself` recomputes what its text says from what its tables say.
"""

from __future__ import annotations

import numpy as np

LINK = "https://arxiv.org/abs/2603.21077"
SECOND = "https://arxiv.org/abs/2503.04543"

GROUPS = {"general": slice(0, 4), "knowledge": slice(4, 7), "vision": slice(7, 12)}
_MMVP = 7

# In the order of its tables: MME, MMB en, MMB cn, GQA; SQA, AI2D, TextVQA; MMVP, RWQA, COCO, ADE, Omni3D.
TASKS = {
    "frozen": (1473.7, 67.87, 60.30, 63.07, 69.31, 55.76, 58.53, 28.00, 56.73, 63.73, 49.61, 60.50),
    "full": (1510.2, 67.44, 59.88, 63.92, 67.67, 56.51, 59.70, 27.33, 55.82, 65.71, 51.97, 60.00),
    "covft": (1525.2, 68.13, 60.40, 63.37, 69.51, 56.64, 59.64, 36.67, 57.52, 66.96, 56.08, 61.83),
    "13B frozen": (1557.6, 69.93, 63.57, 63.73, 72.43, 60.20, 60.18, 34.00, 55.94, 65.09, 51.34, 62.83),
    "13B bitfit": (1532.8, 70.02, 62.54, 63.98, 72.14, 59.52, 61.04, 38.00, 54.64, 63.22, 47.87, 66.50),
    "13B covft": (1590.6, 70.45, 64.52, 63.84, 72.90, 60.65, 61.79, 38.67, 58.04, 65.22, 51.34, 67.58),
    "text only": (1505.6, 69.07, 60.22, 62.77, 68.72, 57.35, 59.52, 30.66, 56.99, 68.82, 57.35, 59.83),
    "sparse": (1478.8, 69.07, 60.57, 62.91, 69.91, 56.67, 60.15, 30.00, 56.21, 67.20, 51.82, 62.75),
    "50% full": (1445.2, 67.18, 56.87, 62.23, 66.09, 57.35, 57.40, 29.33, 53.59, 65.96, 52.13, 58.00),
    "50% covft": (1492.0, 67.70, 58.08, 61.25, 68.32, 56.83, 58.07, 26.00, 55.29, 66.96, 49.92, 58.17),
    "25% full": (1397.6, 63.32, 53.18, 60.43, 67.53, 54.76, 56.24, 24.67, 50.72, 57.76, 47.87, 62.92),
    "25% covft": (1467.0, 64.35, 54.90, 59.91, 67.13, 55.60, 56.93, 23.33, 53.73, 57.27, 47.39, 59.83),
    "12.5% frozen": (1430.6, 59.19, 53.09, 56.11, 66.68, 54.60, 53.38, 15.33, 47.97, 55.53, 49.29, 58.17),
    "12.5% covft": (1382.2, 59.11, 50.69, 57.98, 66.34, 53.95, 55.37, 21.33, 49.93, 59.38, 48.18, 59.50),
}
OFFICIAL_13B = 60.73  # Table 1, of LLaVA-1.5's own checkpoint

# General, knowledge, vision and mean, as the tables print them.
PRINTED = {
    "frozen": (66.23, 61.20, 51.71, 58.93),
    "full": (66.69, 61.29, 52.17, 59.29),
    "covft": (67.04, 61.93, 55.81, 61.08),
    "13B frozen": (68.78, 64.27, 53.84, 61.43),
    "13B bitfit": (68.55, 64.23, 54.05, 61.43),
    "13B covft": (69.66, 65.11, 56.17, 62.90),
    "text only": (66.84, 61.86, 54.73, 60.55),
    "sparse": (66.63, 61.78, 53.60, 60.10),
    "50% full": (64.63, 60.28, 51.80, 58.20),
    "50% covft": (65.41, 61.07, 51.27, 58.43),
    "25% full": (61.70, 59.51, 48.79, 55.77),
    "25% covft": (63.13, 59.89, 48.31, 56.14),
    "12.5% frozen": (59.98, 58.55, 45.26, 53.49),
    "12.5% covft": (59.22, 58.55, 47.66, 54.24),
}
MINUTES = {"frozen": 7 * 60 + 6, "full": 7 * 60 + 52, "covft": 8 * 60 + 10}  # Table 8, both stages


def means(name: str) -> tuple[float, ...]:
    """Return the general, knowledge, vision and overall mean of a line, from its tasks."""
    values = np.array(TASKS[name])
    values[0] /= 20
    return (*(float(values[part].mean()) for part in GROUPS.values()), float(values.mean()))


def against_itself() -> list[str]:
    """Return what the paper's tables say about the paper's text, one sentence or two each."""
    own = {name: means(name)[3] for name in TASKS}
    vision = {name: means(name)[2] for name in TASKS}
    gain = own["covft"] - own["full"]
    kept = (own["text only"] - own["full"]) / gain
    mmvp = {name: TASKS[name][_MMVP] for name in TASKS}
    share = (mmvp["covft"] - mmvp["full"]) / 12 / gain
    return [
        f"**7B above 13B.** The abstract says that a 7B model with CoVFT surpasses its 13B counterpart. Table 1 has "
        f"{own['covft']:.2f} for CoVFT at 7B, and {own['13B frozen']:.2f} for its own frozen 13B. It is above "
        f"{OFFICIAL_13B}, the mean of LLaVA-1.5's own checkpoint.",
        f"**Text alone gives {kept:.0%} of the gain** over full fine-tuning (Table 2: {own['full']:.2f}, "
        f"{own['text only']:.2f} with the text as context, {own['covft']:.2f} with CVE).",
        f"**Less data.** The text says that CoVFT wins at all scales and in all categories. In Table 10 the vision "
        f"group is behind full fine-tuning at 50 percent of the data ({vision['50% covft']:.2f} against "
        f"{vision['50% full']:.2f}) and at 25 percent ({vision['25% covft']:.2f} against {vision['25% full']:.2f}), "
        f"and the general group is behind the frozen tower at 12.5 percent ({means('12.5% covft')[0]:.2f} against "
        f"{means('12.5% frozen')[0]:.2f}).",
        f"**One benchmark.** MMVP rises from {mmvp['full']:.2f} to {mmvp['covft']:.2f} over full fine-tuning. That is "
        f"{share:.0%} of the gain in the mean of twelve. The scores of MMVP are multiples of 1/150.",
        f"**Overhead.** The limitations give about 4 percent more training time than the frozen baseline. In Table 8 "
        f"CoVFT takes {MINUTES['covft'] / MINUTES['frozen'] - 1:.0%} longer than the frozen baseline, and "
        f"{MINUTES['covft'] / MINUTES['full'] - 1:.1%} longer than full fine-tuning.",
        f"**Means that do not follow from their tasks.** {_misprints()}",
        "**One run each.** No table has seeds or intervals, and no control separates the question from the added "
        "parameters except uniform and random routing (Table 2).",
    ]


def mismatches() -> dict[tuple[str, str], tuple[float, float]]:
    """Return the printed means that differ from those of their tasks: printed, recomputed."""
    found = {}
    for name, printed in PRINTED.items():
        for column, said, value in zip(("general", "knowledge", "vision", "mean"), printed, means(name), strict=True):
            if abs(said - value) > 0.011:  # rounding, of the tasks too
                found[name, column] = (said, value)
    return found


_LINES = {
    "13B bitfit": "BitFit at 13B",
    "13B covft": "CoVFT at 13B",
    "sparse": "Sparse@2",
    "12.5% frozen": "Frozen at 12.5 percent of the data",
}


def _misprints() -> str:
    by_line: dict[str, list[str]] = {}
    for (name, column), (said, value) in mismatches().items():
        by_line.setdefault(_LINES[name], []).append(f"{column} {said:.2f}, from its tasks {value:.2f}")
    return "; ".join(f"{line}: {', '.join(told)}" for line, told in by_line.items()) + "."

"""An attached LLaVA and a wrapped ViT, tiny, in Lightning: the program of the guide, and the one-liner."""

from __future__ import annotations

from tests.real.bench import Bench
from tests.real.environments import ROOT
from tests.real.guides import named_blocks

REQUIREMENTS = ("lightning==2.6.6",)
EXTRAS = ("train", "timm")

_PAGE = "guides/lightning.md"


def missing() -> str | None:
    """Everything is on a package index."""
    return None


def run(bench: Bench) -> None:
    """Run the blocks of the guide as the one program that they are; its assertions compare what is reloaded."""
    program = [
        bench.file("guides/lightning.md", "train"),
        bench.file("guides/lightning.md", "resume"),
        bench.file("guides/lightning.md", "trained-only"),
        bench.file("guides/lightning.md", "folder"),
        bench.file("guides/lightning.md", "vit"),
        bench.file("guides/lightning.md", "precision"),
    ]
    bench.check("every block of the guide is in the program", len(program) == len(named_blocks(_PAGE)), len(program))
    (bench.folder / "page.py").write_text("\n".join(program), encoding="utf-8")
    output = bench.call("python", "page.py", title="run the guide")
    bench.check("training, resuming and reloading are exact", True, "asserted by the program")
    for precision in ("bf16-mixed", "bf16-true"):
        [line] = [line for line in output.splitlines() if line.startswith(precision)]
        bench.check(f"{precision}: trained weights are in float32", line.split()[1] == "True", line)
    bench.check("the movement check has not warned", "Few elements have changed" not in output)

    bench.call("python", ROOT / "examples/one_liners/with_lightning.py", title="run the one-liner")
    for folder in ("covft", "final/covft", "tower"):
        bench.check(f"{folder} is a saved tower", (bench.folder / folder / "model.safetensors").is_file())

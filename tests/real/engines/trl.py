"""LLaVA, tiny, in TRL's SFTTrainer by its command line: in full, with LoRA on the language model, and resumed."""

from __future__ import annotations

import json
import shutil
from typing import Any

from tests.real.bench import Bench
from tests.real.environments import ROOT

REQUIREMENTS = ("trl[vlm]==1.16.0",)

_SMALL = "--use_cpu True --bf16 False --report_to none --max_steps 4 --save_steps 2 --learning_rate 1e-3"


def missing() -> str | None:
    """Everything is on a package index."""
    return None


def run(bench: Bench) -> None:
    """Train, resume and reload."""
    bench.part("trl_inputs.py", "llava", "bert", "data", title="make a tiny LLaVA, a tiny BERT and 8 rows")
    for kind in ("full", "lora"):
        saved, whole = bench.folder / f"runs/trl-{kind}", bench.folder / f"runs/{kind}-whole"
        _train(bench, kind)
        for name in (".", "checkpoint-4"):
            held = all((saved / name / "covft" / file).is_file() for file in ("covft_config.json", "model.safetensors"))
            bench.check(f"{kind}: {name} has the adapted tower", held)
        start = _compare(bench, f"runs/trl-{kind}/checkpoint-2", f"runs/trl-{kind}", f"{kind}: steps 2 and 4")
        moved = {part for part, count in start["different"].items() if count}
        wanted = {"experts", "router", "norms", "llm"} | ({"projector"} if kind == "full" else set())
        bench.check(f"{kind}: experts, routers, norms and what TRL trains changed", wanted <= moved, sorted(moved))
        bench.check(f"{kind}: the tower's other weights are as before", "vision" not in moved)
        bench.check(f"{kind}: the answer depends on the instruction", start["text_matters"])
        bench.check(f"{kind}: adapters of LoRA", (start["adapters"] > 0) == (kind == "lora"), start["adapters"])
        end = _compare(
            bench, f"runs/trl-{kind}/checkpoint-4", f"runs/trl-{kind}", f"{kind}: checkpoint and saved model"
        )
        bench.check(f"{kind}: the saved model is that of the last checkpoint", end["largest"] == 0, end["largest"])

        saved.rename(whole)
        shutil.copytree(whole / "checkpoint-2", saved / "checkpoint-2")
        _resume(bench, kind)
        end = _compare(bench, f"runs/{kind}-whole", f"runs/trl-{kind}", f"{kind}: whole and resumed")
        bench.check(f"{kind}: a resumed run ends as the whole one", end["largest"] == 0, end["largest"])


def _train(bench: Bench, kind: str) -> None:
    title = f"train, {kind}"
    if kind == "full":
        bench.documented("guides/trl.md", "full", _small("runs/trl-full"), title=title)
    else:
        bench.documented("guides/trl.md", "lora", _small("runs/trl-lora"), title=title)


def _resume(bench: Bench, kind: str) -> None:
    """Run the same command with the flag that the guide names."""
    flag = bench.file("guides/trl.md", "resume", {"checkpoint-500": "checkpoint-2"}).strip()
    replace = _small(f"runs/trl-{kind}")
    output = f"--output_dir runs/trl-{kind}"
    replace[output] += f" {flag.replace('runs/trl/', f'runs/trl-{kind}/')}"
    if kind == "full":
        bench.documented("guides/trl.md", "full", replace, title="resume, full")
    else:
        bench.documented("guides/trl.md", "lora", replace, title="resume, lora")


def _small(output: str) -> dict[str, str]:
    return {
        "examples/": f"{ROOT}/examples/",
        "llava-hf/llava-1.5-7b-hf": "llava",
        "HuggingFaceH4/llava-instruct-mix-vsft": "data",
        "bert-base-uncased": "bert",
        "--per_device_train_batch_size 4": "--per_device_train_batch_size 2",
        f"--output_dir {output}": f"--output_dir {output} {_SMALL}",
    }


def _compare(bench: Bench, one: str, other: str, title: str) -> dict[str, Any]:
    output = bench.part("trl_reload.py", "llava", one, other, title=f"compare {title}")
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT "))[len("RESULT ") :])

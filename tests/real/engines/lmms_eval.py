"""Tiny attached models, and LoRA on one, in lmms-eval, on a local task: `covft evaluate`, and its own command."""

from __future__ import annotations

import json
from pathlib import Path

from tests.real.bench import Bench

REQUIREMENTS = ("lmms-eval==0.7.3",)
EXTRAS = ("lmms-eval",)
# Families, and the models of covft in lmms-eval that take them.
MODELS = {
    "llava": "covft_llava_hf",
    "lora": "covft_llava_hf",
    "llava_next": "covft_llava_hf",
    "llava_onevision": "covft_llava_onevision",
    "internvl": "covft_internvl_hf",
    "qwen2_5_vl": "covft_qwen2_5_vl",
    "qwen3_vl": "covft_qwen3_vl",
    "idefics3": "covft_huggingface",
}
# Pictures of 56 x 56, which Qwen2.5-VL's class would enlarge by default.
_OPTIONS = {"qwen2_5_vl": " --model_args min_pixels=784,max_pixels=12544"}
_TASK = "--include_path tasks --device cpu"


def missing() -> str | None:
    """Everything is on a package index."""
    return None


def run(bench: Bench) -> None:
    """Evaluate the models, and compare every answer with that of `generate`."""
    bench.tests("tests.tiny.attached", ".", *MODELS, title="make tiny attached models, and LoRA on one")
    bench.part("lmms_inputs.py", "tasks", title="make a task of 9 questions about 3 pictures")
    named = ["lora=lora-base" if name == "lora" else name for name in MODELS]
    bench.part("lmms_expected.py", "tasks/tiny.json", "expected.json", *named, title="ask them by generate")
    expected = json.loads((bench.folder / "expected.json").read_text(encoding="utf-8"))
    answers = {}
    for name, model in MODELS.items():
        replace = {
            "runs/llava-covft": "lora --base lora-base" if name == "lora" else name,
            "--tasks gqa,mme": f"--tasks tiny --output out/{name}",
            "--batch_size 1": _TASK + _OPTIONS.get(name, ""),
        }
        bench.documented("guides/evaluate.md", "evaluate", replace, title=f"covft evaluate {name}")
        if name == "llava":
            bench.check("the trunk of a picture runs once for its questions", "6 of 9 pictures came" in bench.output)
        answers[name] = _answers(bench.folder / "out" / name)
        told, plain = ([answer.strip() for answer in expected[name][kind]] for kind in ("covft", "plain"))
        equal = sum(map(str.__eq__, answers[name], told))
        bench.check(f"{name}, {model}: answers that are those of generate", equal == 9, f"{equal} of 9")
        other = sum(map(str.__ne__, answers[name], plain))
        bench.check(f"{name}: answers that differ without covft", other > 0, f"{other} of 9")

    replace = {"runs/llava-covft": "llava", "--tasks gqa,mme": f"--tasks tiny {_TASK}"}
    bench.documented(
        "guides/evaluate.md", "own", {**replace, "evaluation/llava-covft": "out/own"}, title="lmms-eval itself"
    )
    bench.check(
        "lmms-eval by its own command: the same answers", _answers(bench.folder / "out/own") == answers["llava"]
    )

    replace = {"runs/llava-covft": "llava", "--tasks paper": "--tasks tiny --output out/two"}
    replace["--processes 8"] = "--processes 2 -- --include_path tasks"
    bench.documented("guides/evaluate.md", "processes", replace, title="two processes")
    bench.check("two processes: the same answers", _answers(bench.folder / "out/two") == answers["llava"])

    options = ("--tasks", "tiny_broken", "--output", "out/broken", "--", *_TASK.split())
    output = bench.refused("covft", "evaluate", "llava", *options, title="a row without a question")
    bench.check("a failing row fails the command", "a row failed after" in output)


def _answers(folder: Path) -> list[str]:
    """Return the answers of a run in the order of the questions; a filter of lmms-eval has stripped them."""
    [file] = folder.rglob("*_samples_tiny.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]

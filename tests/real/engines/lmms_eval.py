"""Tiny attached LLaVA, Qwen2.5-VL and InternVL in lmms-eval, on a local task: `covft evaluate`, and its own command."""

from __future__ import annotations

import json
from pathlib import Path

from tests.real.bench import Bench

REQUIREMENTS = ("lmms-eval==0.7.3",)
EXTRAS = ("lmms-eval",)

# Pictures of 56 x 56, which Qwen's processor would enlarge by default.
_PIXELS = "--model_args min_pixels=784,max_pixels=12544"


def missing() -> str | None:
    """Everything is on a package index."""
    return None


def run(bench: Bench) -> None:
    """Evaluate three models, and compare every answer with that of `generate`."""
    answers = {}
    for kind in ("llava", "qwen", "internvl"):
        bench.part("lmms_inputs.py", kind, kind, "tasks", title=f"make a tiny {kind} and a task of 9 questions")
        bench.part("lmms_expected.py", kind, "tasks/tiny.json", f"{kind}.json", title=f"ask {kind} by generate")
        replace = {"runs/llava-covft": kind, "--tasks gqa,mme": f"--tasks tiny --output out/{kind}"}
        replace["--batch_size 1"] = "--include_path tasks --device cpu" + (f" {_PIXELS}" if kind == "qwen" else "")
        bench.documented("guides/evaluate.md", "evaluate", replace, title=f"covft evaluate {kind}")
        expected = json.loads((bench.folder / f"{kind}.json").read_text(encoding="utf-8"))
        answers[kind] = _answers(bench.folder / "out" / kind)
        equal = sum(map(str.__eq__, answers[kind], expected["covft"]))
        bench.check(f"{kind}: answers that are those of generate", equal == 9, f"{equal} of 9")
        other = sum(map(str.__ne__, answers[kind], expected["plain"]))
        bench.check(f"{kind}: answers that differ without covft", other > 0, f"{other} of 9")

    replace = {"runs/llava-covft": "llava", "--tasks gqa,mme": "--tasks tiny --include_path tasks --device cpu"}
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

    options = ("--tasks", "tiny_broken", "--output", "out/broken", "--", "--include_path", "tasks", "--device", "cpu")
    output = bench.refused("covft", "evaluate", "llava", *options, title="a row without a question")
    bench.check("a failing row fails the command", "a row failed after" in output)


def _answers(folder: Path) -> list[str]:
    """Return the answers of a run in the order of the questions."""
    [file] = folder.rglob("*_samples_tiny.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]

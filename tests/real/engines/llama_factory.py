"""LLaVA and Qwen2-VL, tiny, in full and with LoRA on the language model, by the launcher and a YAML file."""

from __future__ import annotations

import json
import shutil
from typing import Any

from tests.real.bench import Bench

REQUIREMENTS = ("llamafactory==0.9.5",)

GUIDE = "guides/llama-factory.md"
_SMALL = {
    "llava-hf/llava-1.5-7b-hf": "llava",
    "per_device_train_batch_size: 4": "per_device_train_batch_size: 2",
    "gradient_accumulation_steps: 4": "gradient_accumulation_steps: 1",
    "learning_rate: 2.0e-5": "learning_rate: 2.0e-3",
    "num_train_epochs: 1.0": "max_steps: 4",
    "logging_steps: 10": "logging_steps: 1",
    "save_steps: 500": "save_steps: 2\ndo_eval: true\neval_dataset: mllm_demo\nper_device_eval_batch_size: 2",
    "bf16: true": "use_cpu: true",
}
_LAUNCH = {"--nproc_per_node 8": "--standalone --nproc_per_node 1", "bert-base-uncased": "hash:16", "11-22": "2-4"}
_TOWER = ("model.safetensors", "covft_config.json")


def missing() -> str | None:
    """Everything is on a package index."""
    return None


def run(bench: Bench) -> None:
    """Train, resume and reload."""
    bench.part("tiny.py", "llava", "llava", title="make a tiny LLaVA")
    bench.part("tiny.py", "qwen2_vl", "qwen2_vl", title="make a tiny Qwen2-VL")
    bench.part("tiny.py", "data", "data", title="make 8 questions about 4 pictures")
    settings = bench.file(GUIDE, "settings", _SMALL)
    (bench.folder / "train.yaml").write_text(settings, encoding="utf-8")
    _refusals(bench)
    _qwen2_vl(bench, settings)
    _in_full(bench)
    _with_lora(bench)


def _in_full(bench: Bench) -> None:
    bench.documented(GUIDE, "train", _LAUNCH, title="LLaVA, everything but the tower in full")
    saved = bench.folder / "saves" / "llava-covft"
    _check_tower(bench, "LLaVA", "llava", saved)
    _check_reload(bench, "LLaVA", "llava", saved, "train.yaml")
    bench.documented(GUIDE, "load", title="the saved model is loaded as in the guide")

    whole = bench.folder / "whole"
    saved.rename(whole)
    saved.mkdir()
    shutil.copytree(whole / "checkpoint-2", saved / "checkpoint-2")
    resume = {**_LAUNCH, "checkpoint-500": "checkpoint-2"}
    bench.documented(GUIDE, "resume", resume, title="LLaVA resumes from its checkpoint of step 2")
    _check_same(bench, "LLaVA", whole, saved, "model.safetensors", "covft/model.safetensors")


def _with_lora(bench: Bench) -> None:
    bench.documented(GUIDE, "lora", _LAUNCH, title="LLaVA with LoRA on the language model")
    saved = bench.folder / "saves" / "llava-covft-lora"
    _check_tower(bench, "LoRA", "llava", saved)
    _check_reload(bench, "LoRA", "llava", saved, "train.yaml")


def _qwen2_vl(bench: Bench, settings: str) -> None:
    changed = settings.replace("model_name_or_path: llava", "model_name_or_path: qwen2_vl")
    changed = changed.replace("template: llava", "template: qwen2_vl").replace("llava-covft", "qwen2-vl-covft")
    (bench.folder / "qwen.yaml").write_text(changed, encoding="utf-8")
    replace = {**_LAUNCH, "11-22": "1-2", "train.yaml": "qwen.yaml"}
    bench.documented(GUIDE, "train", replace, title="Qwen2-VL, everything but the tower in full")
    saved = bench.folder / "saves" / "qwen2-vl-covft"
    _check_tower(bench, "Qwen2-VL", "qwen2_vl", saved, layers=[1, 2])
    _check_reload(bench, "Qwen2-VL", "qwen2_vl", saved, "qwen.yaml")


def _refusals(bench: Bench) -> None:
    """What the file asks for against covft ends before training, with the key."""
    output = bench.refused(
        "python",
        *("-m", "covft.integrations.codebases.llama_factory", "--covft_text_encoder", "hash:16", "--"),
        *("train.yaml", "use_reentrant_gc=true", "output_dir=refused"),
        title="use_reentrant_gc: true",
    )
    bench.check("reentrant checkpointing is refused by its key", "Fix:      use_reentrant_gc: false" in output)


def _check_tower(bench: Bench, what: str, base: str, saved: Any, layers: list[int] | None = None) -> None:
    found = _result(
        bench.part(
            "llama_factory_reload.py",
            *("tower", base, saved / "checkpoint-2", saved / "checkpoint-4"),
            title=f"{what}: what of the tower has changed",
        )
    )
    bench.check(f"{what}: the adapted blocks", found["layers"] == (layers or [2, 3, 4]), found["layers"])
    moved = found["moved"]
    shown = ", ".join(f"{part} {share:.1%}" for part, share in moved.items())
    parts = {"experts", "router", "context", "norms"}
    bench.check(
        f"{what}: elements that moved from step 2 to 4", set(moved) == parts and min(moved.values()) > 0.5, shown
    )
    bench.check(f"{what}: norms up to the last adapted block changed", found["norms"] == found["expected norms"])
    bench.check(f"{what}: the rest of the tower is that of the base", not found["changed"], ", ".join(found["changed"]))
    for folder in (saved / "checkpoint-4", saved):
        there = all((folder / "covft" / name).is_file() for name in _TOWER)
        bench.check(f"{what}: {folder.relative_to(bench.folder)} has its tower", there)


def _check_reload(bench: Bench, what: str, base: str, saved: Any, settings: str) -> None:
    trained = json.loads((saved / "eval_results.json").read_text(encoding="utf-8"))["eval_loss"]
    given = ("loss", base, saved, settings)
    output = bench.part("llama_factory_reload.py", *given, title=f"{what}: loss of the reloaded model")
    difference = abs(_result(output)["loss"] - trained)
    bench.check(f"{what}: loss after reload minus loss after training", difference == 0.0, difference)


def _check_same(bench: Bench, what: str, one: Any, other: Any, *files: str) -> None:
    output = bench.part("same.py", one, other, *files, title=f"{what}: compare weights")
    for file, difference in _result(output).items():
        bench.check(f"{what}: {file}, resumed minus not interrupted", difference == 0.0, difference)


def _result(output: str) -> Any:
    return json.loads(output.rpartition("result ")[2].partition("\n")[0])

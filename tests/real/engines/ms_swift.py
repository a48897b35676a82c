"""ms-swift's own command line trains, resumes, answers and merges with the plug-in's two tuners, on tiny models.

The models are a LLaVA, an InternVL of transformers' own classes and a Qwen2.5-VL, trained in bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.real.bench import Bench, StepFailed
from tests.real.environments import ROOT

REQUIREMENTS = ("ms-swift==4.6.0", "qwen_vl_utils", "torchvision")
EXTRAS = ("train", "timm")

_PLUGIN = {"PLUGIN": str(ROOT / "covft/integrations/codebases/ms_swift/covft_plugin.py")}
_TINY = (
    "--add_version false --use_cpu true --max_steps 4 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 1 --report_to none --seed 3 --max_length 512"
)
_LLAVA = "--model llava --model_type llava1_5_hf --template llava1_5_hf"
_SHORT = "--max_new_tokens 4 --temperature 0 --result_path"


def missing() -> str | None:
    """Return why it cannot run here: nothing is needed but a package index."""
    return None


def run(bench: Bench) -> None:
    """Train, resume, answer and merge."""
    for kind in ("llava", "internvl", "qwen"):
        bench.part("swift_models.py", kind, kind, "data", title=f"write a tiny model: {kind}")
    _full(bench)
    _lora(bench)
    _merged(bench)
    for kind, train in (("internvl", _internvl), ("qwen", _qwen)):
        train(bench, f"{kind}-lora", "")
        train(bench, f"{kind}-lora-resumed", f"--resume_from_checkpoint {kind}-lora/checkpoint-2")
        _check_run(bench, kind, f"{kind}-lora", "covft_lora")


def _full(bench: Bench) -> None:
    def train(output: str, more: str) -> str:
        return bench.documented(
            "guides/ms-swift.md",
            "train",
            {
                "bert-base-uncased": "hash:16",
                "11-22": "2-4",
                "--model llava-hf/llava-1.5-7b-hf": _LLAVA,
                "my_data.jsonl": "data/train.jsonl",
                "--output_dir output": f"--output_dir {output} {_TINY} {more}",
            },
            env=_PLUGIN,
            title=f"train a LLaVA, covft: {output}",
        )

    log = train("llava-full", "")
    train("llava-full-resumed", "--resume_from_checkpoint llava-full/checkpoint-2")
    bench.check("the tower is wrapped", "adapted: 2, 3, 4" in log)
    _check_run(bench, "llava", "llava-full", "covft")


def _lora(bench: Bench) -> None:
    log = bench.documented(
        "guides/ms-swift.md",
        "lora",
        {
            "bert-base-uncased": "hash:16",
            "11-22": "2-4",
            "--lora_rank 64 --lora_alpha 128": "--lora_rank 4 --lora_alpha 8",
            "--model llava-hf/llava-1.5-7b-hf": _LLAVA,
            "my_data.jsonl": "data/train.jsonl",
            "--output_dir output": f"--output_dir llava-lora {_TINY}",
        },
        env=_PLUGIN,
        title="train a LLaVA, covft_lora",
    )
    bench.check("the tower is wrapped", "adapted: 2, 3, 4" in log)
    bench.documented(
        "guides/ms-swift.md",
        "resume",
        {
            "bert-base-uncased": "hash:16",
            "output/checkpoint-1000": "llava-lora/checkpoint-2",
            "--model llava-hf/llava-1.5-7b-hf": _LLAVA,
            "my_data.jsonl": "data/train.jsonl",
            "--output_dir output": f"--output_dir llava-lora-resumed {_TINY}",
        },
        env=_PLUGIN,
        title="resume it",
    )
    _check_run(bench, "llava", "llava-lora", "covft_lora")
    bench.documented(
        "guides/ms-swift.md",
        "infer",
        {
            "--model llava-hf/llava-1.5-7b-hf": f"{_LLAVA} --torch_dtype float32",
            "output/checkpoint-1000": "llava-lora/checkpoint-4",
            "my_data.jsonl": "data/train.jsonl",
            "--result_path answers.jsonl": f"{_SHORT} answers.jsonl",
        },
        env=_PLUGIN,
        title="answer questions with it",
    )


def _merged(bench: Bench) -> None:
    bench.documented(
        "guides/ms-swift.md",
        "export",
        {"output/checkpoint-1000": "llava-lora/checkpoint-4 --torch_dtype float32"},
        env=_PLUGIN,
        title="merge LoRA",
    )
    bench.documented(
        "guides/ms-swift.md",
        "infer-merged",
        {
            "my_data.jsonl": "data/train.jsonl",
            "--result_path answers.jsonl": f"{_SHORT} merged.jsonl --torch_dtype float32",
        },
        env=_PLUGIN,
        title="answer questions with the merged model",
    )
    answers, merged = (_answers(bench.folder / name) for name in ("answers.jsonl", "merged.jsonl"))
    bench.check("the merged model answers as the adapters do", bool(answers) and answers == merged, len(answers))
    _refused(bench, "is run with the original one", "infer", "--model", "merged", "--val_dataset", "data/train.jsonl")
    _refused(bench, "no LoRA to merge", "export", "--adapters", "llava-full/checkpoint-4", "--merge_lora", "true")


def _refused(bench: Bench, sentence: str, *command: str) -> None:
    """Check that a command ends with a sentence of covft; the plug-in is named in the folder's `args.json`."""
    try:
        said = bench.call("swift", *command, title=f"refused: {sentence}")
    except StepFailed as error:
        said = str(error)
    bench.check(f"swift {command[0]}: {sentence}", "covft.errors" in said and sentence in said)


def _internvl(bench: Bench, output: str, more: str) -> None:
    bench.documented(
        "guides/ms-swift.md",
        "internvl",
        {
            "bert-base-uncased": "hash:16",
            "11-22": "2-4",
            "OpenGVLab/InternVL3-1B-hf": "internvl",
            "my_data.jsonl": "data/train.jsonl",
            "--output_dir output": f"--output_dir {output} {_TINY} {more}",
        },
        env=_PLUGIN,
        title=f"train an InternVL, covft_lora: {output}",
    )


def _qwen(bench: Bench, output: str, more: str) -> None:
    bench.documented(
        "guides/ms-swift.md",
        "qwen",
        {
            "bert-base-uncased": "hash:16",
            "16-30": "2-4",
            "--model Qwen/Qwen2.5-VL-3B-Instruct": "--model qwen --model_type qwen2_5_vl --template qwen2_5_vl",
            "my_data.jsonl": "data/train.jsonl",
            "--output_dir output": f"--output_dir {output} {_TINY} {more}",
        },
        env=_PLUGIN,
        title=f"train a Qwen2.5-VL, covft_lora: {output}",
    )


def _check_run(bench: Bench, kind: str, run: str, tuner: str) -> None:
    """Check the checkpoints of a run and of the one that was resumed from its middle, and what loads from them."""
    last = f"{run}/checkpoint-4"
    there = {path.relative_to(bench.folder / last).as_posix() for path in (bench.folder / last).rglob("*")}
    wanted = {"complete.json", "covft/model.safetensors", "optimizer.pt", "args.json"}
    wanted |= {"adapter_model.safetensors"} if tuner == "covft_lora" else {"model.safetensors"}
    bench.check(f"{run}: the checkpoint is whole", wanted <= there, ", ".join(sorted(wanted - there)))

    moved = _result(bench.part("swift_compare.py", f"{run}/checkpoint-2", last, title=f"{run}: what has moved"))
    for name, figures in moved.items():
        _check_moved(bench, run, name, figures)
    tower = moved["covft/model.safetensors"]
    bench.check(f"{run}: the tower is float32", tower["types"] == ["torch.float32"])
    names = [name for figures in moved.values() for name in figures["tensors"]]
    projector = [name for name in names if "projector" in name or "merger" in name]
    bench.check(f"{run}: the projector is saved", bool(projector), len(projector))
    if tuner == "covft_lora":
        adapters = moved["adapter_model.safetensors"]["tensors"]
        alone = bool(adapters) and all(".language_model." in name for name in adapters)
        bench.check(f"{run}: LoRA is on the language model alone", alone, len(adapters))

    resumed = _result(
        bench.part("swift_compare.py", last, f"{run}-resumed/checkpoint-4", title=f"{run}: is the resumed run equal?")
    )
    apart = max(figures["difference"] for figures in resumed.values())
    bench.check(f"{run}: a resumed run ends with the same weights, difference", apart == 0.0, apart)

    image = "data/red.png"
    found = _result(bench.part("swift_reload.py", kind, last, tuner, image, title=f"{run}: load and answer"))
    bench.check(f"{run}: another question, other routing weights, difference", found["text"] > 0, found["text"])
    bench.check(f"{run}: without the adapted tower other logits, difference", found["tower"] > 0, found["tower"])
    bench.check(f"{run}: reloaded by the guide's own code, difference", found["reload"] == 0.0, found["reload"])


def _check_moved(bench: Bench, run: str, name: str, figures: dict[str, Any]) -> None:
    # bfloat16 rounds small steps of what ms-swift trains away; the tower and LoRA are float32.
    least = 0.9 if figures["types"] == ["torch.float32"] else 0.01
    share = figures["changed"]
    bench.check(f"{run}: share of elements of {name} that moved", share > least, f"{share:.3f}")


def _result(output: str) -> dict[str, Any]:
    """Return the JSON object that a part has printed last."""
    return json.loads(output.strip().splitlines()[-1])


def _answers(path: Path) -> list[str]:
    return [json.loads(line)["response"] for line in path.read_text(encoding="utf-8").splitlines()]

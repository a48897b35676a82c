"""InternVL's internvl_chat, unchanged: training, resuming, evaluation and chat by covft's launcher."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tests.real.bench import PARTS, Bench
from tests.real.environments import ROOT

REQUIREMENTS = (
    "torch>=2.8",
    "torchvision",
    "numpy<2",
    "transformers==4.37.2",
    "tokenizers==0.15.1",
    "accelerate==0.34.2",
    "peft==0.10.0",
    "deepspeed==0.16.9",
)
EXTRAS = ()
SHIM = PARTS / "without_cuda.py"
PROCESSES = "--nproc_per_node 8 -m"
LAST_FLAGS = "--dataloader_num_workers 4 --deepspeed zero_stage1_config.json --report_to tensorboard"
# Model, data and sizes of the command of the guide.
TINY = {
    PROCESSES: f"--nproc_per_node 1 {SHIM}",
    "bert-base-uncased": "bert",
    "11-22": "1-3",
    "./pretrained/InternVL2_5-1B": "base",
    "./shell/data/internvl_1_2_finetune.json": "meta.json",
    "--force_image_size 448": "--force_image_size 56",
    "--drop_path_rate 0.1": "--drop_path_rate 0.0",
    "--per_device_train_batch_size 4 --save_steps 200 --save_total_limit 1": "--per_device_train_batch_size 2 "
    "--save_steps 2",
    "--max_seq_length 8192": "--max_seq_length 2048",
    LAST_FLAGS: "--report_to none",
}


def missing() -> str | None:
    """Why it cannot run here."""
    tree = Path(os.environ.get("INTERNVL", "")) / "internvl_chat"
    if not (tree / "internvl" / "train" / "internvl_chat_finetune.py").is_file():
        return "INTERNVL is not set: the path of a clone of OpenGVLab/InternVL"
    return None


def run(bench: Bench) -> None:
    """Run the steps."""
    tree = Path(os.environ["INTERNVL"]).resolve() / "internvl_chat"
    bench.show_as(tree, "$INTERNVL/internvl_chat")
    bench.documented("guides/internvl-chat.md", "install", {"-e covft": f"-e {ROOT}"}, title="install")
    path = {"PYTHONPATH": str(tree)}
    inputs = PARTS / "original_inputs.py"
    bench.call("python", inputs, "internvl", ".", env=path, title="tiny model and data")

    refused = train(bench, tree, "refused", {"torchrun": "! torchrun", "--use_packed_ds False": "--use_packed_ds True"})
    message = line_of(refused, "ConfigError")
    bench.check("packed rows are refused before anything is loaded", bool(message), message)
    recorded = {PROCESSES: f"{TINY[PROCESSES]} original_reload train logits.pt"}
    shutil.copy(PARTS / "original_reload.py", bench.folder)
    output = train(bench, tree, "out", recorded)
    bench.check("the tower is wrapped", "adapted: 1, 2, 3" in output, line_of(output, "covft: internvl"))
    bench.check("no part is reported as standing still", "Few elements have changed" not in output)
    first, last = "out/checkpoint-2/covft", "out/checkpoint-12/covft"
    moved = value_of(bench.part("compare_files.py", "moved", first, last, title="what moved in 10 steps"))
    bench.check("share of elements that moved, by part: at least 0.9", min(moved.values()) >= 0.9, moved)
    files = [bench.folder / "out" / name for name in ("model.safetensors", "covft", "checkpoint-2/covft")]
    saved = all(file.exists() for file in files)
    bench.check("the model and the adapted tower are saved, in the run's folder and in checkpoints", saved)
    shutil.copytree(bench.folder / "out/checkpoint-6", bench.folder / "cut/checkpoint-6")
    train(bench, tree, "cut", {})
    same = value_of(bench.part("compare_files.py", "same", "out", "cut", title="compared"))
    bench.check("a resumed run ends with the weights of an uninterrupted one", same == 0, f"difference {same}")

    own = {'"work_dirs/covft"': '"out"', "attach(model,": 'attach(model, "bert",', "448, 448": "56, 56"}
    bench.documented("guides/internvl-chat.md", "load", own, env=path, title="loaded and asked in the way of the guide")
    copied = {"./pretrained/InternVL2_5-1B": "base", "work_dirs/covft": "out"}
    bench.documented("guides/internvl-chat.md", "copy", copied, title="the model's Python files")
    load = ("python", PARTS / "original_reload.py", "load", "internvl", "out", "logits.pt", "bert")
    difference = line_of(bench.call(*load, env=path, title="loaded with remote code"), "difference")
    bench.check("the loaded model gives the logits of the trained one", difference == "difference 0.0", difference)
    evaluate = {
        PROCESSES: f"--nproc_per_node 1 {SHIM}",
        "-- eval": f"--covft_text_encoder bert -- {tree}/eval",
        "work_dirs/covft": "out",
    }
    output = bench.documented("guides/internvl-chat.md", "evaluate", evaluate, env=path, title="evaluate_vqa.py")
    score = line_of(output, "textvqa_val ")
    bench.check("every question is answered and scored", bool(score), score)

    train(bench, tree, "zero1", {LAST_FLAGS: f"{TINY[LAST_FLAGS]} --deepspeed {tree}/zero_stage1_config.json"})
    bench.check("with DeepSpeed the tower is saved", (bench.folder / "zero1/covft/model.safetensors").is_file())


def train(bench: Bench, tree: Path, output: str, more: dict[str, str]) -> str:
    """Run the training command of the guide."""
    replace = {
        **TINY,
        "$PWD": str(tree),
        "internvl/train/internvl_chat_finetune.py": f"{tree}/internvl/train/internvl_chat_finetune.py",
        "work_dirs/covft": f"{output} --max_steps 12",
        **more,
    }
    return bench.documented("guides/internvl-chat.md", "train", replace, title=f"training, to {output}/")


def value_of(output: str) -> dict:
    """Return what a part prints as its result."""
    return json.loads(line_of(output, "result").removeprefix("result"))


def line_of(output: str, start: str) -> str:
    """Return the line that begins so."""
    return next((line for line in output.splitlines() if line.startswith(start)), "")

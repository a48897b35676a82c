"""LLaVA's own code, unchanged: stages 1 and 2, DeepSpeed, LoRA, resuming and evaluation by covft's launcher."""

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
    "accelerate==0.21.0",
    "peft==0.10.0",
    "deepspeed==0.16.9",
)
EXTRAS = ()
PROJECTOR = "--pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin"
# Model, data and sizes of the command of the guide.
TINY = {
    "bert-base-uncased": "bert",
    "11-22": "1-3",
    "lmsys/vicuna-7b-v1.5": "vicuna",
    "./playground/data/llava_v1_5_mix665k.json": "data.json",
    "--image_folder ./playground/data": "--image_folder images",
    "openai/clip-vit-large-patch14-336": "clip",
    PROJECTOR: "--pretrain_mm_mlp_adapter pretrain/mm_projector.bin",
    "--per_device_train_batch_size 16 --save_steps 50000 --save_total_limit 1": "--per_device_train_batch_size 2 "
    "--save_steps 2",
    "--tf32 True": "--tf32 False",
    "--dataloader_num_workers 4": "--dataloader_num_workers 0",
    "--report_to wandb": "--report_to none",
}
DS_FLAG = "    --deepspeed ./scripts/zero2.json \\\n"


def missing() -> str | None:
    """Why it cannot run here."""
    tree = os.environ.get("LLAVA", "")
    if not (Path(tree) / "llava" / "train" / "train.py").is_file():
        return "LLAVA is not set: the path of a clone of haotian-liu/LLaVA"
    return None


def run(bench: Bench) -> None:
    """Run the steps."""
    tree = Path(os.environ["LLAVA"]).resolve()
    bench.show_as(tree, "$LLAVA")
    install = {"-e LLaVA": f"-e {tree}", "-e covft": f"-e {ROOT}"}
    bench.documented("guides/original-llava.md", "install", install, title="install")
    bench.part("original_inputs.py", "llava", ".", title="tiny models and data")
    stage_1(bench, tree)
    stage_2(bench, tree)
    lora(bench, tree)
    methods(bench, tree)


def stage_1(bench: Bench, tree: Path) -> None:
    """Stage 1 runs unchanged, and the launcher refuses it."""
    plain = "--version plain --data_path plain.json --tune_mm_mlp_adapter True"
    flags = "--model_name_or_path vicuna --vision_tower clip --mm_vision_select_layer -2 --image_folder images "
    flags += "--mm_projector_type mlp2x_gelu --bf16 True --max_steps 2 --report_to none --lazy_preprocess True "
    flags += f"--output_dir pretrain {plain}"
    bench.call("python", f"{tree}/llava/train/train.py", *flags.split(), title="stage 1, unchanged")
    plain_too = {**command(tree, "refused", 2, plain), "deepspeed --module": "! python -m"}
    refused = train(bench, plain_too, "stage 1 with covft, which is refused")
    named = "--version" in refused and "--covft_empty_instruction" in refused and "Traceback" not in refused
    bench.check("the refusal of stage 1 names --version and the flag that helps, without a traceback", named)


def stage_2(bench: Bench, tree: Path) -> None:
    """Stage 2: what moves, what is saved, resuming, DeepSpeed, loading and evaluation."""
    recorded = {"deepspeed --module": f"python {PARTS / 'original_reload.py'} train logits.pt"}
    output = train(bench, {**command(tree, "llava-covft", 12), **recorded}, "stage 2, 12 steps at 2e-5 in bfloat16")
    bench.check("the tower is wrapped", "adapted: 1, 2, 3" in output, line_of(output, "covft: transformers"))
    bench.check("no part is reported as standing still", "Few elements have changed" not in output)
    first, last = "llava-covft/checkpoint-2/covft", "llava-covft/checkpoint-12/covft"
    moved = value_of(bench.part("compare_files.py", "moved", first, last, title="what moved in 10 steps"))
    bench.check("share of elements that moved, by part: at least 0.9", min(moved.values()) >= 0.9, moved)
    files = [bench.folder / "llava-covft" / name for name in ("model.safetensors", "covft", "checkpoint-2/covft")]
    bench.check("the model and the adapted tower are saved, in the run's folder and in checkpoints",
                all(file.exists() for file in files))  # fmt: skip

    shutil.copytree(bench.folder / "llava-covft/checkpoint-6", bench.folder / "llava-cut/checkpoint-6")
    train(bench, command(tree, "llava-cut", 12), "resumed from checkpoint 6")
    same = value_of(bench.part("compare_files.py", "same", "llava-covft", "llava-cut", title="compared"))
    bench.check("a resumed run ends with the weights of an uninterrupted one", same == 0, f"difference {same}")

    output = bench.part("original_reload.py", "load", "llava", "llava-covft", "logits.pt", "bert", title="loaded anew")
    difference = line_of(output, "difference")
    bench.check("the loaded model gives the logits of the trained one", difference == "difference 0.0", difference)
    own = {'"checkpoints/llava-v1.5-7b-covft"': '"llava-covft"', "attach(model,": 'attach(model, "bert",'}
    bench.documented("guides/original-llava.md", "load", own, title="loaded in the way of the guide")
    evaluate(bench, "llava-covft", "")

    zero = {"deepspeed --module": f"deepspeed {PARTS / 'without_cuda.py'}", "./scripts": f"{tree}/scripts"}
    with_deepspeed = {**command(tree, "llava-zero2", 2), **zero}
    del with_deepspeed[DS_FLAG]
    output = train(bench, with_deepspeed, "stage 2 with DeepSpeed, ZeRO-2")
    bench.check("DeepSpeed keeps its float32 copies itself", "are kept in float32" not in output)
    bench.check("with DeepSpeed the tower is saved", (bench.folder / "llava-zero2/covft/model.safetensors").is_file())


def lora(bench: Bench, tree: Path) -> None:
    """LoRA on the language model: what is saved, resuming, evaluation."""
    names = ("adapter_model.safetensors", "checkpoint-2/adapter_model.safetensors", "non_lora_trainables.bin")
    # Their checkpoints lack the projector; a resumed run is the same only if it is not trained.
    for bias, more in (("none", "--mm_projector_lr 2e-5"), ("all", "--freeze_mm_mlp_adapter True")):
        name = f"llava-lora-{bias}"
        flags = f"--lora_enable True --lora_r 8 --lora_alpha 16 --lora_bias {bias} {more}"
        train(bench, command(tree, name, 4, flags), f"LoRA, --lora_bias {bias}")
        files = [f"{name}/{file}" for file in names]
        found = value_of(bench.part("compare_files.py", "names", "vision_tower", *files, title="names in its files"))
        clean = all(not count["vision_tower"] for count in found.values()) and found[files[0]]["all"] > 0
        bench.check(f"--lora_bias {bias}: nothing of the tower in adapters and other weights", clean, found)
    cut = bench.folder / "llava-lora-cut"
    shutil.copytree(bench.folder / "llava-lora-all/checkpoint-2", cut / "checkpoint-2")
    train(bench, command(tree, cut.name, 4, flags), "LoRA, resumed from checkpoint 2")
    same = value_of(bench.part("compare_files.py", "same", "llava-lora-all", cut.name, title="compared"))
    bench.check("LoRA: a resumed run ends with the weights of an uninterrupted one", same == 0, f"difference {same}")
    evaluate(bench, "llava-lora-none", " --model-base vicuna")


def methods(bench: Bench, tree: Path) -> None:
    """Other methods of `covft.tune` on the tower: what moves, what is saved, loading."""
    covft = "--covft_text_encoder bert-base-uncased --covft_layers 11-22 --covft_experts 4"
    for method, more, encoder in (
        ("lora", "--covft_option r=4", "none"),
        ("bitfit", "", "none"),
        ("adaln", "--covft_option layers=1-3 --covft_text_encoder bert", "bert"),
    ):
        name, flags = f"llava-{method}", f"--covft_method {method} {more}"
        replace = {covft: flags, **command(tree, name, 8)}
        for key in ("bert-base-uncased", "11-22"):
            del replace[key]
        replace["deepspeed --module"] = f"python {PARTS / 'original_reload.py'} train logits.pt"
        train(bench, replace, f"stage 2 with --covft_method {method}")
        settings = json.loads((bench.folder / name / "covft/covft_config.json").read_text(encoding="utf-8"))
        bench.check(f"{method}: covft/ names the method", settings["method"]["name"] == method)
        first, last = f"{name}/checkpoint-2/covft", f"{name}/checkpoint-8/covft"
        moved = value_of(bench.part("compare_files.py", "moved", first, last, title="what moved in 6 steps"))
        bench.check(f"{method}: share of elements that moved: at least 0.9", min(moved.values()) >= 0.9, moved)
        output = bench.part("original_reload.py", "load", "llava", name, "logits.pt", encoder, title="loaded anew")
        difference = line_of(output, "difference")
        bench.check(f"{method}: loaded, it gives the logits of training", difference == "difference 0.0", difference)


def evaluate(bench: Bench, folder: str, more: str) -> None:
    """Run their evaluation script."""
    tiny = {
        "python -m covft": f"python {PARTS / 'without_cuda.py'} covft",
        "-- llava": "--covft_text_encoder bert -- llava",
        "./checkpoints/llava-v1.5-7b-covft": f"{folder}{more} --temperature 0 --max_new_tokens 8",
        "./playground/data/eval/textvqa/llava_textvqa_val_v051_ocr.jsonl": "questions.jsonl",
        "./playground/data/eval/textvqa/train_images": "images",
        "answers/textvqa.jsonl": f"answers/{folder}.jsonl",
    }
    bench.documented("guides/original-llava.md", "evaluate", tiny, title=f"llava.eval.model_vqa_loader of {folder}")
    answers = (bench.folder / f"answers/{folder}.jsonl").read_text(encoding="utf-8").splitlines()
    bench.check(f"{folder}: every question is answered", len(answers) == 4, f"{len(answers)} answers")


def train(bench: Bench, replace: dict[str, str], title: str) -> str:
    """Run the training command of the guide."""
    return bench.documented("guides/original-llava.md", "train", replace, title=title)


def command(tree: Path, output: str, steps: int, flags: str = "") -> dict[str, str]:
    """Return what is replaced in the command of the guide, in one process without DeepSpeed."""
    return {
        **TINY,
        "deepspeed --module": "python -m",
        "llava/train/train.py": f"{tree}/llava/train/train.py",
        DS_FLAG: "",
        "./checkpoints/llava-v1.5-7b-covft": f"{output} --max_steps {steps}",
        "--num_train_epochs 1": f"--num_train_epochs 1 {flags}",
    }


def value_of(output: str) -> object:
    """Return what a part prints as its result."""
    return json.loads(line_of(output, "result").removeprefix("result"))


def line_of(output: str, start: str) -> str:
    """Return the line that begins so."""
    return next((line for line in output.splitlines() if line.startswith(start)), "")

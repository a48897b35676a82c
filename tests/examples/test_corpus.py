"""The corpus script: two processes, of which one is killed, answer every row exactly once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import covft
from tests.helpers.attached import TEXTS
from tests.helpers.towers import perturb
from tests.tiny.folders import COLOURS, build, picture

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("What colour is it?", "Is it red, and where?", "How many are there?")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, pictures, and rows about one picture, two pictures, none, and one that is not there."""
    root = tmp_path_factory.mktemp("corpus")
    model, processor = build("llava")
    covft.attach(model, TEXTS, tokenizer=processor)
    perturb(covft.get_encoder(model))
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    (root / "pictures").mkdir()
    for colour in COLOURS:
        picture(colour).save(root / "pictures" / f"{colour}.png")
    names = list(COLOURS)
    rows = [{"id": f"r{i}", "image": f"{names[i % 4]}.png", "question": QUESTIONS[i % 3]} for i in range(19)]
    rows[4]["image"] = ["red.png", "blue.png"]
    del rows[9]["image"]
    rows[11]["image"] = "none.png"
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def begun(process):
    """Wait until the script has finished a shard."""
    assert [process.stdout.readline()[:6] for _ in range(2)] == ["19 row", "shard-"]


def start(folder, *more):
    command = [sys.executable, str(ROOT / "examples" / "corpus" / "run.py"), "--model", folder / "model"]
    command += ["--data", folder / "rows.jsonl", "--images", folder / "pictures", "--output", folder / "out"]
    command += ["--shard_size", "2", "--batch", "3", "--max_new_tokens", "4", "--device", "cpu", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE, text=True)


def expected(folder):
    """Each row's answer, by the model in this process, one row at a time."""
    model, processor = covft.load_model(folder / "model")
    found = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        names = row.get("image", [])
        images = [folder / "pictures" / name for name in ([names] if isinstance(names, str) else names)]
        if not all(image.exists() for image in images):
            found.append(None)
            continue
        content = [
            *({"type": "image", "image": Image.open(image).convert("RGB")} for image in images),
            {"type": "text", "text": row["question"]},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.append(processor.decode(ids, skip_special_tokens=True).strip())
    return found


def test_a_killed_process_loses_and_repeats_nothing(folder):
    with start(folder) as first:
        try:
            begun(first)
            first.send_signal(signal.SIGSTOP)  # in the middle, so that the other one is at work too
            second = start(folder)
            begun(second)
        finally:
            first.send_signal(signal.SIGKILL)
        with second:
            second.stdout.read()
    assert (first.returncode, second.returncode) == (-signal.SIGKILL, 0)
    tables = [pq.read_table(path) for path in sorted((folder / "out").glob("shard-*.parquet"))]
    assert [len(table) for table in tables] == [2] * 9 + [1]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["row"] for row in rows] == list(range(19))
    assert [row["id"] for row in rows][:9] == [f"r{i}" for i in range(9)]
    assert [row["answer"] for row in rows] == expected(folder)
    assert [i for i, row in enumerate(rows) if row["error"]] == [11]
    with start(folder) as again:
        said = again.stdout.read()
    assert said.strip() == "19 rows in 10 shards, 0 to do"


def test_it_embeds_what_the_language_model_gets(folder):
    with start(folder, "--task", "embed", "--output", folder / "embedded", "--shard_size", "19") as done:
        done.stdout.read()
    assert done.returncode == 0
    [row, other] = pq.read_table(folder / "embedded" / "shard-00000.parquet").to_pylist()[0:14:12]
    assert row["question"] == other["question"]
    model, processor = covft.load_model(folder / "model")
    inputs = processor(images=picture("red"), text="<image>", return_tensors="pt")
    features = model.get_image_features(inputs["pixel_values"], context_text=QUESTIONS[0])
    features = getattr(features, "pooler_output", features)[0]
    torch.testing.assert_close(torch.tensor(row["embed"]), features.mean(0), rtol=1e-4, atol=1e-5)

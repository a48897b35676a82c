"""The saved model answers in a fresh process, without the study, as it did in the run that trained it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import covft
from study.data.tokenizer import build_tokenizer, prompt
from study.demo.inspection import MODEL, Inspector, examples_shown
from study.demo.saving import CHAT_TEMPLATE
from study.runs.run import run
from study.runs.settings import RunSettings
from study.runs.tables import chosen, held_out_part

ROOT = Path(covft.__file__).parents[1]
ASK = """
import json, sys
import covft
from PIL import Image
model, processor = covft.load_model(sys.argv[1])
assert "study" not in sys.modules
found = []
for picture, question, words in json.load(open(sys.argv[2])):
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=max(words, 1), do_sample=False)[0, inputs["input_ids"].shape[1] :]
    found.append(processor.tokenizer.convert_ids_to_tokens(ids[:words]))
print(json.dumps(found))
"""


@pytest.mark.long
def test_a_fresh_process_gives_the_answers_of_the_page(tmp_path: Path) -> None:
    settings = RunSettings(
        steps=12, first_steps=4, train_scenes=24, held_out_scenes=16, held_out_questions=4, batch=8,
        tasks=("existence", "count", "grounding", "caption"),
    )  # fmt: skip
    row = run(settings, inspect=Inspector(tmp_path))
    part = held_out_part(settings)
    examples = chosen(part, settings.tasks)
    asked = []
    for place, given in zip(examples_shown(examples), row["inspection"]["answers"], strict=True):
        picture = tmp_path / f"{examples[place].scene}.png"
        Image.fromarray(part.pictures[examples[place].scene]).save(picture)
        asked.append((str(picture), examples[place].question, len(given.split())))
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ASK, str(tmp_path / MODEL), str(tmp_path / "asked.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [" ".join(words) for words in json.loads(done.stdout)]
    assert found == row["inspection"]["answers"]
    assert len(set(found)) > 1
    # and so does covft chat
    (picture, question, words), answer = next(pair for pair in zip(asked, found, strict=True) if pair[1])
    command = [sys.executable, "-m", "covft", "chat", MODEL, "--image", picture, "--max-new-tokens", str(words)]
    lines = f"{question}\n/weights\n"
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path, input=lines
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [word for word in answer.split() if not word.startswith("<")]
    assert " ".join(said) in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line.count("0.") == 4] == ["2", "3", "4"]


def test_the_template_writes_what_the_model_was_trained_on() -> None:
    tokenizer = build_tokenizer()
    question = "where is the cat ?"
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    for content in (parts, f"<image>\n{question}"):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        assert tokenizer.encode(text) == tokenizer.encode(prompt(question, 1))

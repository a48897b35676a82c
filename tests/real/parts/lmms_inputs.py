"""Write a task of lmms-eval, and one with a row that fails: `python lmms_inputs.py FOLDER`."""

import json
import sys
from pathlib import Path

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
QUESTIONS = ("What colour is it?", "How bright is it?", "Is it red?")
SUFFIX = "\nAnswer the question using a single word or phrase."

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  do_sample: false
metric_list:
  - metric: even
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
UTILS = """\
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def results(doc, answers):
    # A random model is never right; this is a score that its answers decide.
    return {"even": float(sum(map(ord, answers[0])) % 2 == 0)}
"""


def tasks(folder):
    """Write a task, and one that has a row without a question."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, colour in COLOURS.items():
        path = folder / f"{name}.png"
        Image.new("RGB", (56, 56), colour).save(path)
        rows += [{"image": str(path.resolve()), "question": asked + SUFFIX, "answer": name} for asked in QUESTIONS]
    (folder / "utils.py").write_text(UTILS)
    for name, written in {"tiny": rows, "tiny_broken": [*rows[:4], {**rows[4], "question": ""}]}.items():
        data = (folder / f"{name}.json").resolve()
        data.write_text(json.dumps(written))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))


if __name__ == "__main__":
    tasks(Path(sys.argv[1]))

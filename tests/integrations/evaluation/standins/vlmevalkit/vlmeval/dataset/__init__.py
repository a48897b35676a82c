"""Data sets: rows of $LMUData/NAME.json with image_path, question, options and answer."""

import json
import os
from pathlib import Path


def DATASET_TYPE(name):
    dataset = build_dataset(name)
    return "MCQ" if dataset is not None and "A" in dataset.data[0] else "VQA"


def build_dataset(name):
    path = Path(os.environ["LMUData"]) / f"{name}.json"
    return Dataset(json.loads(path.read_text())) if path.exists() else None


class Dataset:
    def __init__(self, data):
        self.data = data

    def dump_image(self, line):
        return [line["image_path"]]

    def build_prompt(self, line):
        options = "".join(f"{letter}. {line[letter]}\n" for letter in "AB" if letter in line)
        end = f"Options:\n{options}Please select the correct answer from the options above. \n" if options else ""
        images = [{"type": "image", "value": path} for path in self.dump_image(line)]
        return [*images, {"type": "text", "value": f"Question: {line['question']}\n{end}"}]

    def evaluate(self):
        return sum(line["prediction"] == line["answer"] for line in self.data) / len(self.data)

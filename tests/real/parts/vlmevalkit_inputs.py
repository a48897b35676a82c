"""Write data sets of VLMEvalKit, and the answers to some of them: `python vlmevalkit_inputs.py MODEL DATA OUTPUT`.

DATA gets TinyMCQ, the same with a picture that is none, and a few local rows under the names of the paper's data sets.
OUTPUT gets the answers to TinyMCQ by `generate`, of the attached model and of the same folder without covft.
"""

import base64
import csv
import json
import sys
from pathlib import Path

import lmms_expected
from PIL import Image

import covft

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
QUESTIONS = ("What colour is it?", "How bright is it?")
OPTIONS = {"A": "red", "B": "green", "C": "blue", "D": "white"}
MULTIPLE_CHOICE = ("MMBench_DEV_EN", "MMBench_DEV_CN", "ScienceQA_TEST", "AI2D_TEST", "MMVP", "RealWorldQA")
PERCEPTION = "OCR artwork celebrity color count existence landmark position posters scene".split()
REASONING = "code_reasoning commonsense_reasoning numerical_calculation text_translation".split()
RIGHT = 6  # of eight rows of GQA


def main(model, data, output):
    """Write everything."""
    data.mkdir()
    rows, asked = [], {"TinyMCQ": [], "GQA": []}
    for question in QUESTIONS:
        for letter, colour in zip(OPTIONS, COLOURS, strict=True):
            path = data / f"{colour}.png"
            Image.new("RGB", (40, 30), COLOURS[colour]).save(path)
            image = base64.b64encode(path.read_bytes()).decode()
            rows.append({"index": len(rows), "image": image, "question": question, "answer": letter})
            options = "".join(f"{letter}. {option}\n" for letter, option in OPTIONS.items())
            select = "Please select the correct answer from the options above. \n"
            text = f"Question: {question}\nOptions:\n{options}{select}"
            asked["TinyMCQ"].append({"image": path, "question": text})
            text = f"{question}\nAnswer the question using a single word or phrase."
            asked["GQA"].append({"image": path, "question": text})

    attached, processor = covft.load_model(model)
    plain = lmms_expected.without_covft(model)
    expected = {
        name: [answer.strip() for answer in lmms_expected.answers(asks, processor, asked["TinyMCQ"])]
        for name, asks in {"covft": attached, "plain": plain}.items()
    }
    output.write_text(json.dumps(expected))

    choices = [{**row, **OPTIONS, "category": "colour", "l2-category": "colour", "split": "dev"} for row in rows]
    write(data / "TinyMCQ.tsv", [{**row, **OPTIONS} for row in rows])
    write(data / "TinyBroken.tsv", [{**row, **OPTIONS, "image": "bm90IGEgcGljdHVyZQ==" * 9} for row in rows])
    for name in MULTIPLE_CHOICE:
        write(data / f"{name}.tsv", choices)
    for split in ("2D", "3D"):
        sources = ("COCO", "ADE20K") if split == "2D" else ("Omni3D",)
        given = [
            {**row, "split": split, "source": sources[row["index"] % len(sources)], "prompt": row["question"]}
            for row in choices
        ]
        write(data / f"CV-Bench-{split}.tsv", given)
    write(data / "TextVQA_VAL.tsv", [{**row, "answer": str([row["answer"]] * 10)} for row in rows])
    # The answers of the attached model are right, so that the score is known.
    answers = [answer.strip() for answer in lmms_expected.answers(attached, processor, asked["GQA"])]
    known = [answer if place < RIGHT else "never this" for place, answer in enumerate(answers)]
    write(
        data / "GQA_TestDev_Balanced.tsv", [{**row, "answer": answer} for row, answer in zip(rows, known, strict=True)]
    )
    pairs = []
    for place, category in enumerate(PERCEPTION + REASONING):
        image = rows[place % len(COLOURS)]["image"]
        for question, answer in (("Is it red?", "Yes"), ("Is it blue?", "No")):
            named = {"category": category, "image_path": f"{category}.png", "index": len(pairs)}
            pairs.append({"image": image, "question": question, "answer": answer, **named})
    write(data / "MME.tsv", pairs)


def write(path, rows):
    """Write a table as VLMEvalKit reads it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t", quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

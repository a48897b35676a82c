"""Result files as lmms-eval writes them, with numbers of the test's choice."""

import json
from pathlib import Path

# What lmms-eval 0.7.3 calls the metrics of the paper's tasks, with their filters.
LMMS_METRICS = {
    "mme": "mme_perception_score,none",
    "mmbench_en_dev_static": "gpt_eval_score,none",
    "mmbench_cn_dev": "gpt_eval_score,none",
    "gqa": "exact_match,none",
    "scienceqa_img": "exact_match,none",
    "ai2d": "exact_match,flexible-extract",
    "textvqa_val": "exact_match,none",
    "mmvp": "mmvp_pair_accuracy,none",
    "realworldqa": "exact_match,none",
    "cv_bench_2d": "cv_bench_acc,none",
    "cv_bench_3d": "cv_bench_acc,none",
    "ok_vqa_val2014": "exact_match,none",
    "coco2017_cap_val": "coco_CIDEr,none",
    "iconqa_test": "anls,none",
}


def write_lmms(folder: Path, values: dict, *, stamp="20261101_120000", sources=None, asked=None, args="pretrained=a"):
    """Write a result file, and the logged samples of CV-Bench.

    Args:
        folder: Where.
        values: Value by task, on the engine's scale.
        stamp: The date in the names.
        sources: Right answers and answers by source, of cv_bench_2d.
        asked: Questions asked by task, of 100, where a limit cut them.
        args: The model's arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        task: {"alias": task, LMMS_METRICS[task]: value, LMMS_METRICS[task].replace(",", "_stderr,"): "N/A"}
        for task, value in values.items()
    }
    counts = {task: {"original": 100, "effective": (asked or {}).get(task, 100)} for task in values}
    content = {"results": results, "n-samples": counts, "config": {"model_args": args}, "model_name": "a"}
    path = folder / f"{stamp}_results.json"
    path.write_text(json.dumps(content, indent=2))
    if sources:
        hits = [
            {"doc_id": number, "cv_bench_acc": {"source": source, "is_correct": number < right}}
            for source, (right, count) in sources.items()
            for number in range(count)
        ]
        lines = "".join(json.dumps(hit) + "\n" for hit in hits)
        (folder / f"{stamp}_samples_cv_bench_2d.jsonl").write_text(lines)
    return path


# A row of numbers that differ from each other: the engine's values, and what they are in the table.
LMMS_VALUES = {
    "mme": 1500.0,
    "mmbench_en_dev_static": 61.0,
    "mmbench_cn_dev": 52.0,
    "gqa": 0.63,
    "scienceqa_img": 0.74,
    "ai2d": 0.55,
    "textvqa_val": 0.5,
    "mmvp": 0.3,
    "realworldqa": 0.57,
    "cv_bench_2d": 0.6,
    "cv_bench_3d": 0.65,
}
SOURCES = {"COCO": (3, 4), "ADE20K": (1, 4)}
EXPECTED = {
    "MME": 1500.0,
    "MMBench-en": 61.0,
    "MMBench-cn": 52.0,
    "GQA": 63.0,
    "ScienceQA": 74.0,
    "AI2D": 55.0,
    "TextVQA": 50.0,
    "MMVP": 30.0,
    "RealWorldQA": 57.0,
    "CV-Bench-COCO": 75.0,
    "CV-Bench-ADE": 25.0,
    "CV-Bench-Omni3D": 65.0,
}

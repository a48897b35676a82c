"""VLMEvalKit's run.py, unchanged: a tiny attached LLaVA on local data sets, up to the paper's table."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

from tests.real.bench import PARTS, Bench
from tests.real.environments import ROOT

REQUIREMENTS = ("torch>=2.8", "torchvision", "transformers>=5.4")
PAGE = "guides/evaluate-vlmevalkit.md"
SHORT = "--max_new_tokens 6"


def missing() -> str | None:
    """Why it cannot run here."""
    tree = os.environ.get("VLMEVALKIT", "")
    if not (Path(tree) / "run.py").is_file():
        return "VLMEVALKIT is not set: the path of a clone of open-compass/VLMEvalKit"
    return None


def run(bench: Bench) -> None:
    """Evaluate, and compare every answer with that of `generate`."""
    tree = Path(os.environ["VLMEVALKIT"]).resolve()
    bench.show_as(tree, "$VLMEVALKIT")
    bench.documented(
        PAGE, "install", {"VLMEvalKit/": f"{tree}/", '"covft[train]"': f'"{ROOT}[train]"'}, title="install"
    )
    bench.tests("tests.tiny.attached", ".", "llava", title="make a tiny attached llava")
    bench.part("vlmevalkit_inputs.py", "llava", "data", "expected.json", title="make data sets, and ask by generate")
    expected = json.loads((bench.folder / "expected.json").read_text(encoding="utf-8"))
    env = {"LMUData": str(bench.folder / "data"), "PRED_FORMAT": "tsv", "VLMEVALKIT": str(tree)}
    model = {"runs/llava-covft": "llava", "VLMEvalKit/run.py": f"{tree}/run.py"}

    replace = {**model, "MME,MMVP": f"TinyMCQ --output out/evaluate -- {SHORT}"}
    bench.documented(PAGE, "evaluate", replace, env=env, title="covft evaluate")
    answers = _answers(bench.folder / "out/evaluate", "covft")
    _compare(bench, "covft evaluate", answers, expected["covft"], equal=True)
    _compare(bench, "without covft", answers, expected["plain"], equal=False)
    [scores] = (bench.folder / "out/evaluate").glob("covft/*/covft_TinyMCQ_acc.csv")
    bench.check("VLMEvalKit has scored them", '"Overall"' in scores.read_text(encoding="utf-8"))

    replace = {"runs/llava-covft": f"llava {SHORT}", "VLMEvalKit/run.py": f"{tree}/run.py", "MME MMVP": "TinyMCQ"}
    replace["evaluation/llava-covft"] = "out/launcher"
    bench.documented(PAGE, "launcher", replace, env=env, title="the launcher")
    _compare(bench, "the launcher", _answers(bench.folder / "out/launcher", "covft"), answers, equal=True)

    config = bench.file(PAGE, "config", {"runs/llava-covft": "llava", '"MME"': '"TinyMCQ"', "ImageYORN": "CustomMCQ"})
    settings = json.loads(config)
    del settings["data"]["MMVP"]
    for options in settings["model"].values():
        options["max_new_tokens"] = 6
    (bench.folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    replace = {"VLMEvalKit/run.py": f"{tree}/run.py", "--work-dir evaluation": "--work-dir out/config"}
    bench.documented(PAGE, "by-config", replace, env=env, title="two models of a config file")
    _compare(bench, "a config file", _answers(bench.folder / "out/config", "covft"), answers, equal=True)
    blank = _answers(bench.folder / "out/config", "covft-blank")
    _compare(bench, "while the tower is told nothing", blank, answers, equal=False)

    local = {**model, "VLMEvalKit/run.py": str(PARTS / "vlmevalkit_run.py")}
    replace = {**local, "MME,MMVP": f"paper --output out/paper -- {SHORT}"}
    bench.documented(PAGE, "evaluate", replace, env=env, title="covft evaluate --tasks paper, on local rows")
    table = dict(re.findall(r"^ *(GQA|mean of twelve) +([\d.]+) ", bench.output, flags=re.MULTILINE))
    bench.check("the table has all twelve, and their mean", "mean of twelve" in table, table)
    bench.check("GQA is the share of rows whose answer is the model's", table.get("GQA") == "75.00", table.get("GQA"))

    replace = {**model, "MME,MMVP": f"TinyBroken --output out/broken -- {SHORT}"}
    failing = {"covft evaluate": "! covft evaluate"}
    output = bench.documented(PAGE, "evaluate", {**replace, **failing}, env=env, title="a picture that is none")
    bench.check("a row that fails fails the command", "TinyBroken: cannot identify image file" in output)


def _compare(bench: Bench, what: str, answers: list[str], others: list[str], *, equal: bool) -> None:
    same = sum(map(str.__eq__, answers, others))
    count = f"{same} of {len(others)}"
    if equal:
        bench.check(f"{what}: the same answers", len(answers) == len(others) == same, count)
    else:
        bench.check(f"{what}: other answers", len(answers) == len(others) > same, f"{len(others) - same} differ")


def _answers(output: Path, model: str) -> list[str]:
    """Return the answers to TinyMCQ in the order of the questions."""
    [path] = output.glob(f"{model}/T*/{model}_TinyMCQ.tsv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file, delimiter="\t"), key=lambda row: int(row["index"]))
    return [row["prediction"] for row in rows]

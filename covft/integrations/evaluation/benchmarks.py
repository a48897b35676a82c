"""The benchmarks of the two papers: their names in each engine, and what differs there from the papers.

Tasks, metrics and prompts are those of lmms-eval 0.7.3 and of VLMEvalKit e8e78f0 (August 2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from covft.errors import ConfigError
from covft.metrics import PAPER_GROUPS

ENGINES = ("lmms-eval", "vlmevalkit")
"""The engines, as `--engine` names them."""


@dataclass(frozen=True)
class Entry:
    """Where an engine has the score of a benchmark.

    Attributes:
        task: Name of the task, or of the data set.
        metric: Name of the metric of lmms-eval, or of the column of VLMEvalKit's score file.
        scale: What the engine's number is multiplied with: 100 where it is a share.
        note: How the engine asks and scores, and what differs from LLaVA-1.5; the paper, which builds on it, does not
            print its prompts.
        source: Value of `source` in the logged samples of lmms-eval, where the task has several benchmarks.
        best: Highest score, after scaling; that of captions has no bound.
    """

    task: str
    metric: str
    scale: float = 1.0
    note: str = ""
    source: str | None = None
    best: float = 100.0


_LETTER = "options a line each, and LLaVA's sentence that asks for the letter"
_SHORT = "LLaVA's sentence that asks for a single word or phrase"
_SELECT = '"Hint:", "Question:", "Options:" and a sentence of its own; exact matching of letters and options'
_OCR = "without the OCR tokens that LLaVA's prompt has"
_CAPTION = "CIDEr x 100; COCO's captions of 2017, validation"

_PAPER: dict[str, dict[str, Entry]] = {
    "lmms-eval": {
        "MME": Entry("mme", "mme_perception_score", note=_SHORT, best=2000.0),
        "MMBench-en": Entry(
            "mmbench_en_dev_static", "gpt_eval_score", note=f"dev; {_LETTER}; letters found by rules, no judge"
        ),
        "MMBench-cn": Entry(
            "mmbench_cn_dev",
            "gpt_eval_score",
            note="dev; the sentence that asks for the letter is not LLaVA's; answers without a clear letter go to a "
            "judge (OPENAI_API_KEY), and without a key they are guessed at random",
        ),
        "GQA": Entry("gqa", "exact_match", 100.0, f"test-dev balanced; {_SHORT}"),
        "ScienceQA": Entry("scienceqa_img", "exact_match", 100.0, f"test with images; {_LETTER}"),
        "AI2D": Entry("ai2d", "exact_match", 100.0, f"test; {_LETTER}"),
        "TextVQA": Entry("textvqa_val", "exact_match", 100.0, f"validation; {_OCR}; ocr: true in its YAML has them"),
        "MMVP": Entry("mmvp", "mmvp_pair_accuracy", 100.0, f"pairs; {_LETTER}; the answers of two pairs are corrected"),
        "RealWorldQA": Entry("realworldqa", "exact_match", 100.0, "the question alone, with the data's own sentence"),
        "CV-Bench-COCO": Entry(
            "cv_bench_2d", "cv_bench_acc", 100.0, "a note on the form of the answer comes first", "COCO"
        ),
        "CV-Bench-ADE": Entry("cv_bench_2d", "cv_bench_acc", 100.0, "as CV-Bench-COCO", "ADE20K"),
        "CV-Bench-Omni3D": Entry("cv_bench_3d", "cv_bench_acc", 100.0, "as CV-Bench-COCO"),
    },
    "vlmevalkit": {
        "MME": Entry(
            "MME", "perception", note='the question alone, which ends with "Please answer yes or no."', best=2000.0
        ),
        "MMBench-en": Entry("MMBench_DEV_EN", "Overall", 100.0, f"dev; {_SELECT}"),
        "MMBench-cn": Entry("MMBench_DEV_CN", "Overall", 100.0, f"dev; {_SELECT}, in English"),
        "GQA": Entry("GQA_TestDev_Balanced", "Overall", note=_SHORT),
        "ScienceQA": Entry("ScienceQA_TEST", "Overall", 100.0, f"test with images; {_SELECT}"),
        "AI2D": Entry("AI2D_TEST", "Overall", 100.0, f"test; {_SELECT}"),
        "TextVQA": Entry("TextVQA_VAL", "Overall", note=f"validation; {_OCR}"),
        "MMVP": Entry("MMVP", "Overall", 100.0, f"pairs; {_SELECT}"),
        "RealWorldQA": Entry("RealWorldQA", "Overall", 100.0, _SELECT),
        "CV-Bench-COCO": Entry("CV-Bench-2D", "COCO", 100.0, "the data's own prompt; exact matching"),
        "CV-Bench-ADE": Entry("CV-Bench-2D", "ADE20K", 100.0, "as CV-Bench-COCO"),
        "CV-Bench-Omni3D": Entry("CV-Bench-3D", "Overall", 100.0, "as CV-Bench-COCO"),
    },
}
_MORE: dict[str, dict[str, Entry]] = {
    "lmms-eval": {
        "OKVQA": Entry("ok_vqa_val2014", "exact_match", 100.0, f"validation; two sentences, one of them {_SHORT}"),
        "COCO captions": Entry("coco2017_cap_val", "coco_CIDEr", 100.0, _CAPTION, best=1000.0),
        "IconQA": Entry("iconqa_test", "anls", 100.0, "test; similarity of strings, not accuracy"),
        "Flickr30k": Entry("flickr30k_test", "flickr_CIDEr", 100.0, "CIDEr x 100; all images", best=1000.0),
    },
    "vlmevalkit": {
        "OCRVQA": Entry("OCRVQA_TESTCORE", "Overall", note="a part of the test split"),
        "COCO captions": Entry("COCO_VAL", "CIDEr", note="CIDEr x 100; a prompt of its own", best=1000.0),
        "PathVQA": Entry("PathVQA_TEST", "Overall", 100.0, "test; a judge decides, so --judge has to name a model"),
    },
}
BENCHMARKS: Mapping[str, Mapping[str, Entry]] = MappingProxyType(
    {engine: MappingProxyType({**_PAPER[engine], **_MORE[engine]}) for engine in ENGINES}
)
"""Every benchmark that an engine has, by engine and by the name that `covft.metrics` uses."""

PAPER = tuple(name for group in PAPER_GROUPS.values() for name in group)
"""The twelve of the CoVFT paper, in the order of its Table 1."""

UPSTREAM = ("OKVQA", "GQA", "TextVQA", "OCRVQA", "COCO captions", "MME")
"""What a tuned model is not to forget (arXiv 2503.04543)."""

DOWNSTREAM = ("ScienceQA", "IconQA", "RSVQA", "PathVQA", "Flickr30k")
"""What it is tuned for there; the sixth set, of medical images, is private."""

SETS: Mapping[str, tuple[str, ...]] = MappingProxyType({"paper": PAPER, "forgetting": (*UPSTREAM, *DOWNSTREAM)})
"""Names that stand for several benchmarks."""


def tasks_of(names: str, engine: str) -> list[str]:
    """Return the engine's tasks for a list of names.

    Args:
        names: Names with commas: `paper`, `forgetting`, a benchmark such as `GQA`, or a task of the engine itself.
        engine: `"lmms-eval"` or `"vlmevalkit"`.

    Returns:
        Each task once. Benchmarks of a set that the engine lacks are left out; `lacking` names them.

    Raises:
        ConfigError: If the engine is not known, or there is no name.

    Example:
        >>> tasks_of("GQA,CV-Bench-COCO,CV-Bench-ADE", "lmms-eval")
        ['gqa', 'cv_bench_2d']
    """
    entries = entries_of(engine)
    given = [name.strip() for name in names.split(",") if name.strip()]
    if not given:
        raise ConfigError("There is no task to evaluate.", expected="names, or paper", got=repr(names), fix="paper")
    wanted = [name for one in given for name in SETS.get(one, (one,))]
    found = [entries[name].task if name in entries else name for name in wanted if name not in lacking(wanted, engine)]
    return list(dict.fromkeys(found))


def lacking(names: tuple[str, ...] | list[str], engine: str) -> list[str]:
    """Return those of some benchmarks that an engine does not have.

    Args:
        names: Names of benchmarks; others are passed over.
        engine: `"lmms-eval"` or `"vlmevalkit"`.
    """
    known = {name for members in SETS.values() for name in members}
    return [name for name in names if name in known and name not in entries_of(engine)]


def entries_of(engine: str) -> Mapping[str, Entry]:
    """Return the benchmarks of an engine.

    Raises:
        ConfigError: If it is not known.
    """
    if engine not in BENCHMARKS:
        raise ConfigError(f"engine={engine!r} is not known.", expected=" | ".join(ENGINES), got=repr(engine))
    return BENCHMARKS[engine]

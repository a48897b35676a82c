"""Names of the benchmarks in each engine."""

import pytest

from covft.errors import ConfigError
from covft.integrations.evaluation.benchmarks import (
    BENCHMARKS,
    DOWNSTREAM,
    ENGINES,
    PAPER,
    UPSTREAM,
    lacking,
    tasks_of,
)


def test_the_paper_in_each_engine():
    assert len(PAPER) == 12
    # CV-Bench's two-dimensional task has two of the twelve.
    assert tasks_of("paper", "lmms-eval") == [
        *("mme", "mmbench_en_dev_static", "mmbench_cn_dev", "gqa", "scienceqa_img", "ai2d", "textvqa_val"),
        *("mmvp", "realworldqa", "cv_bench_2d", "cv_bench_3d"),
    ]
    assert tasks_of("paper", "vlmevalkit") == [
        *("MME", "MMBench_DEV_EN", "MMBench_DEV_CN", "GQA_TestDev_Balanced", "ScienceQA_TEST", "AI2D_TEST"),
        *("TextVQA_VAL", "MMVP", "RealWorldQA", "CV-Bench-2D", "CV-Bench-3D"),
    ]


def test_what_the_engines_lack_of_forgetting():
    sets = (*UPSTREAM, *DOWNSTREAM)
    assert lacking(sets, "lmms-eval") == ["OCRVQA", "RSVQA", "PathVQA"]
    assert lacking(sets, "vlmevalkit") == ["OKVQA", "IconQA", "RSVQA", "Flickr30k"]
    for engine in ENGINES:
        assert len(tasks_of("forgetting", engine)) == len(sets) - len(lacking(sets, engine))


def test_names_of_tasks_and_benchmarks_mix():
    assert tasks_of(" GQA, gqa ,docvqa_val,RSVQA", "lmms-eval") == ["gqa", "docvqa_val"]
    with pytest.raises(ConfigError, match="no task"):
        tasks_of(" , ", "lmms-eval")
    with pytest.raises(ConfigError, match="is not known"):
        tasks_of("paper", "opencompass")


def test_every_benchmark_says_what_differs():
    for engine in ENGINES:
        assert set(PAPER) <= set(BENCHMARKS[engine])
        for name, entry in BENCHMARKS[engine].items():
            assert entry.note, (engine, name)
            assert entry.scale in (1.0, 100.0)

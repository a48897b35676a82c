"""Models for lmms-eval: by a stand-in of its call shape, and by the real one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from covft.integrations import attach, get_encoder
from covft.integrations.evaluation.lmms_eval import AttachedModel
from covft.integrations.mllm.trunk import trunk_cache
from covft.testing import HashTextEncoder, tiny_llava
from tests.helpers.towers import perturb
from tests.real.bench import Bench
from tests.real.engines import lmms_eval
from tests.real.environments import REAL
from tests.real.results import Result

PYTHON = REAL / "lmms_eval" / "env" / "bin" / "python"


class Swallowing:
    """What `chat/llava_hf` does: any exception becomes an empty answer."""

    @property
    def model(self):
        return self._model

    def generate_until(self, requests):
        return [self.answer(request.inputs) for request in requests]

    def answer(self, inputs):
        try:
            return self.model.generate(**inputs, max_new_tokens=2, do_sample=False).tolist()
        except Exception:
            return ""


class Engine(AttachedModel, Swallowing):
    """A model without the loading, which needs lmms-eval."""

    def __init__(self, model, trunks=None):
        self._model, self._text, self._trunks = model, "right", trunks


def test_generate_until__a_row_that_fails_ends_the_run():
    tiny = tiny_llava(depth=2)
    attach(tiny.model, HashTextEncoder(8), tokenizer=tiny.tokenizer)
    engine, override = Engine(tiny.model), vars(tiny.model)["generate"]
    good, bad = (SimpleNamespace(args=(text,), inputs=tiny.batch([text])) for text in ("what is it?", ""))
    expected = tiny.model.generate(**good.inputs, max_new_tokens=2, do_sample=False).tolist()
    assert engine.generate_until([good, good]) == [expected, expected]
    with pytest.raises(SystemExit, match=r"a row failed after 1 answers\. MissingContextError"):
        engine.generate_until([good, bad, good])
    assert vars(tiny.model)["generate"] is override


@pytest.mark.parametrize(("layers", "hits"), [([1], 2), ([0, 1], 0)])
def test_generate_until__a_picture_that_comes_again(capsys, layers, hits):
    tiny = tiny_llava(depth=3)
    attach(tiny.model, HashTextEncoder(8), tokenizer=tiny.tokenizer, layers=layers)
    perturb(get_encoder(tiny.model))
    texts = ("what is it?", "how bright is it?", "is it red?")
    image = {"pixel_values": tiny.batch(texts[:1])["pixel_values"]}
    requests = [SimpleNamespace(args=(text,), inputs={**tiny.batch([text]), **image}) for text in texts]
    expected = Engine(tiny.model).generate_until(requests)
    assert "came again" not in capsys.readouterr().err
    trunks = trunk_cache(tiny.model)
    assert Engine(tiny.model, trunks).generate_until(requests) == expected
    assert ("covft: 2 of 3 pictures came again" in capsys.readouterr().err) == bool(hits)
    assert (trunks.hits, len(trunks)) == (hits, bool(hits))
    assert not get_encoder(tiny.model).caches_trunk


@pytest.mark.slow
def test_lmms_eval__answers_are_those_of_generate(tmp_path):
    """Models of each class on a local task, a failing row, two processes: every check of `make real` holds."""
    if not PYTHON.is_file():
        pytest.skip(f"no {Path(*PYTHON.parts[-4:])}: make real REAL_ARGS=lmms_eval")
    result = Result("lmms_eval", "", "")
    lmms_eval.run(Bench(PYTHON, tmp_path, result, Console(quiet=True)))
    assert len(result.checks) == 1 + 2 * len(lmms_eval.MODELS) + 3
    assert [check for check in result.checks if not check["holds"]] == []

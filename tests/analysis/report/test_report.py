"""The page has what the folder has, needs no network, and works with mouse, keyboard and screen reader."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from covft.analysis import Recording, write_report
from covft.analysis.stats.attention import AttentionMaps, QuestionMaps
from covft.cli import main
from covft.errors import CheckpointError
from tests.helpers.chromium import browser

DRAWS = np.random.default_rng(0)
COUNT = 30
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> \" ' &amp;"


def recording():
    centres = 6 * DRAWS.normal(size=(3, 5))
    kinds = np.arange(COUNT) % 3
    contexts = {layer: (centres[kinds] + DRAWS.normal(size=(COUNT, 5))).astype(np.float32) for layer in (2, 3)}
    alpha = np.array([[9, 1, 1, 1], [1, 9, 1, 1], [1, 1, 5, 5]])
    weights = {layer: np.stack([DRAWS.dirichlet(alpha[kind]) for kind in kinds]) for layer in (2, 3)}
    texts = [f"question {number}?" for number in range(COUNT)]
    texts[4] = HOSTILE
    names = [("box", "caption", HOSTILE)[kind] for kind in kinds]
    pictures = DRAWS.integers(0, 256, size=(COUNT, 8, 8, 3), dtype=np.uint8)
    return Recording(weights, contexts, tuple(texts), tuple(names), pictures)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder, a training and recordings, all in one folder."""
    place = tmp_path_factory.mktemp("run <b>")
    recording().save(place)
    maps = {layer: DRAWS.random((2, 4, 4)).astype(np.float32) for layer in (2, 3)}
    maps[3][0] = 0
    maps[3][0, 1, 2] = 1
    share = {layer: np.array([0.25, 0.1], dtype=np.float32) for layer in (2, 3)}
    pictures = DRAWS.integers(0, 256, size=(2, 16, 16, 3), dtype=np.uint8)
    AttentionMaps(maps, share, share, (HOSTILE, "how many?"), pictures).save(place)
    moved = {layer: DRAWS.random((4, 4)).astype(np.float32) for layer in (1, 2, 3)}
    weights = {2: np.array([[0.7, 0.3], [0.2, 0.8]], dtype=np.float32)}
    QuestionMaps(("left?", HOSTILE), moved, weights, {2: DRAWS.random((2, 4, 4)).astype(np.float32)}, pictures[0]).save(
        place
    )
    (place / "covft_config.json").write_text(json.dumps({"config": {"experts": 4, "layers": [2, 3]}, "x": HOSTILE}))
    (place / "covft_diagnosis.json").write_text(json.dumps(diagnosis()))
    log = [{"step": step, "loss": 3 - step / 10, "covft/expert_distance": step / 100} for step in (1, 5, 10)]
    for number, history in ((5, log[:2]), (10, log)):
        (place / f"checkpoint-{number}").mkdir()
        state = {"log_history": [*history, {"step": number, "eval_loss": float("nan")}]}
        (place / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps(state))
    return place


def diagnosis():
    """As `Diagnosis.save` writes it."""
    change = {"mean": -0.25, "low": -0.3, "high": -0.2}
    return {
        "verdict": {"words": HOSTILE, "reasons": ["They differ."], "layers": [2, 3], "experts": 2},
        "kinds": {"box": 1200, "caption": 40},
        "conflict": {
            "kinds": ["box", "caption"],
            "layers": [2, 3],
            "alignment": [*[[[1, 0.5], [0.5, 1]]] * 2, [[1, -0.12], [-0.12, 1]]],
            "low": [[[1, 0], [0, 1]]] * 3,
            "high": [[[1, None], [None, 1]]] * 3,
            "pair_p_values": [[1, 0.004], [0.004, 1]],
            "separation": [0.2, 0.8, 0.5],
            "p_values": [0.03, 0.002, 0.002],
        },
        "probe": {"steps": 10, "batch": 8, "alone": {"box": {"caption": change}}, "joint": {"box": change}},
        "not_measured": ["What longer training does."],
    }


@pytest.fixture(scope="module")
def page(folder):
    return write_report(folder)


def test_page_has_every_section_and_the_numbers(page):
    text = page.read_text(encoding="utf-8")
    titles = ["Diagnosis", "Settings", "Training", "Contexts", "Routing", "Attention", "Two questions"]
    assert re.findall(r"<h2[^>]*>([^<]+)", text) == titles
    assert "loss: from 2.9 at step 1 to 2 at step 10, lowest 2, highest 2.9" in text
    assert "3 clusters by k-means" in text
    assert "most at row 2 of 4, column 3 of 4; 25 % on class token and registers" in text
    assert "0.70, 0.30" in text
    cells = [
        "box and caption</th><td>−0.12</td><td>0.00 to unknown</td><td>0.004",
        "2</th><td class='heat' style='--w:25%'>0.200</td><td>0.030",
        "3</th><td class='heat' style='--w:100%'>0.800</td><td>0.002",
    ]
    cells += [
        "All kinds: p = 0.002",
        "box</th><td>caption</td><td>−0.250</td><td>−0.300 to −0.200",
        "layers=[2, 3], experts=2",
    ]
    assert all(cell in text for cell in cells)
    assert len(text) < 300_000


def test_page_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text.replace(HOSTILE, ""))
    assert "default-src 'none'" in text
    assert HOSTILE not in text


def test_page_works_in_a_browser(page, tmp_path):
    with browser(tmp_path) as tab:
        tab.window(1200)
        tab.open(page)
        assert tab.run("window.hacked") is None
        assert tab.run("document.querySelectorAll('#scatter circle[data-sample]').length") == COUNT
        assert tab.run("[...document.images].every(image => image.naturalWidth > 0)")

        # Hover, and the same by the keyboard.
        shown = "document.getElementById('shown').textContent"
        tab.point("#scatter circle[data-sample='7']")
        assert "Sample 8 (caption, cluster" in tab.run(shown)
        assert "question 7?" in tab.run(shown)
        assert tab.run("getComputedStyle(document.querySelector('#shown .thumb')).backgroundImage.length") > 100
        tab.run("document.getElementById('context-sample').focus()")
        tab.press("ArrowUp", 38)
        assert "Sample 9" in tab.run(shown)
        tab.run("document.getElementById('attention-layer').focus()")
        tab.press("ArrowLeft", 37)
        assert tab.run("document.querySelector('output[for=attention-layer]').textContent") == "2"
        visible = "[...document.querySelectorAll('.maps .over')].filter(map => map.offsetParent).length"
        assert tab.run(visible) == 2 + 1  # one per picture, and what moves; that layer has no attention compared
        first = "document.querySelector('.legend button')"
        tab.run(f"{first}.focus()")
        tab.press(" ", 32)
        assert tab.run(f"{first}.getAttribute('aria-pressed')") == "false"
        assert tab.run("document.querySelectorAll('#scatter .off').length") == COUNT / 3
        place = "document.querySelector('#scatter circle').getAttribute('cx')"
        before = tab.run(place)
        choose = "const s = document.getElementById('{}'); s.value = '{}'; s.dispatchEvent(new Event('change'))"
        tab.run(f"(() => {{ {choose.format('context-layer', 2)} }})()")
        assert tab.run(place) != before
        tab.run(f"(() => {{ {choose.format('kind', 'caption')} }})()")
        open_tables = "[...document.querySelectorAll('#weights > div')].filter(d => !d.hidden).map(d => d.dataset.kind)"
        assert tab.run(open_tables) == ["caption"]

        # Names for a screen reader.
        names = tab.names()
        said = [name for role, name in names if role == "slider"]
        assert said == ["Layer", "Layer"]
        assert ("combobox", "Colour") in names
        assert ("spinbutton", "Sample") in names
        assert all(name for role, name in names if role in ("img", "image", "button", "link", "slider", "combobox"))

        # Dark, and on a phone.
        light = tab.run("getComputedStyle(document.body).backgroundColor")
        tab.window(390, scheme="dark")
        assert tab.run("getComputedStyle(document.body).backgroundColor") != light
        assert tab.run("document.documentElement.scrollWidth") <= 390
        assert tab.problems == []
        assert tab.requests == [page.resolve().as_uri()]


def test_a_folder_may_have_less(tmp_path):
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "a": 1}, {"step": 2, "a": 1}]})
    )
    text = write_report(tmp_path, tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2[^>]*>([^<]+)", text) == ["Training"]
    same = Recording({1: np.full((4, 2), 0.5)}, {1: np.ones((4, 3))}, ("a",) * 4, (None,) * 4)
    same.save(tmp_path)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "All samples have the same context" in text
    assert "nothing to correlate" in text


def test_the_command_writes_the_page(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder), "--output", str(tmp_path / "page.html")])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to report"):
        write_report(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        write_report(tmp_path / "none")
    (tmp_path / "covft_diagnosis.json").write_text('{"verdict": {}}')
    with pytest.raises(CheckpointError, match="not a diagnosis"):
        write_report(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_report(tmp_path)

"""Guards `make versions`: floors, rows, results, the page and the workflow. tests/versions runs it."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.versions.floors import floors, normal, parts, project, requirements, version
from tests.versions.page import PAGE, page, results
from tests.versions.rows import FEATURES, ROWS, SLOW, WEIGHTS
from tests.versions.running import OUTCOMES, RESULTS, read, write

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = project()["optional-dependencies"]


# ------------------------------------------------------------------------------------------ floors


def test_floors_follow_extras_that_include_others():
    assert floors()["torch"] == "2.8"
    assert "timm" not in floors()
    assert set(floors()) < set(floors("transformers")) < set(floors("train")) < set(floors("all"))


def test_floors_are_the_highest_of_those_that_meet():
    assert version(floors()["numpy"]) < version(floors("train")["numpy"])
    assert floors("all")["numpy"] == floors("train")["numpy"]
    assert floors("all")["transformers"] == floors("train")["transformers"]


@pytest.mark.parametrize(
    ("text", "numbers"), [("1.26", (1, 26)), ("2.8.0+cpu", (2, 8)), ("4.57.1", (4, 57, 1)), ("5.24.0.dev0", (5, 24))]
)
def test_version(text, numbers):
    assert version(text) == numbers


@pytest.mark.parametrize(
    "extra", sorted(set(EXTRAS) - {"timm", "open-clip", "analysis", "metrics", "cli", "onnx", "flash", "docs"})
)
def test_every_extra_with_transformers_has_a_floor_for_it(extra):
    """Other libraries ask for it without one, or with one that is too low."""
    assert version(floors(extra)["transformers"]) >= version(floors("transformers")["transformers"])


def test_extras_are_named_as_the_metadata_names_them():
    """The wheel normalises names (PEP 685); pip before 23.3 finds an extra only under that name."""
    assert [extra for extra in EXTRAS if extra != normal(extra)] == []


def test_floors_of_one_package_differ_only_where_training_or_the_study_needs_more():
    found = {}
    for extra in EXTRAS:
        for name, floor in floors(extra).items():
            found.setdefault(name, set()).add(floor)
    several = {name for name, lowest in found.items() if len(lowest) > 1}
    assert several == {"transformers", "huggingface-hub", "numpy"}


def test_what_has_no_release_for_a_python_is_not_asked_for_there():
    [trl] = [requirement for requirement in requirements("dev") if parts(requirement)[0] == "trl"]
    assert "python_version >= '3.11'" in trl


# -------------------------------------------------------------------------------------------- rows


def test_modules_that_run_without_the_extra_train_import_none_of_its_libraries():
    """A row without them runs these; `pytest.importorskip` skips a test, or a module, that needs one."""
    libraries = {"accelerate", "peft", "trl", "datasets"}
    found = []
    for folder in {path for row in ROWS.values() if "train" not in row.features for path in row.tests()}:
        for file in (ROOT / folder).rglob("*.py") if (ROOT / folder).is_dir() else [ROOT / folder]:
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found += [f"{file.name}: {name}" for name in names if name.split(".")[0] in libraries]
    assert found == []


def test_every_floor_of_what_users_install_is_installed_by_a_row():
    """Each floor of the package and of each extra, and not only the higher ones of `[all]`."""
    declared = {
        (name, version(floor))
        for extra in (*parts(EXTRAS["all"][0])[1], None)
        for name, floor in floors(*filter(None, [extra])).items()
    }
    pinned = {
        (parts(pin)[0], version(parts(pin)[2])) for row in ROWS.values() if row.lowest for pin in row.constraints()
    }
    assert sorted(declared - pinned) == []


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_a_row_names_exists(row):
    assert set(row.extras) <= set(EXTRAS)
    assert set(row.features) <= set(FEATURES)
    paths = [*row.tests(), *(path.partition("::")[0] for path in [*SLOW, *row.without])]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [pin for pin in row.pins if not re.fullmatch(r"[\w.-]+==[\d.]+", pin)] == []


def test_weights_are_those_of_the_makefile():
    [line] = re.findall(r"^WEIGHTS +:= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert set(WEIGHTS) <= set(line.split())


# ----------------------------------------------------------------------------------------- results


def test_counts_of_a_report(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.nn.test_moe" name="test_a[1]"/>'
        '<testcase classname="tests.nn.test_moe.TestKind" name="test_b"><skipped/></testcase>'
        '<testcase classname="tests.test_config" name="test_c"><failure message="no"/></testcase>'
        '<testcase classname="" name="tests.nn.test_broken"><error message="collection"/></testcase>'
        "</testsuite></testsuites>"
    )
    counts, failures = read(report, ["tests/nn", "tests/test_config.py"])
    assert counts["tests/nn"] == dict(zip(OUTCOMES, (1, 1, 1), strict=True))
    assert counts["tests/test_config.py"] == dict(zip(OUTCOMES, (0, 1, 0), strict=True))
    assert failures == ["tests/nn/test_broken: tests.nn.test_broken", "tests/test_config: test_c"]


def test_a_results_file_is_replaced_in_one_step(tmp_path):
    write({"row": "lowest", "failures": []}, tmp_path)
    write({"row": "lowest", "failures": ["one"]}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lowest.json"]
    assert json.loads((tmp_path / "lowest.json").read_text())["failures"] == ["one"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_are_of_a_row_and_what_it_asks_for(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    row = ROWS[path.stem]
    assert result["row"] == row.name
    if result["tests"]:
        assert list(result["tests"]) == row.tests()
        installed = {parts(name)[0]: found for name, found in result["versions"].items()}
        pins = [parts(pin) for pin in row.constraints()]
        wrong = [name for name, _, pin in pins if name in installed and version(installed[name]) != version(pin)]
        assert wrong == [], "make versions runs the row again"


def test_the_page_is_what_the_results_give():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.versions --page writes it"


def test_a_failed_row_is_seen_on_the_page(tmp_path):
    folder = FEATURES["text"][0]
    result = {
        "row": "newest",
        "date": "2026-01-02",
        "versions": {"python": "3.10.1", "torch": "2.9.0", "transformers": "5.1.0"},
        "tests": {folder: dict(zip(OUTCOMES, (7, 2, 1), strict=True))},
        "failures": ["tests/text/test_hf: test_a"],
        "seconds": {},
    }
    write(result, tmp_path)
    text = page(results(tmp_path))
    cells = ["**2 failed**, 7 passed" if feature == "text" else "–" for feature in FEATURES]
    assert f"| 5.1.0 | 2.9.0 | 3.10.1 | {' | '.join(cells)} | 2026-01-02 |" in text
    assert "`newest` failed: `tests/text/test_hf: test_a`" in text
    assert f"`newest` is meant for Python {ROWS['newest'].python}; it ran on 3.10.1." in text


# ---------------------------------------------------------------------------------------- workflow


def test_the_workflow_runs_every_row_on_its_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "versions.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["versions"]
    matrix = job["strategy"]["matrix"]["include"]
    assert {entry["row"]: entry["python"] for entry in matrix} == {row.name: row.python for row in ROWS.values()}
    assert len(matrix) == len(ROWS)
    assert "make versions ROWS=${{ matrix.row }} PYTHON=python" in [step.get("run") for step in job["steps"]]
    assert set(workflow[True]) == {"schedule", "workflow_dispatch"}  # YAML reads the key `on` as true


def test_rows_use_pythons_that_the_package_names():
    named = {item.rpartition(" ")[2] for item in project()["classifiers"]}
    assert {row.python for row in ROWS.values()} <= named
    assert f">={min((row.python for row in ROWS.values()), key=version)}" == project()["requires-python"]

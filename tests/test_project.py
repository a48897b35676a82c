"""Guards the repository: versions, pins, make targets, files, tests, what CONTRIBUTING says."""

import ast
import re

import pytest
import yaml

import covft
from tests.helpers.project import PROJECT, ROOT, modules, project_files

# ------------------------------------------------------------------------------ versions and pins


def test_version_is_the_latest_of_the_changelog_and_of_the_citation():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[([^\]]+)\]", changelog, flags=re.M)
    assert headings[0] == "Unreleased"
    assert headings[1] == covft.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == covft.__version__


def test_citation_and_licence_agree_with_the_metadata():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert citation["references"][0]["title"].startswith("CoVFT:")


def test_extras_are_those_that_the_messages_name():
    extras = PROJECT["project"]["optional-dependencies"]
    promised = {"timm", "open-clip", "transformers", "sentence-transformers", "train", "analysis", "metrics", "cli"}
    assert promised | {"lmms-eval", "onnx", "flash", "study", "docs", "dev", "all"} == set(extras)
    [everything] = extras["all"]
    assert set(re.search(r"\[(.*)\]", everything)[1].split(",")) == promised


def test_every_pin_says_why():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    metadata = text[: text.index("[tool.")]
    pins = [line for line in metadata.splitlines() if re.search(r"\"[\w\-\[\]]+(>=|==|<)", line)]
    assert len(pins) > 15
    assert [line for line in pins if "#" not in line] == []


def test_ruff_is_the_same_everywhere():
    [pin] = [item for item in PROJECT["project"]["optional-dependencies"]["dev"] if item.startswith("ruff==")]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    [revision] = [repo["rev"] for repo in hooks["repos"] if "ruff" in repo["repo"]]
    assert revision == "v" + pin.removeprefix("ruff==")


def test_python_versions_agree():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    listed = [
        item.rpartition(" ")[2] for item in PROJECT["project"]["classifiers"] if re.search(r"Python :: 3\.\d", item)
    ]
    assert tested == listed
    assert PROJECT["project"]["requires-python"] == f">={listed[0]}"


# ------------------------------------------------------------------------------- README, Makefile


def make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.M)[1].split())


def test_makefile_has_the_promised_targets():
    assert {
        "help",
        "demo",
        "study",
        "test",
        "gpu",
        "check",
        "docs",
        "package",
        "versions",
        "real",
        "clean",
    } == make_targets()


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "tests/README.md",
        ".ci/run",
        *(str(path.relative_to(ROOT)) for path in (ROOT / ".github" / "workflows").glob("*.yml")),
    ],
)
def test_make_commands_that_are_named_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`|run: |::: |\|\s*)\s*make ([a-z]+)", text, flags=re.M)
    assert set(named) <= make_targets()


def test_readme_shows_both_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme


def test_readme_has_the_marks_of_the_demo_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("<!-- demo:start -->") == readme.count("<!-- demo:end -->") == 1


# ------------------------------------------------------------------------------------------- sdist


def test_sdist_takes_every_file_of_the_repository():
    """The tests read most of them, and an sdist brings the tests."""
    by_itself = {"pyproject.toml", "LICENSE", ".gitignore", "PKG-INFO"}  # hatchling takes these
    taken = {name.removeprefix("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    assert [name for name in sorted(taken) if not (ROOT / name).exists()] == []
    top = {path.relative_to(ROOT).parts[0] for path in project_files()}
    left_out = {".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__"}  # of a run without git
    assert sorted(top - taken - by_itself - left_out) == []


# ------------------------------------------------------------------------------------------- tests


def test_folders_of_tests_are_those_of_the_package_or_in_the_readme():
    readme = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    folders = {path.parts[1] for path in modules_of_tests() if len(path.parts) > 2}
    packages = {path.parent.name for path in (ROOT / "covft").glob("*/__init__.py")}
    assert packages <= folders
    assert [name for name in sorted(folders - packages) if f"`tests/{name}`" not in readme] == []


def test_no_test_module_imports_another_or_a_conftest():
    """A module that runs under two names has two copies of its state; helpers are in tests/helpers."""
    found = []
    for path in modules_of_tests():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                # What is imported from a package of tests may be a module.
                own = node.level > 0 or (node.module or "").partition(".")[0] == "tests"
                names = [node.module or "", *(alias.name for alias in node.names if own)]
            else:
                continue
            parts = {part for name in names for part in name.split(".")}
            found += [f"{path}: {part}" for part in sorted(parts) if part == "conftest" or part.startswith("test_")]
    assert found == []


def modules_of_tests():
    return sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))


# ------------------------------------------------------------------------------------ CONTRIBUTING


def contributing():
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_paths_that_contributing_names_exist():
    paths = re.findall(r"`((?:covft|docs|tests|study|examples|benchmarks|configs)/[\w./-]*)`", contributing())
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_tree_of_contributing_has_every_file_and_folder_of_the_package():
    [tree] = re.findall(r"^```text\n(covft/\n.*?)^```", contributing(), flags=re.M | re.DOTALL)
    listed = re.findall(r"^  (\S+)  ", tree, flags=re.M)
    parts = {path.relative_to(ROOT / "covft").parts for path in project_files() if path.is_relative_to(ROOT / "covft")}
    assert sorted(listed) == sorted({first + "/" * bool(rest) for first, *rest in parts})
    outside = re.findall(r"^(\S+)/  ", tree, flags=re.M)
    assert [name for name in outside if not (ROOT / name).is_dir()] == []


def test_import_order_of_contributing_is_that_of_the_linter():
    [order] = re.findall(r"^```text\n(cli\n.*?)^```", contributing(), flags=re.M | re.DOTALL)
    told = [set(re.findall(r"\w+", line.partition("  ")[0])) for line in order.splitlines()]
    [law] = [contract for contract in PROJECT["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"]
    present = modules()
    ruled = [set(re.findall(r"\w+", layer)) & present - {"__main__"} for layer in law["layers"]]
    assert told == [layer for layer in ruled if layer]


# -------------------------------------------------------------------------------------- repository


def test_no_large_file():
    large = [str(path.relative_to(ROOT)) for path in project_files() if path.stat().st_size > 5 * 1024**2]
    assert large == []


def lines_that_match(pattern):
    found = []
    for path in project_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if pattern.search(line)]
    return found


def test_no_path_of_a_machine():
    folders = "|".join(["work", "root", "tmp", "farm", "home"])
    assert lines_that_match(re.compile(rf"(^|[^A-Za-z0-9_.])/({folders})/")) == []


def test_no_host_of_a_registry():
    hosts = "|".join(["py" + "pi", "files.python" + "hosted", "registry.npm" + "js"])
    assert lines_that_match(re.compile(rf"({hosts})\.(org|com)", re.IGNORECASE)) == []

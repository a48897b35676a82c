"""Guards the package and the repository: cost of the import, public names, versions, files."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import covft

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it along where the standard library has none
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

HEAVY = [
    "accelerate",
    "datasets",
    "matplotlib",
    "onnx",
    "open_clip",
    "peft",
    "rich",
    "sentence_transformers",
    "skimage",
    "sklearn",
    "timm",
    "transformers",
    "typer",
]


def run_python(code, *flags):
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def project_files():
    """List the files that are, or would be, in the repository; without one, all files of the tree."""
    if (ROOT / ".git").exists():
        done = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        names = [ROOT / name for name in done.stdout.split("\0") if name]
    else:  # an unpacked sdist, perhaps inside the repository of something else
        left_out = {".venv", ".real", "site", "build", "dist"}
        names = [path for path in ROOT.rglob("*") if not left_out & set(path.relative_to(ROOT).parts)]
    files = [path for path in names if path.is_file()]
    assert len(files) > 20
    return files


# ------------------------------------------------------------------------------------------ import


def test_import_is_silent_and_warns_about_nothing():
    done = run_python("import covft", "-W", "error")
    assert done.stdout == ""
    assert done.stderr == ""


def test_import_brings_no_optional_library():
    code = f"import sys, covft; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.long
def test_import_changes_no_global_state():
    code = (
        "import os, random, sys, logging, torch\n"
        "def state(): return (dict(os.environ), random.getstate(), torch.random.get_rng_state().tolist(),\n"
        "    torch.get_num_threads(), torch.get_default_dtype(), logging.root.handlers[:], sys.path[:])\n"
        "before = state()\n"
        "import covft\n"
        # A class of transformers' trainer, whose import sets a variable of torch's compiler.
        "for name in set(covft.__all__) - {'CoVFTCallback'}: getattr(covft, name)\n"
        "print(before == state())"
    )
    assert run_python(code).stdout.strip() == "True"


@pytest.mark.long
def test_import_costs_less_than_half_of_torch_on_top():
    def seconds(module):
        code = f"from time import perf_counter as now; t = now(); import {module}; print(now() - t)"
        return float(run_python(code).stdout)

    seconds("torch")  # the first reads the files from the disk
    pairs = [(seconds("torch"), seconds("covft")) for _ in range(3)]
    torch_best, covft_best = (min(times) for times in zip(*pairs, strict=True))
    assert covft_best < 1.5 * torch_best


# ------------------------------------------------------------------------------------- public face


def test_all_is_sorted_and_resolves():
    assert list(covft.__all__) == sorted(covft.__all__)
    assert len(set(covft.__all__)) == len(covft.__all__)
    for name in covft.__all__:
        assert getattr(covft, name) is not None
    assert set(covft.__all__) <= set(dir(covft))


@pytest.mark.parametrize(
    "name", ["CoVFTCallback", "CoVFTConfig", "ContextEncoder", "attach", "describe", "errors", "load", "unwrap", "wrap"]
)
def test_face_offers(name):
    assert name in covft.__all__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        covft.no_such_name  # noqa: B018


def test_every_public_name_is_documented():
    directives = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        directives |= set(re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), flags=re.M))
    missing = []
    for name in covft.__all__:
        if name.startswith("__"):
            continue
        thing = getattr(covft, name)
        # A module is documented under its own name, a class or function under that of its module.
        path = getattr(thing, "__name__", name)
        path = path if path.startswith("covft.") else f"{thing.__module__}.{path}"
        if path not in directives and path.rpartition(".")[0] not in directives:
            missing.append(path)
    assert missing == []


def test_every_error_is_a_covft_error_and_documented():
    page = (ROOT / "docs" / "api" / "errors.md").read_text(encoding="utf-8")
    assert "::: covft.errors" in page
    for name in covft.errors.__all__:
        assert issubclass(getattr(covft.errors, name), covft.errors.CoVFTError)
        assert name in covft.errors.__doc__, f"{name} is missing in the tree of errors.py"


def test_package_is_marked_as_typed():
    assert (ROOT / "covft" / "py.typed").is_file()


def test_command_is_the_module_that_needs_no_extra():
    """`tests/test_cli.py` runs it without the libraries of the extra `cli`."""
    assert PROJECT["project"]["scripts"] == {"covft": "covft.__main__:main"}


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


def test_no_module_below_the_face_imports_it():
    """`covft/__init__.py` imports everything, so a module that imports a name from it makes a cycle.

    The command line is the exception: nothing imports it.
    """
    found = []
    for path in (ROOT / "covft").rglob("*.py"):
        if path.relative_to(ROOT / "covft").parts[0] in {"cli.py"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "covft":
                names = {alias.name for alias in node.names}
                found += [f"{path.relative_to(ROOT)}: {name}" for name in names - modules() - {"__version__"}]
    assert found == []


def test_private_names_of_torch_are_in_one_file():
    """They may change with any release, so `torch_internals.py` holds them, with self-checks."""
    own = ROOT / "covft" / "utils" / "torch_internals.py"
    private = re.compile(
        r"torch\._\w+[\w.]*|_CheckpointFrame|_current_graph_task_id|_current_level|_orig_mod|_checkpoint_wrapped_module"
        r"|\._(?:forward|backward|state_dict)_(?:pre_)?hooks\w*"
    )
    assert len(set(private.findall(own.read_text(encoding="utf-8")))) > 2
    found = {
        str(path.relative_to(ROOT)): set(private.findall(path.read_text(encoding="utf-8")))
        for path in (ROOT / "covft").rglob("*.py")
        if path != own
    }
    assert {name: names for name, names in found.items() if names} == {}


def modules():
    return {path.stem for path in (ROOT / "covft").iterdir() if path.suffix == ".py" or path.is_dir()}


# ------------------------------------------------------------------------- names in messages


def resolves(dotted):
    """Whether `covft.a.b` is a module, or an attribute of one."""
    found = covft
    for depth, part in enumerate(dotted.split(".")[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(dotted.split(".")[:depth]))
            except ImportError:
                return False
    return True


def test_every_name_of_covft_in_a_message_or_docstring_exists():
    assert resolves("covft.integrations.mllm.overrides.OVERRIDES")
    assert not resolves("covft.not_there")
    missing = []
    for path in (ROOT / "covft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?<![\w./-])covft(?:\.[A-Za-z_]\w*)+", node.value)
                missing += [f"{path.relative_to(ROOT)}: {name}" for name in named if not resolves(name)]
    assert missing == []

"""Guards the package: cost of the import, public names, private names, names in messages."""

import ast
import importlib
import re
import subprocess
import sys

import pytest

import covft
from tests.helpers.project import PROJECT, ROOT, modules

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


# -------------------------------------------------------------------------------- code


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

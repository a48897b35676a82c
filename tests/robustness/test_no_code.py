"""No call in the package runs what a file says, and every promise in docs/security.md has its test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import covft

PACKAGE = Path(covft.__file__).parent
ROOT = PACKAGE.parent
# Calls that run code, or unpickle it. `torch.load` is looked at by itself.
RUNS = {
    *("eval", "exec", "compile", "__import__", "execfile", "breakpoint"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "os.startfile"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "dill.load", "joblib.load"),
    *("yaml.load", "yaml.unsafe_load", "numpy.load", "np.load"),
    *("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"),
    *("runpy.run_path", "runpy.run_module", "urllib.request.urlopen", "requests.get"),
}
# By file: calls that run what the user has named on the command line.
THE_USERS = {
    "integrations/codebases/launch.py": {"runpy.run_path", "runpy.run_module"},
    "commands/evaluate.py": {"subprocess.Popen"},
}
# Where the caller's own choice is passed on.
THE_CALLERS = {"integrations/building/saved.py"}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def calls_of(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def problems(source: str, file: str = "") -> list[str]:
    """Calls that a file could use to run code."""
    found = []
    for node in calls_of(source):
        name, given = called(node), {keyword.arg: keyword.value for keyword in node.keywords}
        if name in RUNS - THE_USERS.get(file, set()):
            found.append(name)
        if name == "torch.load" and ast.unparse(given.get("weights_only", ast.Constant(None))) != "True":
            found.append("torch.load without weights_only=True")
        if any(ast.unparse(given.get(word, ast.Constant(False))) != "False" for word in ("shell", "allow_pickle")):
            found.append(f"{name} with shell or pickle")
        if "trust_remote_code" in given and ast.unparse(given["trust_remote_code"]) != "False":
            found.append(f"{name} with trust_remote_code")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    found += [] if ast.unparse(value) == "False" else ["a dict with trust_remote_code"]
    return [problem for problem in found if not (file in THE_CALLERS and problem.endswith("with trust_remote_code"))]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("file", FILES)
def test_no_call_runs_what_a_file_says(file):
    assert problems((PACKAGE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "os.system(command)",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=config['trust'])",
        "load(**{'trust_remote_code': True})",
    ],
)
def test_calls_that_would_run_code_are_found(source):
    assert problems(source)


@pytest.mark.parametrize(
    "source",
    ["torch.load(path, weights_only=True)", "model.eval()", "re.compile(text)", "load(name, trust_remote_code=False)"],
)
def test_harmless_calls_are_not(source):
    assert problems(source) == []


def test_only_the_caller_can_trust_code():
    """What `load_model` passes on is its own argument, whose default is False."""
    tree = ast.parse((PACKAGE / "integrations/building/saved.py").read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "load_model"]
    names, defaults = function.args.kwonlyargs, function.args.kw_defaults
    values = {argument.arg: default for argument, default in zip(names, defaults, strict=True)}
    assert ast.unparse(values["trust_remote_code"]) == "False"
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "trust_remote_code"]
    assert assigned
    assert all(isinstance(node.ctx, ast.Load) for node in assigned)


PROMISES = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "name"), PROMISES)
def test_every_promise_has_its_test(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    (test,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    marks = " ".join(map(ast.unparse, test.decorator_list))
    assert not re.search(r"mark\.(skip|xfail|slow|gpu|network)\b", marks)


def test_every_row_of_the_page_names_a_test():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| file |"))
    ]
    assert len(rows) == len(PROMISES) > 25

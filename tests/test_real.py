"""`tests/real`: its page is made from its results, and its commands are those of the guides of today."""

import ast
import importlib
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.real import guides, results
from tests.real.bench import Bench, StepFailed
from tests.real.engines import names
from tests.real.results import Result

ENGINES = Path(guides.__file__).with_name("engines")


def test_the_page_is_what_the_results_give():
    """After a change of the code that makes it: python -m tests.real --page."""
    assert results.PAGE.read_text(encoding="utf-8") == results.page(results.read())


def test_every_command_of_the_guides_is_the_one_that_ran():
    """After a change of a named block, its engine runs again: python -m tests.real ENGINE."""
    ran = [(result.engine, command) for result in results.read() for command in result.commands if "page" in command]
    changed = [
        f"{engine}: docs/{command['page']}, block {command['block']}"
        for engine, command in ran
        if guides.block(command["page"], command["block"]).text != command["text"]
    ]
    assert changed == []


@pytest.mark.parametrize("name", names())
def test_an_engine_has_what_the_frame_asks_for(name):
    engine = importlib.import_module(f"tests.real.engines.{name}")
    assert name in results.NAMES
    assert engine.__doc__.strip().endswith(".")
    assert engine.REQUIREMENTS
    assert all(isinstance(item, str) for item in engine.REQUIREMENTS)
    assert callable(engine.run)
    why = engine.missing()
    assert why is None or isinstance(why, str)


@pytest.mark.parametrize("name", names())
def test_the_blocks_that_an_engine_runs_are_in_the_guides(name):
    calls = [
        node
        for node in ast.walk(ast.parse((ENGINES / f"{name}.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"documented", "file"}
    ]
    assert calls, "no command of a guide is run"
    engine = importlib.import_module(f"tests.real.engines.{name}")
    for call in calls:
        page, block = (constant(argument, engine) for argument in call.args[:2])
        text = guides.block(page, block).text
        for replace in call.args[2:3]:
            guides.replaced(text, dict.fromkeys(keys(replace, engine), ""))


def constant(node, engine):
    """The value of a literal, or of a name of the engine's module; None for what is known at run time only."""
    if isinstance(node, ast.Name):
        return getattr(engine, node.id, None)
    return node.value if isinstance(node, ast.Constant) else None


def keys(node, engine):
    """What is replaced in the block, as far as the source says it."""
    if not isinstance(node, ast.Dict):
        return list(constant(node, engine) or {})
    found = [constant(key, engine) for key in node.keys if key is not None]
    unpacked = [constant(value, engine) for key, value in zip(node.keys, node.values, strict=True) if key is None]
    return [key for key in [*found, *(key for part in unpacked for key in part or {})] if key is not None]


def test_the_page_shows_what_failed():
    bad = Result("trl", "Trains.", "2026-01-31", "failed", "lost a | weight", {"trl": "1.16.0"})
    bad.commands.append({"title": "train", "command": ["x"], "seconds": 2.6, "page": "guides/trl.md"})
    bad.checks += [{"what": "reload", "holds": False, "value": "0.1"}, {"what": "saved", "holds": True, "value": ""}]
    page = results.page([bad])
    for line in [
        "| [TRL](#trl) | failed | 2 | 2026-01-31 | trl 1.16.0 |",
        "**Failed**: lost a \\| weight",
        "| train | [trl](guides/trl.md) | 3 |",
        "| reload | 0.1 | **no** |",
        "| saved |  | yes |",
    ]:
        assert line in page.splitlines()


def test_results_are_read_as_they_were_written(tmp_path):
    result = Result("trl", "Trains.", "2026-01-31", checks=[{"what": "é", "holds": True, "value": "1"}])
    result.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["trl.json"]
    assert results.read(tmp_path) == [result]


@pytest.fixture
def bench(tmp_path):
    return Bench(Path(sys.executable), tmp_path, Result("trl", "", ""), Console(quiet=True))


def test_a_step_runs_in_the_folder_and_is_recorded_without_paths(bench, tmp_path):
    (tmp_path / "here.txt").write_text("x")
    output = bench.call(
        "bash", "-c", f'ls {tmp_path}; echo $A; echo "$HF_HUB_OFFLINE" >&2', env={"A": "b"}, title="list"
    )
    assert output.split() == ["here.txt", "logs", "b", "1"]
    [command] = bench._result.commands
    assert command["title"] == "list"
    assert command["command"][2].startswith("ls .; echo")


def test_a_step_that_fails_shows_its_last_lines(bench):
    with pytest.raises(StepFailed, match=r"(?s)try: exit status 3\n.*no such model"):
        bench.call("bash", "-c", "echo no such model; exit 3", title="try")
    with pytest.raises(StepFailed, match="over 0 s"):
        bench.call("python", "-c", "import threading; threading.Event().wait(60)", title="wait", limit=0.1)


def test_a_step_that_has_to_fail_gives_its_output(bench):
    assert bench.refused("bash", "-c", "echo not like this; exit 2", title="wrong") == "not like this\n"
    with pytest.raises(StepFailed, match="though it had to fail"):
        bench.refused("bash", "-c", "exit 0", title="right")


def test_what_is_replaced_has_to_be_in_the_block():
    assert guides.replaced("a --steps 100", {"100": "2"}) == "a --steps 2"
    with pytest.raises(LookupError, match="--epochs"):
        guides.replaced("a --steps 100", {"--epochs": "2"})

"""A new option is one field of `CoVFTConfig`: wrap, attach, launchers, examples and the command line take it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import covft

pytestmark = pytest.mark.long
ROOT = Path(covft.__file__).parents[1]
FIELD = "    made_up: int = _option(3)\n"
AFTER = "    feature_layer: int | None = _option(None, changes_model=False, least=None)\n"

CHECKS = {
    "wrap": """
        encoder = covft.wrap(ToyViT(), 4, made_up=5)
        assert encoder.covft_config.made_up == 5
        assert covft.wrap(ToyViT(), 4).covft_config.made_up == 3
    """,
    "wrap's signature": """
        for function in (covft.wrap, covft.attach):
            shown = inspect.signature(function).parameters["made_up"]
            assert (shown.default, shown.annotation) == (3, int), shown
    """,
    "wrap's errors": """
        for wrong in (0, 1.5, "5", True):
            try:
                covft.wrap(ToyViT(), 4, made_up=wrong)
            except covft.errors.ConfigError as error:
                assert f"made_up={wrong!r} cannot be used." in str(error), error
            else:
                raise AssertionError(f"made_up={wrong!r} was accepted")
    """,
    "attach": """
        tiny = covft.testing.tiny_llava()
        model = covft.attach(tiny.model, covft.testing.HashTextEncoder(8), tokenizer=tiny.tokenizer, made_up=5)
        assert covft.get_encoder(model).covft_config.made_up == 5
    """,
    "a saved folder": """
        vit = ToyViT()
        base = copy.deepcopy(vit)
        covft.wrap(vit, 4, made_up=5).save_pretrained(folder)
        assert json.loads((folder / "covft_config.json").read_text())["covft"]["made_up"] == 5
        assert "| `made_up` | `5` |" in (folder / "README.md").read_text()
        assert covft.load(folder, base, 4).covft_config.made_up == 5
    """,
    "a folder saved before": """
        vit = ToyViT()
        base = copy.deepcopy(vit)
        covft.wrap(vit, 4).save_pretrained(folder)
        config = json.loads((folder / "covft_config.json").read_text())
        del config["covft"]["made_up"]
        (folder / "covft_config.json").write_text(json.dumps(config))
        assert covft.load(folder, base, 4).covft_config.made_up == 3
    """,
    "the launchers": """
        from covft.integrations.codebases.launch import parse

        assert parse("covft.llava", ["--covft_made_up", "5", "--", "train.py"]).settings == {"made_up": 5}
        assert parse("covft.llava", ["--covft_made_up=5", "--", "train.py"]).arguments == []
        assert parse("covft.llava", ["--", "train.py"]).settings == {}
    """,
    "the command line": """
        from typer.testing import CliRunner
        from covft.cli import app

        shown = CliRunner().invoke(app, ["describe", "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0 and "--made-up" in shown.output, shown.output
        found = CliRunner().invoke(app, ["describe", "timm:test_vit", "--made-up", "5", "--json"])
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["config"]["made_up"] == 5
    """,
}
RUNNER = """
import copy, inspect, json, pathlib, sys, tempfile, textwrap, traceback
import covft, covft.testing
from covft.testing import ToyViT

assert covft.__file__.startswith(sys.argv[1]), covft.__file__
errors = {}
for name, code in json.load(sys.stdin).items():
    with tempfile.TemporaryDirectory() as folder:
        try:
            exec(textwrap.dedent(code), {**globals(), "folder": pathlib.Path(folder)})
        except BaseException:
            errors[name] = traceback.format_exc()
pathlib.Path(sys.argv[1], "errors.json").write_text(json.dumps(errors))
"""
SCRIPTS = ["examples/llava/finetune.py", "examples/internvl/finetune.py"]


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the package and the examples, with one more field in the settings."""
    root = tmp_path_factory.mktemp("one_field")
    for name in ("covft", "examples"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    config = root / "covft" / "config.py"
    source = config.read_text(encoding="utf-8")
    assert source.count(AFTER) == 1
    config.write_text(source.replace(AFTER, AFTER + FIELD), encoding="utf-8")
    return root


def run(root, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def errors(changed):
    """The tracebacks of what fails in the copy, by name."""
    run(changed, "-c", RUNNER, str(changed), input=json.dumps(CHECKS))
    return json.loads((changed / "errors.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CHECKS)
def test_one_field__reaches(name, errors):
    assert name not in errors, errors[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_field__reaches_the_example(script, changed):
    assert "--made_up" in run(changed, script, "--help")

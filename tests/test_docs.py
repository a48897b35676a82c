"""Every block of Python in README.md, CONTRIBUTING.md and docs/ runs, and links and figures are right.

The blocks of a page are one program, run from top to bottom in an empty folder. A block that cannot run here
says why in its title, which readers see, and is compiled instead:

    ```python title="downloads a model"
"""

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

# Why a block is not run, and what has to be in it for that to be true.
NOT_RUN = {
    "downloads a model": re.compile(r"from_pretrained\(|load_model\(|SentenceTransformer\(\"|wrap\(\w+, \"[\w./-]+\""),
    "needs an account on a hub": re.compile(r"push_to_hub\("),
    "needs onnxruntime": re.compile(r"import onnxruntime"),
    "needs torchao": re.compile(r"from torchao"),
    "needs a compiler": re.compile(r"torch\.compile\("),
}

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", flags=re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    line: int
    info: str
    code: str

    @property
    def is_python(self):
        return self.info.split(" ")[0].lower() in {"python", "py", "python3", "pycon"}

    @property
    def not_run(self):
        title = re.fullmatch(r"python title=\"(.*)\"", self.info)
        return title and title[1]


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, m.start()) + 2, m["info"].strip(), textwrap.dedent(m["body"]))
        for m in FENCE.finditer(text)
    ]


def python_blocks(page):
    return [block for block in blocks(page) if block.is_python]


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Run in an empty folder, and restore the settings that a page may change."""
    from covft.adapters import registry
    from covft.tuning import registry as methods
    from study.data.tasks import TASKS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(methods, "_registered", dict(methods._registered))
    grad, threads, tasks = torch.is_grad_enabled(), torch.get_num_threads(), dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(tasks)
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)


def checked(code):
    """Return the code with each `print(x)  # y` replaced by a check that x prints as y."""
    return re.sub(r"^( *)print\((.*)\)  # (.*)$", r"\1_printed(r'''\3''', \2)", code, flags=re.MULTILINE)


def printed(expected, *values):
    assert " ".join(map(str, values)) == expected


# Pages about a library that takes long, and warns of its own code; skipped where it is not installed.
LONG = {"lightning.md": "lightning"}
SECONDS = ("guides/tune.md", "guides/trainer.md", "guides/analysis.md")  # whose code takes some


def pages_with_code():
    for page in PAGES:
        if python_blocks(page):
            marks = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")] if page.name in LONG else []
            marks += [pytest.mark.long] * name_of(page).endswith(SECONDS)
            yield pytest.param(page, marks=marks, id=name_of(page))


@pytest.mark.parametrize("page", list(pages_with_code()))
def test_code_of_the_page_runs(page, reader, capsys):
    if page.name in LONG:
        pytest.importorskip(LONG[page.name], reason=f"{LONG[page.name]} is not installed")
    namespace = {"__name__": "__docs__", "_printed": printed}
    ran = 0
    for block in python_blocks(page):
        code = compile("\n" * (block.line - 1) + checked(block.code), name_of(page), "exec")
        if not block.not_run:
            exec(code, namespace)
            ran += 1
    # What the pages of models download, tests/examples/test_model_pages.py has as small folders.
    assert ran or page.parent.name == "models", "none of the code of this page runs"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_labelled(page):
    for block in blocks(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.info, f"{where}: a block without a language"
        if not block.is_python or block.info == "python":
            continue
        assert block.not_run in NOT_RUN, f"{where}: {block.info!r}"
        assert NOT_RUN[block.not_run].search(block.code), f"{where}: not true of this block"


def test_the_runner_sees_a_wrong_comment():
    exec(checked("print(1 + 1)  # 2\n"), {"_printed": printed})
    with pytest.raises(AssertionError):
        exec(checked("print(1 + 1)  # 3\n"), {"_printed": printed})


def test_the_runner_sees_a_broken_block(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\n- item\n\n    ```python\n    y = x / 0\n    ```\n")
    first, second = python_blocks(page)
    assert (first.code, second.code, second.line) == ("x = 1\n", "y = x / 0\n", 10)
    namespace = {}
    exec(first.code, namespace)
    with pytest.raises(ZeroDivisionError):
        exec(second.code, namespace)


# ------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("#"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve()
        assert file.is_file(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)}: {target}"


def anchors(page):
    """Return the ids that mkdocs gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=Loader)

    def leaves(entry):
        if isinstance(entry, str):
            return {entry}
        items = entry.values() if isinstance(entry, dict) else entry
        return {leaf for item in items for leaf in leaves(item)}

    assert leaves(config["nav"]) == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


# ----------------------------------------------------------------------------------------- install

BY_NAME = re.compile(r"pip install(?! -e)[^\n`]*[\s\"']covft(?![\w\[/.])")


def test_nothing_says_to_install_a_release_that_does_not_exist():
    """`covft[extra]` adds an extra to an installed covft; by its name, an index would give something else.

    With the first release: the quickstart and the README name the distribution, and this test goes.
    """
    files = [*PAGES, *(ROOT / "covft").rglob("*.py")]
    assert [name_of(file) for file in files if BY_NAME.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("text", ["pip install covft", "pip install ms-swift covft", 'pip install -U "covft>=1"'])
def test_an_install_by_name_is_seen(text):
    assert BY_NAME.search(text)


@pytest.mark.parametrize("text", ['pip install "covft[cli]"', "pip install -e covft", "pip install ../covft/x.whl"])
def test_an_install_of_a_file_or_an_extra_is_not(text):
    assert not BY_NAME.search(text)


def test_every_extra_that_the_text_names_exists():
    named = set()
    for file in [*PAGES, *(ROOT / "covft").rglob("*.py")]:
        for extras in re.findall(r"pip install[^\n`]*?(?:covft|\.)\[([\w,-]+)\]", file.read_text(encoding="utf-8")):
            named |= set(extras.split(","))
    quickstart = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| extra \| for \|\n(.*?)\n\n", quickstart, flags=re.M | re.DOTALL)[0]
    listed = {extra for row in table.splitlines() for extra in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", section, flags=re.M))
    assert {"cli", "train"} <= named <= extras
    assert listed == extras - {"dev", "docs"}


# ----------------------------------------------------------------------------------------- figures


def clip_block(**settings):
    """Count parameters of an FFN and an adapted block of CLIP-L with BERT's features, on the meta device."""
    from torch import nn

    from covft.nn import ContextualMoE

    with torch.device("meta"):
        ffn = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
        moe = ContextualMoE(ffn, embed_dim=1024, text_dim=768, **settings)
    return sum(p.numel() for p in ffn.parameters()), sum(p.numel() for p in moe.parameters())


def test_the_parameter_counts_of_the_faq_are_true():
    ffn, block = clip_block()
    faq = (DOCS / "faq.md").read_text(encoding="utf-8")
    for figure in [ffn, 4 * ffn, block, 12 * block, 12 * (block - ffn)]:
        assert f"{figure:,}" in faq
    assert (block, 12 * block, 12 * (block - ffn)) == (43_485_188, 521_822_256, 421_097_520)


@pytest.mark.parametrize(("page", "known"), [("README.md", {"43,485,188", "0.98"}), ("docs/index.md", {"8.35", "789"})])
def test_costs_on_the_first_pages_are_figures_of_the_others(page, known):
    text = (ROOT / page).read_text(encoding="utf-8")
    [costs] = re.findall(r"^## What it costs\n(.*?)^(?:`covft describe|## )", text, flags=re.M | re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", costs)
    figures = re.findall(r"\d[\d.,]*\d", text)
    pages = [(DOCS / page).read_text(encoding="utf-8") for page in ("faq.md", "speed/index.md")]
    assert known <= set(figures)
    assert [figure for figure in figures if not any(figure in page for page in pages)] == []


def test_every_error_that_the_text_names_exists():
    import covft

    named = {name for page in PAGES for name in re.findall(r"`(\w+Error)`", page.read_text(encoding="utf-8"))}
    assert len(named) > 4
    assert named <= set(covft.errors.__all__)


def test_every_setting_that_the_text_names_exists():
    import inspect

    import covft

    known = {*inspect.signature(covft.wrap).parameters, *inspect.signature(covft.load).parameters}
    known |= {*inspect.signature(covft.attach).parameters, *inspect.signature(covft.CoVFTCallback).parameters}
    known |= {field.name for field in dataclasses.fields(covft.integrations.MLLMTrainingArguments)}
    known |= {"index", "use_reentrant", "preserve_rng_state", "attn_implementation", "fullgraph", "title", "max_length"}
    faces = (
        covft.data.Collator,
        covft.data.ImageFolder,
        covft.data.ImageDecoder,
        covft.data.DatasetsRows,
        covft.load_model,
    )
    faces += (covft.data.PadToSquare, covft.data.NoTiling, covft.analysis.record, covft.diagnose)
    faces += (covft.merge, covft.export, covft.TrunkCache, covft.Chat)
    faces += (covft.tune, covft.tuning.Change, covft.match, *covft.tuning.methods().values())
    known |= {name for face in faces for name in inspect.signature(face).parameters}
    known |= {
        "PRED_FORMAT",
        "modules_to_save",
        "weights_only",
        "exclude_modules",
        "target_modules",
        "state_dict",
        "ckpt_path",
        "precision",
        "data_files",
        "EVAL_FORMAT",
        "REAL_ARGS",
    }  # of others
    pages = [FENCE.sub("", page.read_text(encoding="utf-8")) for page in PAGES]
    named = {name for text in pages for name in re.findall(r"`(?:[^`]*[ (,])?(\w+)=[^`=]*`", text)}
    assert len(named) > 8
    assert named - known == set()

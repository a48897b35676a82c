"""Vision towers of transformers from their real configs: one of every kind here, all of them among the slow tests."""

from __future__ import annotations

import json

import pytest
import torch

import covft
from benchmarks.coverage import page
from benchmarks.coverage.transformers_cases import all_cases, build
from benchmarks.coverage.transformers_configs import DEPTH, WIDTH, small_config
from benchmarks.coverage.transformers_models import run
from covft.errors import UnknownViTError, UnsupportedViTError

# By what makes it a kind of its own: class and layouts of the tokens at its FFNs.
KINDS = {
    "plain": ("CLIPVisionModel", ["BND"]),
    "renamed in its files": ("BeitModel", ["BND"]),
    "two halves, the residual in the second": ("YolosModel", ["BND"]),
    "two halves, the residual outside": ("TimesformerModel", ["BND"]),
    "rows and columns": ("SamVisionModel", ["BND"]),
    "stages": ("SwinModel", ["BND"]),
    "further arguments": ("SegformerModel", ["BND"]),
    "channels first": ("SwiftFormerModel", ["BCHW"]),
    "pixel positions are rows": ("MobileViTModel", ["(BP)ND"]),
    "windows are rows": ("RfDetrDinov2Backbone", ["(BP)ND"]),
    "frames are rows": ("VideoPrismVisionModel", ["(BP)ND"]),
    "padded": ("Gemma4VisionModel", ["BND"]),
    "tiles": ("MllamaVisionModel", ["BND"]),
    "packed": ("Kimi_K25VisionModel", ["TD"]),
    "packed, with a class token for each": ("Inkling2VisionModel", ["TD"]),
    "packed below an axis of one, merged on the way": ("MiniCPMV4_6VisionModel", ["1TD"]),
    "a tower in a larger model": ("SamModel", ["BND"]),
    "a model of timm": ("TimmWrapperModel", ["BND"]),
}
REFUSED = {
    "BridgeTowerVisionModel": "the parts of their FFN one by one",
    "EdgeTamVisionModel": "no attention",
    "InklingVisionModel": "no attention",
    "LevitModel": "there are no blocks",
    "SegGptModel": "rows of one batch",
    "TableTransformerModel": "a convnet",
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_one_of_every_kind(kind):
    name, layouts = KINDS[kind]
    result = run(name)
    assert (result.verdict, result.reason) == ("wrapped", "")
    assert result.layouts == layouts
    assert result.num_blocks > 0
    assert result.change < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_wrapped_says_why(name):
    with pytest.raises((UnknownViTError, UnsupportedViTError), match=REFUSED[name]):
        covft.wrap(build(name), 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in all_cases() if name not in REFUSED])
def test_every_class(name):
    result = run(name)
    assert (result.verdict, result.reason) == ("wrapped", "")


def test_the_results_are_of_all_classes():
    found = {result["class_name"]: result["verdict"] for result in page.read("transformers")}
    assert found.keys() == all_cases().keys()
    assert {name for name, verdict in found.items() if verdict != "wrapped"} == REFUSED.keys()


@pytest.mark.parametrize("name", ["MiniCPMV4_6VisionModel", "Inkling2VisionModel"])
def test_packed__the_tokens_of_each_image(name):
    """The check is about the right tokens: those that the tower's own attention keeps apart."""
    vit = build(name)
    lengths = []
    for number in range(3):
        args, kwargs = all_cases()[name][2].inputs(vit, [number])
        lengths.append([])
        handles = [
            vit.get_submodule(block.mlp_path).register_forward_pre_hook(
                lambda _, args, seen=lengths[-1]: seen.append(args[0].shape[-2])
            )
            for block in covft.describe(vit).blocks
        ]
        with torch.no_grad():
            vit(*args, **kwargs)
        for handle in handles:
            handle.remove()
    encoder = covft.wrap(vit, 16, layers=range(DEPTH))
    args, kwargs = all_cases()[name][2].inputs(vit, [0, 1, 2])
    found = []
    for slot in encoder.slots().values():
        route = slot.route

        def watched(*given, route=route, **named):
            found.append(named["segments"].lengths)
            return route(*given, **named)

        slot.route = watched
    with torch.no_grad():
        encoder(*args, torch.randn(3, 16), **kwargs)
    assert found == [tuple(seen[layer] for seen in lengths) for layer in range(DEPTH)]
    assert len({sum(each) for each in found}) == (2 if name.startswith("Mini") else 1)


# What makes them small.


def test_small_config__by_name_and_by_what_is_given():
    from transformers import CLIPVisionConfig, SamConfig, SwinConfig

    config = small_config(CLIPVisionConfig, hidden_act="gelu")
    assert (config.hidden_size, config.num_hidden_layers, config.hidden_act) == (WIDTH, DEPTH, "gelu")
    swin = small_config(SwinConfig)
    assert (swin.embed_dim, swin.depths) == (16 * swin.num_heads[0], (1, 1, 1, 1))
    sam = small_config(SamConfig, vision_config__output_channels=8)
    assert (sam.vision_config.hidden_size, sam.vision_config.output_channels) == (WIDTH, 8)


# What is made of the results.


def found(name, verdict="wrapped", **more):
    known = {"name": name, "class_name": "ViT", "verdict": verdict, "reason": "", "layouts": ["BND"], "num_blocks": 3}
    return {**known, **more}


def test_page__groups_what_is_alike():
    reason = "ViT cannot be wrapped: it has no\nattention.\n  Expected: a ViT\n  Fix:      another"
    rows = page.group(
        [
            found("b"),
            found("d", "refused", reason=reason, layouts=[], num_blocks=0),
            found("a", num_blocks=5),
            found("c", class_name="Swin", layouts=["BND", "(BP)ND"]),
            {"name": "e", "library": "timm", "verdict": "no attention"},
        ]
    )
    assert [(row["class_name"], row["verdict"], row["models"], row["blocks"]) for row in rows] == [
        ("Swin", "wrapped", ["c"], [3, 3]),
        ("ViT", "wrapped", ["a", "b"], [3, 5]),
        ("ViT", "refused", ["d"], [0, 0]),
    ]
    assert rows[2]["reason"] == "it has no attention."


def test_page__is_written_from_what_there_is(tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    (results / "versions.json").write_text(json.dumps({"timm": "9.9"}))
    lines = [
        found("big"),
        found("vit", num_blocks=2),
        found("x|y", "refused", reason="ViT cannot be wrapped: a <b>|c."),
    ]
    (results / "timm.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [found("vit", "failed"), *lines]))
    for name, value in {"RESULTS": results, "FILE": tmp_path / "c.json", "PAGE": tmp_path / "c.md"}.items():
        monkeypatch.setattr(page, name, value)
    monkeypatch.setattr("covft.adapters.coverage.FILE", tmp_path / "c.json")
    page.write()
    text = (tmp_path / "c.md").read_text()
    assert "## timm 9.9\n\n3 models with attention: 2 wrapped, 1 refused." in text
    assert "| ViT | 2 | `big` | 2 to 3 | `BND` |" in text
    assert "| ViT | 1 | `x|y` | refused: a &lt;b>\\|c. |" in text
    assert "transformers 5" not in text
    assert json.loads((tmp_path / "c.json").read_text()).keys() == {"timm"}


def test_page__the_package_and_the_docs_have_the_results():
    table = json.loads(page.FILE.read_text())
    for library in table:
        assert table[library]["rows"] == page.group(page.read(library))
        assert f"## {library} {table[library]['version']}" in page.PAGE.read_text()

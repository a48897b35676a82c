"""The method of the page about methods of one's own, in a package with an entry point."""

import re
from pathlib import Path

import timm
import torch

import covft

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "own.md"


def test_a_package_brings_a_method(tmp_path, monkeypatch):
    text = PAGE.read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.DOTALL)[0]
    [names] = re.findall(r"^```toml\n(.*?)^```", text, flags=re.M | re.DOTALL)
    assert sum(bool(line.strip()) for line in code.partition("class Adapter")[2].splitlines()) < 20
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "tuning.py").write_text(code)
    installed = tmp_path / "my_package-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    group = re.sub(r'\[project\.entry-points\."(.*)"\]', r"[\1]", names).replace('"', "")
    (installed / "entry_points.txt").write_text(group)
    monkeypatch.syspath_prepend(tmp_path)

    assert "adapter" in covft.tuning.methods()
    vit = timm.create_model("test_vit").eval()
    images = torch.rand(2, 3, 160, 160)
    plain = vit(images)
    tuned = covft.tune(vit, "adapter", inner=4)
    assert torch.equal(tuned(images), plain)
    assert sum(p.numel() for p in tuned.trainable_parameters()) == 6 * (2 * 64 * 4 + 4 + 64)
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.normal_(std=0.1)
    changed = tuned(images)
    assert not torch.allclose(changed, plain)
    tuned.save_pretrained(tmp_path / "saved")
    again = covft.load(tmp_path / "saved", vit=covft.untune(tuned))
    assert type(again.method).__module__ == "my_package.tuning"
    assert torch.equal(again(images), changed)
    assert torch.equal(covft.untune(again)(images), plain)

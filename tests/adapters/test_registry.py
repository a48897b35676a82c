"""Which adapter knows a model, and how third parties add theirs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import covft
from covft.adapters import ViTFamily, describe, list_adapters, register_adapter, registry
from covft.errors import ConfigError, UnknownViTError, UnsupportedViTError


class HomeBlock(nn.Module):
    """A block with names of its own, in an order of its own."""

    def __init__(self, width):
        super().__init__()
        self.pre = nn.LayerNorm(width)
        self.mixer = nn.MultiheadAttention(width, 2, batch_first=True)
        self.post = nn.LayerNorm(width)
        self.dense = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x):
        y = self.pre(x)
        x = x + self.mixer(y, y, y, need_weights=False)[0]
        return x + self.dense(self.post(x))


class HomeViT(nn.Module):
    """A ViT of a library that covft has never heard of."""

    def __init__(self, width=8, depth=3):
        super().__init__()
        self.patchify = nn.Conv2d(3, width, 8, 8)
        self.stages = nn.ModuleList(HomeBlock(width) for _ in range(depth))

    def forward(self, images):
        x = self.patchify(images).flatten(2).mT
        for block in self.stages:
            x = block(x)
        return x


# What a third party writes, in full.
HOME = ViTFamily(
    name="home",
    classes=(f"{HomeViT.__module__}.HomeViT",),
    library="homelib",
    blocks="stages",
    mlp="dense",
    prefix_tokens=(0,),
)


class FakeEntryPoint:
    def __init__(self, loaded):
        self.loaded = loaded

    def load(self):
        return self.loaded


def installed(monkeypatch, entry_points):
    # The registry's own view alone: other libraries read entry points while they are imported.
    monkeypatch.setattr(registry, "metadata", SimpleNamespace(entry_points=entry_points))


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """Tests register freely; neither they nor installed packages reach the next test."""
    monkeypatch.setattr(registry, "_registered", {})
    installed(monkeypatch, lambda *, group: [])


@pytest.fixture
def entry_points(monkeypatch):
    def install(*loaded):
        points = {"covft.adapters": [FakeEntryPoint(adapter) for adapter in loaded]}
        installed(monkeypatch, lambda *, group: points.get(group, []))

    return install


def assert_home(spec):
    assert (spec.library, spec.class_name, spec.depth, spec.input.prefix_tokens) == ("homelib", "HomeViT", 3, 0)
    assert [block.path for block in spec.blocks] == ["stages.0", "stages.1", "stages.2"]
    assert {(b.mlp, b.embed_dim, b.ffn_dim, b.norms) for b in spec.blocks} == {("dense", 8, 24, ("pre", "post"))}


def test_a_model_that_nobody_knows_is_refused_with_the_way_out():
    with pytest.raises(UnknownViTError, match="HomeViT") as caught:
        describe(HomeViT())
    assert "ViTFamily(" in caught.value.fix
    assert "timm/vision_transformer, open_clip/vision_transformer" in caught.value.known


def test_a_registered_adapter_is_asked():
    assert register_adapter(HOME) is HOME
    assert_home(describe(HomeViT()))
    assert_home(covft.describe(HomeViT()))


def test_registered_adapters_are_asked_before_the_built_in_ones():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("test_vit")
    assert describe(vit).library == "timm"
    register_adapter(ViTFamily(name="mine", classes=("timm.models.",), library="mine", prefix_tokens=(1,)))
    assert list_adapters()[0].name == "mine"
    assert describe(vit).library == "mine"


def test_an_adapter_at_the_call_is_asked_and_not_kept():
    assert_home(describe(HomeViT(), HOME))
    assert_home(covft.wrap(HomeViT(), 4, adapter=HOME).spec)
    with pytest.raises(UnknownViTError):
        describe(HomeViT())


def test_an_adapter_at_the_call_overrules_the_registry():
    register_adapter(HOME)
    other = ViTFamily(name="other", classes=HOME.classes, library="other", blocks="stages", mlp="dense")
    assert describe(HomeViT(), other).library == "other"


@pytest.mark.parametrize("kind", ["instance", "class"])
def test_an_installed_package_adds_an_adapter(entry_points, kind):
    class HomeAdapter:
        name = "home/package"

        def matches(self, vit):
            return HOME.matches(vit)

        def describe(self, vit):
            return HOME.describe(vit)

    entry_points(HomeAdapter if kind == "class" else HomeAdapter())
    assert_home(describe(HomeViT()))
    names = [adapter.name for adapter in list_adapters()]
    assert names.index("home/package") < names.index("timm/vision_transformer")


def test_entry_points_of_other_groups_are_not_touched(monkeypatch):
    asked = []
    installed(monkeypatch, lambda *, group: asked.append(group) or [])
    list_adapters()
    assert set(asked) == {"covft.adapters"}


def test_a_name_is_given_once(entry_points):
    register_adapter(HOME)
    with pytest.raises(ConfigError, match="'home' is registered already"):
        register_adapter(HOME)
    with pytest.raises(ConfigError, match="'timm' is registered already"):
        register_adapter(ViTFamily(name="timm", classes=("a.B",), library="a"))
    entry_points(ViTFamily(name="package", classes=("a.B",), library="a"))
    with pytest.raises(ConfigError, match="'package' is registered already"):
        register_adapter(ViTFamily(name="package", classes=("c.D",), library="c"))
    assert len({adapter.name for adapter in list_adapters()}) == len(list_adapters())


@pytest.mark.parametrize("left_out", ["name", "matches", "describe"])
def test_what_is_no_adapter_is_refused(left_out):
    parts = {"name": "half", "matches": HOME.matches, "describe": HOME.describe}
    del parts[left_out]
    half = type("Half", (), parts)()
    with pytest.raises(ConfigError, match="Half is not an adapter") as caught:
        register_adapter(half)
    assert caught.value.got == f"no {left_out}"
    assert half not in list_adapters()


def test_subclasses_count_and_namesakes_do_not():
    class Derived(HomeViT):
        pass

    assert HOME.matches(Derived())
    namesake = type("HomeViT", (nn.Module,), {"__module__": "elsewhere"})
    assert not HOME.matches(namesake())
    package = ViTFamily(name="p", classes=("pack.age.",), library="p")
    assert package.matches(type("X", (nn.Module,), {"__module__": "pack.age.deep"})())
    assert not package.matches(type("X", (nn.Module,), {"__module__": "pack.ageing"})())


def test_a_described_model_works_like_any_other():
    register_adapter(HOME)
    vit = HomeViT().eval()
    images, text = torch.randn(2, 3, 16, 16), torch.randn(2, 4)
    with torch.no_grad():
        start = vit(images)
        encoder = covft.wrap(vit, 4, layers=(0, 2), experts=2)
        torch.testing.assert_close(encoder(images, text), start, rtol=1e-5, atol=1e-6)
        for parameter in encoder.trainable_parameters():
            parameter += torch.randn_like(parameter) * 0.3
        assert not torch.allclose(encoder(images, text), encoder(images, text.flip(0)), atol=1e-4)
    encoder(images, text).square().mean().backward()
    assert all(p.grad is not None for p in encoder.trainable_parameters())
    with torch.no_grad():
        assert torch.equal(covft.unwrap(encoder)(images), start)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"blocks": "layers"}, "HomeViT has no blocks at 'layers'"),
        ({"blocks": "stages", "mlp": "ffn"}, "Block stages.0 has no FFN"),
        ({"blocks": "stages", "mlp": "pre"}, "The FFN of block stages.0 has no linear layers"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(given, problem):
    family = ViTFamily(name="wrong", classes=HOME.classes, library="homelib", **given)
    with pytest.raises(UnsupportedViTError, match=problem):
        describe(HomeViT(), family)


def test_entry_points__a_broken_or_repeated_one_is_left_out_and_named(monkeypatch):
    class Broken:
        value = "theirs:broken"

        def load(self):
            raise ImportError("no module named theirs")

    class Repeated:
        value = "theirs:repeated"

        def load(self):
            return ViTFamily(name="timm", classes=("theirs.",), library="theirs")

    points = SimpleNamespace(entry_points=lambda group: [Broken(), Repeated()])
    monkeypatch.setattr("covft.adapters.registry.metadata", points)
    with pytest.warns(UserWarning, match="is left out") as caught:
        adapters = list_adapters()
    assert [adapter.name for adapter in adapters].count("timm") == 1
    messages = [str(warning.message) for warning in caught]
    assert any("theirs:broken" in m and "no module named theirs" in m for m in messages)
    assert any("theirs:repeated" in m and "registered already" in m for m in messages)


def test_describe__a_text_tower_is_refused():
    from transformers import CLIPTextConfig, CLIPTextModel

    tower = CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnknownViTError, match="is a text model"):
        describe(tower)

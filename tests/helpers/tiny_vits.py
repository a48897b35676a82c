"""ViTs of a few hundred parameters, one for each layout of tokens that an FFN may get."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from covft.adapters import ViTFamily
from tests.helpers.towers import TEXT_DIM

D, F = 8, 12


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def texts(batch: int = 3) -> Tensor:
    return torch.randn(batch, TEXT_DIM, dtype=torch.float64)


# One FFN per block, in every layout


class Block(nn.Module):
    """A block that calls its FFN in one layout, on tokens `(B, N, D)` of a 4 x 4 map."""

    def __init__(self, ffn: nn.Module, layout: str) -> None:
        super().__init__()
        self.attn = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.mlp = ffn
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        y, (images, tokens, width) = self.norm(x), x.shape
        if self.layout == "BHWD":
            y = self.mlp(y.view(images, 4, 4, width)).flatten(1, 2)
        elif self.layout == "BCHW":
            y = self.mlp(y.transpose(1, 2).reshape(images, width, 4, 4)).flatten(2).transpose(1, 2)
        elif self.layout == "(BP)ND":
            y = self.mlp(y.reshape(images * 4, 4, width)).reshape(images, tokens, width)
        elif self.layout == "arguments":
            y = self.mlp(y, (4, 4), scale=0.5)
        else:
            y = self.mlp(y)
        return x + y


class TinyViT(nn.Module):
    def __init__(self, ffn: nn.Module, layout: str, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, D, 2, 2)
        self.blocks = nn.ModuleList(Block(copy.deepcopy(ffn), layout) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class WithArguments(nn.Module):
    """An FFN that needs the sides of the map, as depth-wise convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.dw, self.fc2 = nn.Linear(D, F), nn.Conv2d(F, F, 3, 1, 1, groups=F), nn.Linear(F, D)

    def forward(self, x: Tensor, size: tuple[int, int], scale: float = 1.0) -> Tensor:
        h = self.fc1(x).transpose(1, 2)
        h = self.dw(h.reshape(*h.shape[:2], *size)).flatten(2).transpose(1, 2)
        return scale * self.fc2(torch.nn.functional.gelu(h))


def linear_ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))


def conv_ffn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(D, F, 1), nn.BatchNorm2d(F), nn.GELU(), nn.Conv2d(F, D, 1))


def spatial_ffn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(D, F, 3, padding=1), nn.GELU(), nn.Conv2d(F, D, 3, padding=1))


# By name: how to build the FFN, and the layout that covft must find.
LAYOUTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BND": (linear_ffn, "BND"),
    "BHWD": (linear_ffn, "BND"),
    "BCHW": (conv_ffn, "BCHW"),
    "BCHW-3x3": (spatial_ffn, "BCHW"),
    "(BP)ND": (linear_ffn, "(BP)ND"),
    "arguments": (WithArguments, "BND"),
}


def tiny_vit(name: str) -> nn.Module:
    """A ViT with one of `LAYOUTS`, in float64; its batch norms have random statistics."""
    vit = TinyViT(LAYOUTS[name][0](), name.removesuffix("-3x3")).double().eval()
    for module in vit.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return vit


def family(name: str) -> ViTFamily:
    folded = ("mlp",) if name == "(BP)ND" else ()
    return ViTFamily(name="tiny", classes=(f"{__name__}.TinyViT",), library="tests", folded=folded)


# Two FFNs per block


class LinearMlp(nn.Sequential):
    """An FFN that covft finds by the name of its class."""


class Shared(nn.Module):
    """One block whose two FFNs are the same module."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.attn, block.norm = nn.Linear(D, D), nn.LayerNorm(D)
        block.mlp2 = block.mlp3 = LinearMlp(*linear_ffn())
        self.blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        (block,) = self.blocks
        y = block.norm(x + block.attn(x))
        return torch.cat([y + block.mlp2(y), y[:, :2] + block.mlp3(y[:, :2])], dim=1)


SHARED = ViTFamily(name="shared", classes=(f"{__name__}.Shared",), library="tests")


class TwoFFNs(nn.Module):
    """Two blocks of two FFNs each, so that its FFNs have the indices 0 to 3."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoFFNBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class TwoFFNBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.mlp2, self.mlp3 = LinearMlp(*linear_ffn()), LinearMlp(*linear_ffn())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + self.attn(x))
        y = y + self.mlp2(y)
        return y + self.mlp3(y)


TWO_FFNS = ViTFamily(name="two-ffns", classes=(f"{__name__}.TwoFFNs",), library="tests", mlp=("mlp2", "mlp3"))


# An FFN in two halves


class Intermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(D, F), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(F, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.dense(h)


class OutputWithResidual(Output):
    def forward(self, h: Tensor, residual: Tensor) -> Tensor:
        return self.dense(h) + residual


class Halves(nn.Module):
    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.layer = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.layer:
            layer.attention, layer.norm = nn.Linear(D, D), nn.LayerNorm(D)
            layer.intermediate = Intermediate()
            layer.output = OutputWithResidual() if residual else Output()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = x + layer.attention(x)
            h = layer.intermediate(layer.norm(x))
            x = layer.output(h, x) if self.residual else x + layer.output(h)
        return x


HALVES = ViTFamily(name="halves", classes=(f"{__name__}.Halves",), library="tests")


# Padding


def naflex() -> nn.Module:
    timm = pytest.importorskip("timm")
    options = {"embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0, "patch_size": 4, "reg_tokens": 2}
    return timm.create_model("naflexvit_base_patch16_gap", **options).double().eval()


def patches(lengths: list[int], size: int) -> dict[str, Tensor]:
    """Patches of images that are one patch high, padded with noise, which must not matter."""
    made = torch.randn(len(lengths), size, 48, dtype=torch.float64)
    valid = torch.arange(size) < torch.tensor(lengths)[:, None]
    coordinates = torch.stack([torch.zeros(size), torch.arange(size)], dim=-1).long().expand(len(lengths), -1, -1)
    return {"patches": made, "patch_coord": coordinates * valid[..., None], "patch_valid": valid}

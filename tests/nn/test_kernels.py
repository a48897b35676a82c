"""The Triton kernels: in the interpreter they have the values of the experts, and they compile for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import covft
from covft.errors import ConfigError
from covft.nn import ContextualMoE

ROOT = Path(__file__).resolve().parents[2]


def interpret(*forms):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.nn.interpreted", *forms],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_interpreted__values_and_gradients_of_every_form():
    pytest.importorskip("triton")
    assert interpret() == "12 forms\n"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_compiled__for_an_h100(name, dtype, tmp_path, monkeypatch):
    """The compiler of Triton needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from covft.nn import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = ["p_ptr", "q_ptr", "hidden_ptr", "grad_ptr", "grad_p_ptr", "grad_q_ptr"]
    types = {**dict.fromkeys(tensors, f"*{dtype}"), "weight_ptr": "*fp32", "grad_weight_ptr": "*fp32"}
    for kernel in (kernels._forward, kernels._backward):
        for gated in (True, False):
            constants = {"FUNCTION": kernels.FUNCTIONS[name], "GATED": gated}
            constants |= {"WIDE": triton.language.float32, "BLOCK": 1024}
            signature = {arg: types.get(arg, "constexpr" if arg in constants else "i32") for arg in kernel.arg_names}
            source = ASTSource(kernel, signature, constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert len(compiled.asm["cubin"]) > 1000


def test_set_kernels__runs_elsewhere_without_kernels():
    """On a CPU the setting changes nothing."""
    ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    moe = ContextualMoE(ffn, embed_dim=8, text_dim=8)
    x, text = torch.randn(2, 3, 8), torch.randn(2, 8)
    wanted = moe(x, text)
    moe.set_kernels("triton")
    assert torch.equal(moe(x, text), wanted)
    assert moe.experts.kernels == moe.context.image.kernels == "triton"
    encoder = covft.wrap(covft.testing.ToyViT(), 8)
    with pytest.raises(ConfigError, match="kernels='cuda' is not known"):
        encoder.set_kernels("cuda")
    if torch.cuda.is_available():
        encoder.set_kernels("triton")

"""Run a module as `python -m` does, on a machine without CUDA: `without_cuda.py MODULE ...`.

The original codebases ask for the device "cuda", for NCCL and for FlashAttention by name. Where there is CUDA nothing
is changed; elsewhere "cuda" means the CPU, "nccl" means gloo, and models with FlashAttention take eager attention.
"""

from __future__ import annotations

import functools
import runpy
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import nn


def pretend() -> None:
    """Let what asks for CUDA run on the CPU."""

    def on_cpu(method: Any) -> Any:
        @functools.wraps(method)
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple("cpu" if _is_cuda(value) else value for value in args)
            kwargs = {name: "cpu" if _is_cuda(value) else value for name, value in kwargs.items()}
            return method(self, *args, **kwargs)

        return to

    for cls in (torch.Tensor, nn.Module):
        cls.to = on_cpu(cls.to)
        cls.cuda = lambda self, *_, **__: self
    torch.cuda.set_device = lambda *_, **__: None
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.device_count = lambda: 1

    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend=None, **kwargs: init("gloo", **kwargs)
    import deepspeed
    from transformers import PreTrainedModel

    init_deepspeed = deepspeed.init_distributed
    deepspeed.init_distributed = lambda dist_backend=None, **kwargs: init_deepspeed("gloo", **kwargs)

    def eager(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        config._attn_implementation = "eager"
        return config

    PreTrainedModel._check_and_enable_flash_attn_2 = classmethod(eager)
    without_flash_attention()


def without_flash_attention() -> None:
    """Let InternVL import what it never calls here; for what its towers would call, it has attention of its own."""
    names = {
        "flash_attn": (),
        "flash_attn.bert_padding": ("pad_input", "unpad_input"),
        "flash_attn.flash_attn_interface": (
            "flash_attn_func",
            "flash_attn_varlen_func",
            "flash_attn_varlen_kvpacked_func",
        ),
    }
    for name, functions in names.items():
        module: Any = types.ModuleType(name)
        module.__spec__, module.__version__, module.__path__ = ModuleSpec(name, None), "0", []
        for function in functions:
            setattr(module, function, None)
        sys.modules[name] = module


def _is_cuda(value: Any) -> bool:
    return str(value).split(":")[0] == "cuda" if isinstance(value, (str, torch.device)) else False


if __name__ == "__main__":
    ranks = [argument for argument in sys.argv[1:2] if argument.startswith("--local")]  # by DeepSpeed's launcher
    module, *rest = sys.argv[1 + len(ranks) :]
    sys.argv = [module, *ranks, *rest]
    sys.path[0] = ""  # as with -m
    if not torch.cuda.is_available():
        pretend()
    runpy.run_module(module, run_name="__main__", alter_sys=True)

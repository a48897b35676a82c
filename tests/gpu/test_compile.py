"""What compiles or replaces operations has equal outputs: torch.compile with inductor, Triton, flash attention."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import covft
from tests.helpers.conditioning import Case
from tests.helpers.towers import TEXT_DIM, features, perturb

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("name", ["hf-clip", "timm-clip"])
def test_compile__has_no_graph_break_and_equal_outputs(name, device):
    case = Case(name, device=device, dtype=torch.float32)
    case.encoder.eval()
    case.output(case.images, case.texts[0])  # towers of transformers need one eager call
    torch._dynamo.reset()  # of earlier tests
    explained = torch._dynamo.explain(case.encoder)(case.images, case.texts[0])
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    torch._dynamo.reset()
    compiled = torch.compile(case.encoder, fullgraph=True)
    with torch.no_grad():
        for text in case.texts[:2]:
            wanted, found = (features(run(case.images, text)) for run in (case.encoder, compiled))
            assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    case.encoder.train()
    gradients = []
    for run in (case.encoder, compiled):
        case.encoder.zero_grad()
        features(run(case.images, case.texts[0])).square().mean().backward()
        gradients.append([p.grad for p in case.encoder.trainable_parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 1e-2 * one.norm() + 1e-6


@pytest.mark.parametrize("recompute", ["activation", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["hf-clip", "hf-dinov2-swiglu", "hf-qwen2.5-vl", "hf-siglip"])
def test_triton_kernels__are_as_close_to_the_truth_as_eager_operations(name, dtype, recompute, device):
    """The truth: the same weights and images in float64, experts one by one."""
    pytest.importorskip("triton")
    if device.type != "cuda":
        pytest.skip("on the CPU, tests/nn/test_kernels.py runs the kernels in Triton's interpreter")
    case = Case(name, device=device, dtype=dtype, recompute=recompute)
    results = [_results(case, kernels) for kernels in ("eager", "triton")]
    case.encoder.double().set_recompute("none")
    case.images, case.texts = case.images.double(), [text.double() for text in case.texts]
    truth = _results(case, "eager")
    if dtype == torch.float64:  # every formula, to the last gradient
        names = ["output", *(name for name, p in case.encoder.named_parameters() if p.requires_grad)]
        size = max(gradient.norm() for gradient in truth[1:])  # some gradients are zero but for rounding
        wrong = {
            name: f"{float((kernel - true).norm()):.1e} of {float(true.norm()):.1e}"
            for name, kernel, true in zip(names, results[1], truth, strict=True)
            if not (kernel - true).norm() <= 1e-11 * true.norm() + 1e-13 * size
        }
        assert not wrong, wrong
        return
    # Rounding: of the output, and of all gradients together, since that of a single small one is a matter of luck.
    for part in (slice(0, 1), slice(1, None)):
        eager, kernel = (_distance(found[part], truth[part]) for found in results)
        assert kernel <= 2 * eager + torch.finfo(dtype).eps


def _distance(found, true):
    """How far tensors are from the truth, all together, relative to its size."""
    size = sum(tensor.square().sum() for tensor in true)
    return float((sum((a - b).square().sum() for a, b in zip(found, true, strict=True)) / size).sqrt())


def _results(case, kernels):
    """The output, and the gradients of all trained parameters."""
    case.encoder.set_kernels(kernels)
    case.encoder.zero_grad()
    output = case.output(case.images, case.texts[0])
    output.double().square().sum().backward()  # a mean's gradients would be too small for float16
    return [output.detach().double(), *(p.grad.double() for p in case.encoder.trainable_parameters())]


@pytest.mark.parametrize("name", ["clip", "siglip", "qwen2.5-vl"])
def test_flash_attention__has_the_outputs_and_gradients_of_sdpa(name, device):
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    if device.type != "cuda":
        pytest.skip("flash-attn needs a CUDA device")
    torch.manual_seed(0)
    results = []
    for implementation in ("sdpa", "flash_attention_2"):
        torch.manual_seed(1)
        vit, images, inputs = _built(name, implementation)
        encoder = covft.wrap(vit.to(device, torch.bfloat16), TEXT_DIM)
        perturb(encoder, 0.02)
        encoder.gradient_checkpointing_enable()
        encoder.train()
        text = torch.randn(2, TEXT_DIM, device=device, dtype=torch.bfloat16)
        inputs = {key: value.to(device) for key, value in inputs.items()}
        output = features(encoder(images.to(device, torch.bfloat16), text, **inputs))
        output.float().square().mean().backward()
        results.append([output, *(p.grad for p in encoder.trainable_parameters())])
    for one, other in zip(*results, strict=True):
        assert (one - other).float().norm() < 0.05 * one.float().norm() + 1e-6


def _built(name, implementation):
    """A tower with heads of 32 channels, two images and its other inputs."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    if name == "qwen2.5-vl":
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower

        config = Tower.config_class(
            **sizes,
            out_hidden_size=64,
            depth=4,
            num_heads=2,
            patch_size=8,
            window_size=32,
            fullatt_block_indexes=[1, 3],
        )
        config._attn_implementation = implementation
        return Tower._from_config(config), torch.randn(32, 384), {"grid_thw": torch.tensor([[1, 4, 6], [1, 4, 2]])}
    kind = {"clip": "CLIPVision", "siglip": "SiglipVision"}[name]
    config = getattr(transformers, f"{kind}Config")(
        **sizes, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation=implementation)
    return model, torch.randn(2, 3, 32, 32), {}

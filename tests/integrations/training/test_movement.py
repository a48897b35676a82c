"""At a small learning rate, trained parameters change; where they do not, there is a warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from covft.integrations import MLLMTrainer, train_only
from covft.integrations.training.movement import MovementWatch
from covft.integrations.training.parts import parts_of
from tests.helpers.training import arguments, build, collator, same, state

pytestmark = pytest.mark.usefixtures("quiet")
LLAVA_RATE = 2e-5


def run(model, rows, output, trainer=MLLMTrainer, **changes):
    """Ten steps; returns the values before."""
    args = arguments(output, **{"max_steps": 10, "learning_rate": LLAVA_RATE, "logging_steps": 100, **changes})
    trainer = trainer(model, args, train_dataset=rows)
    before = state(model)
    trainer.train()
    return before


def shares(model, before):
    """Share of the elements of each trained part that have changed, routers and contexts apart."""
    parts, moved, total = parts_of(model), {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "context" if ".context." in name else parts[name]
            moved[part] = moved.get(part, 0) + int((parameter != before[name]).sum())
            total[part] = total.get(part, 0) + parameter.numel()
    return {part: moved[part] / total[part] for part in total}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_part_of_the_tower_changes(dtype, rows, tmp_path):
    model = build().to(getattr(torch, dtype))
    train_only(model, ["covft"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = run(model, rows, tmp_path, bf16=dtype == "bfloat16")
    found = shares(model, before)
    assert set(found) == {"experts", "context", "router", "norms"}
    assert min(found.values()) >= 0.95, found
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {getattr(torch, dtype)}


def test_parts_that_hardly_change_are_named(rows, tmp_path):
    model = build().to(torch.bfloat16)
    train_only(model, ["covft", "projector"])
    with pytest.warns(UserWarning, match=r"Few elements[\s\S]*% of projector \(bfloat16\)[\s\S]*dtype=torch.float32"):
        run(model, rows, tmp_path)


def test_a_tower_that_is_cast_later_is_named(rows, tmp_path):
    class Casting(MLLMTrainer):
        def create_optimizer(self, *args, **kwargs):
            self.model.to(torch.bfloat16)
            return super().create_optimizer(*args, **kwargs)

    model = build()
    train_only(model, ["covft"])
    with pytest.warns(UserWarning, match="of norms, .* of context, .* of router, .* of experts"):
        run(model, rows, tmp_path, trainer=Casting)


def test_an_optimizer_without_the_tower_is_named(rows, tmp_path):
    model = build()
    train_only(model, ["covft", "projector"])

    class Forgetful(MLLMTrainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.AdamW(self.model.model.multi_modal_projector.parameters(), lr=1e-3)
            return self.optimizer

    with pytest.warns(UserWarning, match=r"0.0% of experts.*float32[\s\S]*created without these parameters"):
        run(model, rows, tmp_path, trainer=Forgetful)


def test_a_resumed_run_ends_where_a_whole_one_does(rows, tmp_path):
    """The float32 values of a tower in bfloat16 come back bit for bit."""
    models = [build().to(torch.bfloat16) for _ in range(2)]
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    for model, checkpoint in zip(models, (None, str(tmp_path / "checkpoint-2")), strict=True):
        train_only(model, ["covft"])
        MLLMTrainer(model, arguments(tmp_path, **options), train_dataset=rows).train(checkpoint)
    assert same(state(models[0]), state(models[1]))
    model = models[0].eval()
    with torch.no_grad():  # outside the trainer there is no autocast
        assert torch.isfinite(model(**collator(rows)([rows[0]])).loss)


def watched(weight, gradients, steps=2):
    """A watch over one parameter that gets these gradients, each before a step of SGD."""
    parameter = nn.Parameter(weight)
    watch = MovementWatch([("w", parameter)], {"w": "llm"}, steps)
    for gradient in gradients:
        (parameter * gradient).sum().backward()
        with torch.no_grad():
            parameter -= 1e-3 * parameter.grad
        parameter.grad = None
        watch.after_step()
    return watch


def test_only_elements_with_a_gradient_count():
    gradient = torch.zeros(100)
    gradient[:10] = 1
    watch = watched(torch.rand(100), [gradient, gradient.roll(5)], steps=3)
    assert watch.shares() == {"llm": 1.0}
    watch.close()
    none = watched(torch.rand(100), [torch.zeros(100)] * 2)
    assert none.shares() == {}


def test_the_sample_is_bounded_and_the_hooks_are_removed():
    parameters = [nn.Parameter(torch.rand(300, 100)) for _ in range(3)]
    watch = MovementWatch([(str(i), p) for i, p in enumerate(parameters)], {str(i): "llm" for i in range(3)}, 1)
    sizes = [len(sample.start) for samples in watch._samples.values() for sample in samples]
    assert sum(sizes) <= 4096
    watch.close()
    assert not any(p._post_accumulate_grad_hooks for p in parameters)

"""At a small learning rate, trained parameters change; where they do not, there is a warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import covft
from covft.errors import ConfigError
from covft.integrations import MLLMTrainer, parts_of, train_only, watch_movement
from covft.integrations.training.movement import MovementWatch
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


def test_no_warning_where_the_learning_rate_is_0(rows, tmp_path):
    """Of everything in the first step of a warm-up, and of the tower in all steps."""
    model = build()
    train_only(model, ["covft", "projector"])

    class Resting(MLLMTrainer):
        def create_optimizer(self, *args, **kwargs):
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            projector = [p for n, p in trained if "multi_modal_projector" in n]
            tower = [p for n, p in trained if "multi_modal_projector" not in n]
            self.optimizer = torch.optim.SGD([{"params": projector, "lr": 1e-2}, {"params": tower, "lr": 0.0}])
            return self.optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = run(model, rows, tmp_path, trainer=Resting, warmup_steps=5)
    found = shares(model, before)
    assert found.pop("projector") > 0.9
    assert set(found.values()) == {0.0}


@pytest.mark.long
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


def test_steps_with_a_learning_rate_of_0_do_not_count():
    moved, still = nn.Parameter(torch.rand(10)), nn.Parameter(torch.rand(10))
    watch = MovementWatch([("a", moved), ("b", still)], {"a": "llm", "b": "projector"}, steps=2)
    optimizer = torch.optim.SGD([{"params": [moved], "lr": 0.0}, {"params": [still], "lr": 0.0}])

    def step(rate):
        optimizer.param_groups[0]["lr"] = rate
        watch.before_step(optimizer)
        (moved.sum() + still.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.after_step()

    for _ in range(5):
        step(0.0)
    assert watch.shares() == {}
    step(0.1)
    assert watch.shares() == {"llm": 1.0}
    optimizer.param_groups[1]["lr"] = 1e-30  # which is meant to move something, and does not
    with pytest.warns(UserWarning, match=r"2 optimizer steps[\s\S]*: 0.0% of projector \(float32\)"):
        step(0.1)


def test_the_sample_is_bounded_and_the_hooks_are_removed():
    parameters = [nn.Parameter(torch.rand(300, 100)) for _ in range(3)]
    watch = MovementWatch([(str(i), p) for i, p in enumerate(parameters)], {str(i): "llm" for i in range(3)}, 1)
    sizes = [len(sample.start) for samples in watch._samples.values() for sample in samples]
    assert sum(sizes) <= 4096
    watch.close()
    assert not any(p._post_accumulate_grad_hooks for p in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_watch_movement__of_a_module_around_a_wrapped_vit(dtype):
    """In a loop without a trainer: parts by name, wherever the ViT is in the module."""
    vit = covft.testing.ToyViT()
    holder = nn.ModuleDict({"tower": covft.wrap(vit, 8, layers=[1, 2], context="cve"), "head": nn.Linear(16, 2)}).to(
        dtype
    )
    watch = watch_movement(holder, steps=3)
    optimizer = torch.optim.AdamW([p for p in holder.parameters() if p.requires_grad], lr=2e-5)
    for step in range(3):
        images, texts = torch.rand(4, 3, 16, 16, dtype=dtype), torch.rand(4, 8, dtype=dtype)
        holder["head"](holder["tower"](images, texts).mean(1)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            shares = watch.shares()
            assert shares.keys() == {"experts", "context", "router", "norms", "rest"}
            assert (min(shares.values()) > 0.75) == (dtype == torch.float32)
        if step == 2 and dtype == torch.bfloat16:
            with pytest.warns(UserWarning, match=r"Few elements have changed in 3 [\s\S]*train_in_float32"):
                watch.after_step()
        else:
            watch.after_step()
    assert watch.shares() == {}


def test_watch_movement__of_a_module_around_an_attached_model():
    holder = nn.ModuleDict({"assistant": build()})
    parts = parts_of(holder["assistant"])
    watch = watch_movement(holder)
    named = {name.removeprefix("assistant."): p for name, p in holder.named_parameters()}
    watched = {
        "context" if p == "router" and ".context." in n else p for n, p in parts.items() if named[n].requires_grad
    }
    for parameter in named.values():
        parameter.grad = None
        if parameter.requires_grad:
            parameter.sum().backward()
    assert set(watch.shares()) == watched
    watch.close()
    with pytest.raises(ConfigError, match="steps=0"):
        watch_movement(holder, steps=0)

"""The self-checks of torch's private names: a release that changed their meaning is refused, never misread."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils import checkpoint as torch_checkpoint

import covft
from covft.errors import UnsupportedVersionError
from covft.nn.moe import ContextualMoE
from covft.utils import torch_internals as internals
from tests.helpers.snapshots import assert_unchanged, snapshot

AUTOGRAD = torch._C._autograd


def no_frames(monkeypatch):
    """The hooks of a checkpoint no longer hold its frame."""
    monkeypatch.setattr(internals, "checkpoint_frames", list)


def other_class(monkeypatch):
    """The hooks of a checkpoint hold a frame of another class."""
    frame = torch_checkpoint._CheckpointFrame
    monkeypatch.setattr(
        internals,
        "torch_checkpoint",
        SimpleNamespace(checkpoint=torch_checkpoint.checkpoint, _CheckpointFrame=type("Frame", (frame,), {})),
    )


def other_frame_in_backward(monkeypatch):
    """A recomputation shows a frame, but not that of its forward."""
    seen = internals.checkpoint_frames
    monkeypatch.setattr(internals, "checkpoint_frames", lambda: [object() for _ in seen()])


def other_closure(monkeypatch):
    """The hooks of a checkpoint hold its frame one function further down."""

    class Hook(torch_checkpoint._checkpoint_hook):
        def __init__(self, frame):
            super().__init__(frame)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: pack(tensor)

    monkeypatch.setattr(torch_checkpoint, "_checkpoint_hook", Hook)


def no_class(monkeypatch):
    """The frames have another name."""
    monkeypatch.setattr(internals, "torch_checkpoint", SimpleNamespace(checkpoint=torch_checkpoint.checkpoint))


def no_hooks(monkeypatch):
    """The stack of hooks cannot be read."""
    monkeypatch.delattr(AUTOGRAD, "_top_saved_tensors_default_hooks")


def no_graph_task(monkeypatch):
    """Nothing tells whether backward is running."""
    monkeypatch.delattr(torch._C, "_current_graph_task_id")


def other_arguments(monkeypatch):
    """The stack of hooks is read with other arguments."""
    top = AUTOGRAD._top_saved_tensors_default_hooks
    monkeypatch.setattr(AUTOGRAD, "_top_saved_tensors_default_hooks", lambda: top(False))


def no_transforms(monkeypatch):
    """Nothing tells whether a transform is running."""
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")


def unseen_transforms(monkeypatch):
    """The question has another meaning."""
    monkeypatch.setattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def no_level(monkeypatch):
    """The level of forward-mode derivatives has another name."""
    monkeypatch.delattr(forward_ad, "_current_level")


def other_level(monkeypatch):
    """Levels are counted elsewhere."""
    monkeypatch.setattr(internals, "forward_ad", SimpleNamespace(dual_level=forward_ad.dual_level, _current_level=-1))


def other_tables(monkeypatch):
    """Hooks are in tables of another name."""
    monkeypatch.setattr(internals, "_TABLES", ("_pre_hooks", *internals._TABLES[1:]))


def other_contents(monkeypatch):
    """The tables of hooks stay empty."""
    register = nn.Module.register_forward_hook

    def elsewhere(self, hook, **options):
        handle = register(self, hook, **options)
        self._others, self._forward_hooks = self._forward_hooks, OrderedDict()
        return handle

    monkeypatch.setattr(nn.Module, "register_forward_hook", elsewhere)


def wrapped_owners(monkeypatch):
    """The tables hold something around each hook."""
    register = nn.Module.register_forward_pre_hook

    def around(self, hook, **options):
        return register(self, lambda *args: hook(*args), **options)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", around)


def other_state_dict_hooks(monkeypatch):
    """Hooks of state dicts are wrapped in something else."""
    register = nn.Module.register_state_dict_post_hook

    def around(self, hook):
        return register(self, lambda *args: hook(*args))

    monkeypatch.setattr(nn.Module, "register_state_dict_post_hook", around)


CHANGES = [
    no_frames,
    other_class,
    other_closure,
    other_frame_in_backward,
    no_class,
    no_hooks,
    no_graph_task,
    other_arguments,
]
OF_TRANSFORMS = [no_transforms, unseen_transforms, no_level, other_level]
OF_HOOKS = [other_tables, other_contents, wrapped_owners, other_state_dict_hooks]
every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def hooks_of_a_region():
    """How many checkpoints torch shows around a region, in forward and in backward."""
    seen = []

    def region(x):
        seen.append(len(internals.checkpoint_frames()))
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    torch_checkpoint.checkpoint(region, x, use_reentrant=False).backward()
    return seen


def test_check_torch__accepts_this_torch():
    internals.check_torch.__wrapped__()
    with torch.no_grad(), torch.inference_mode(), torch.device("meta"):
        internals.check_torch.__wrapped__()
    assert hooks_of_a_region() == [1, 1]


@every_change
def test_check_torch__refuses_another_torch_by_its_version(change, monkeypatch):
    with monkeypatch.context() as patch:
        change(patch)
        with pytest.raises(UnsupportedVersionError, match="does not show which forward") as caught:
            internals.check_torch.__wrapped__()
    assert f"torch {torch.__version__}: " in caught.value.got
    assert caught.value.expected.startswith("torch 2.8 or later")
    assert "torch>=2.8" in caught.value.fix
    # Nothing is left on the stack of hooks.
    assert hooks_of_a_region() == [1, 1]


def test_check_torch__names_what_is_missing(monkeypatch):
    with monkeypatch.context() as patch:
        no_hooks(patch)
        with pytest.raises(UnsupportedVersionError, match="_top_saved_tensors_default_hooks"):
            internals.check_torch.__wrapped__()
    with monkeypatch.context() as patch:
        no_frames(patch)
        with pytest.raises(UnsupportedVersionError, match=r"\[\(False, 0\), \(True, 0\)\]"):
            internals.check_torch.__wrapped__()


@pytest.mark.parametrize("change", [*OF_TRANSFORMS, *OF_HOOKS], ids=lambda change: change.__name__)
def test_checks__refuse_transforms_or_hooks_that_are_not_seen(change, monkeypatch):
    internals._check_transforms.cache_clear()
    try:
        with monkeypatch.context() as patch:
            change(patch)
            for _ in range(2):  # a failure is not cached as a success
                of_transforms = change in OF_TRANSFORMS
                about = "whether a transform" if of_transforms else "do not show their hooks"
                check = internals.check_transforms if of_transforms else internals.check_torch.__wrapped__
                with pytest.raises(UnsupportedVersionError, match=about) as caught:
                    check()
                assert f"torch {torch.__version__}: " in caught.value.got
                assert "torch 2.8 or later" in caught.value.expected
        internals.check_torch.__wrapped__()
    finally:
        internals._check_transforms.cache_clear()


def test_is_transformed__is_checked_by_a_mixture_alone(monkeypatch):
    """Experts work without a wrapped ViT; their first call refuses a torch that hides transforms."""
    ffn = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    moe = ContextualMoE(ffn, embed_dim=8, text_dim=4, num_experts=2, recompute="all")
    internals._check_transforms.cache_clear()
    try:
        with monkeypatch.context() as patch:
            unseen_transforms(patch)
            with pytest.raises(UnsupportedVersionError, match="whether a transform"):
                moe(torch.rand(2, 5, 8), torch.rand(2, 4))
        assert moe(torch.rand(2, 5, 8), torch.rand(2, 4)).shape == (2, 5, 8)
    finally:
        internals._check_transforms.cache_clear()


def test_is_transformed__waits_with_its_check_inside_of_a_transform():
    seen = []
    internals._check_transforms.cache_clear()
    with forward_ad.dual_level():
        seen.append(internals.is_transformed())
    assert seen == [True]
    assert not internals.is_transformed()


def test_is_transformed__is_checked_where_the_caller_has_saved_tensor_hooks():
    """As in a checkpointed region that is the first thing to run; torch.func.grad refuses to run there."""
    internals._check_transforms.cache_clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        with pytest.raises(RuntimeError, match="saved tensor hooks"):
            torch.func.grad(torch.sum)(torch.ones(1))
        assert not internals.is_transformed()


def test_names__are_those_of_torchs_wrappers():
    part = nn.Linear(2, 2)
    compiled, checkpointed = torch.compile(part, backend="eager"), nn.Sequential(checkpoint_wrapper(part))
    assert [name for name, _ in compiled.named_parameters()] == [
        f"{internals.COMPILED}.{n}" for n in ("weight", "bias")
    ]
    names = [name for name, _ in checkpointed.named_parameters()]
    assert names == [f"0.{internals.CHECKPOINTED}.{name}" for name in ("weight", "bias")]
    assert [internals.without_checkpointing(name) for name in names] == list(checkpointed.state_dict())


@every_change
def test_wrap__raises_before_anything_of_the_vit_has_changed(change, monkeypatch):
    vit = covft.testing.ToyViT()
    before = snapshot(vit)
    internals.check_torch.cache_clear()
    try:
        with monkeypatch.context() as patch:
            change(patch)
            for _ in range(2):  # a failure is not cached as a success
                with pytest.raises(UnsupportedVersionError, match="does not show which forward"):
                    covft.wrap(vit, 4)
        assert_unchanged(vit, before)
        assert covft.wrap(vit, 4).layers
    finally:
        internals.check_torch.cache_clear()


def test_frames__are_shown_innermost_first_below_other_hooks():
    seen = []

    def inner(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            seen.append(internals.checkpoint_frames())
        return x.sin()

    def outer(x):
        seen.append(internals.checkpoint_frames())
        return torch_checkpoint.checkpoint(inner, x, use_reentrant=False).cos()

    torch_checkpoint.checkpoint(outer, torch.ones(1, requires_grad=True), use_reentrant=False)
    assert [len(found) for found in seen] == [1, 2]
    assert seen[1][1] is seen[0][0]
    assert internals.checkpoint_frames() == []


def test_frames__are_none_where_hooks_are_disabled():
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert internals.checkpoint_frames() == []

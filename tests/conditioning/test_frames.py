"""The self-check of torch's private names: a release that keeps frames in another way is refused, never misread."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils import checkpoint as torch_checkpoint

import covft
from covft.conditioning import frames
from covft.errors import UnsupportedVersionError
from tests.helpers.snapshots import assert_unchanged, snapshot

AUTOGRAD = torch._C._autograd


def no_frames(monkeypatch):
    """The hooks of a checkpoint no longer hold its frame."""
    monkeypatch.setattr(frames, "checkpoint_frames", list)


def other_class(monkeypatch):
    """The hooks of a checkpoint hold a frame of another class."""
    frame = torch_checkpoint._CheckpointFrame
    monkeypatch.setattr(
        frames,
        "torch_checkpoint",
        SimpleNamespace(checkpoint=torch_checkpoint.checkpoint, _CheckpointFrame=type("Frame", (frame,), {})),
    )


def other_frame_in_backward(monkeypatch):
    """A recomputation shows a frame, but not that of its forward."""
    seen = frames.checkpoint_frames
    monkeypatch.setattr(frames, "checkpoint_frames", lambda: [object() for _ in seen()])


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
    monkeypatch.setattr(frames, "torch_checkpoint", SimpleNamespace(checkpoint=torch_checkpoint.checkpoint))


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
every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def hooks_of_a_region():
    """How many checkpoints torch shows around a region, in forward and in backward."""
    seen = []

    def region(x):
        seen.append(len(frames.checkpoint_frames()))
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    torch_checkpoint.checkpoint(region, x, use_reentrant=False).backward()
    return seen


def test_check_torch__accepts_this_torch():
    frames.check_torch.__wrapped__()
    with torch.no_grad(), torch.inference_mode(), torch.device("meta"):
        frames.check_torch.__wrapped__()
    assert hooks_of_a_region() == [1, 1]


@every_change
def test_check_torch__refuses_another_torch_by_its_version(change, monkeypatch):
    with monkeypatch.context() as patch:
        change(patch)
        with pytest.raises(UnsupportedVersionError, match="does not show which forward") as caught:
            frames.check_torch.__wrapped__()
    assert f"torch {torch.__version__}: " in caught.value.got
    assert caught.value.expected.startswith("torch 2.8 or later")
    assert "torch>=2.8" in caught.value.fix
    # Nothing is left on the stack of hooks.
    assert hooks_of_a_region() == [1, 1]


def test_check_torch__names_what_is_missing(monkeypatch):
    with monkeypatch.context() as patch:
        no_hooks(patch)
        with pytest.raises(UnsupportedVersionError, match="_top_saved_tensors_default_hooks"):
            frames.check_torch.__wrapped__()
    with monkeypatch.context() as patch:
        no_frames(patch)
        with pytest.raises(UnsupportedVersionError, match=r"\[\(False, 0\), \(True, 0\)\]"):
            frames.check_torch.__wrapped__()


@every_change
def test_wrap__raises_before_anything_of_the_vit_has_changed(change, monkeypatch):
    vit = covft.testing.ToyViT()
    before = snapshot(vit)
    frames.check_torch.cache_clear()
    try:
        with monkeypatch.context() as patch:
            change(patch)
            for _ in range(2):  # a failure is not cached as a success
                with pytest.raises(UnsupportedVersionError, match="does not show which forward"):
                    covft.wrap(vit, 4)
        assert_unchanged(vit, before)
        assert covft.wrap(vit, 4).layers
    finally:
        frames.check_torch.cache_clear()


def test_frames__are_shown_innermost_first_below_other_hooks():
    seen = []

    def inner(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            seen.append(frames.checkpoint_frames())
        return x.sin()

    def outer(x):
        seen.append(frames.checkpoint_frames())
        return torch_checkpoint.checkpoint(inner, x, use_reentrant=False).cos()

    torch_checkpoint.checkpoint(outer, torch.ones(1, requires_grad=True), use_reentrant=False)
    assert [len(found) for found in seen] == [1, 2]
    assert seen[1][1] is seen[0][0]
    assert frames.checkpoint_frames() == []


def test_frames__are_none_where_hooks_are_disabled():
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert frames.checkpoint_frames() == []

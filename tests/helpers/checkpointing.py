"""Ways to switch activation checkpointing on, and what may happen between a forward and its backward."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.helpers.conditioning import Call, Case

# Ways of checkpointing: each makes a `call(images, text)` of a case


def plain(case: Case) -> Call:
    return case.output


def by_library(case: Case) -> Call:
    case.encoder.gradient_checkpointing_enable()
    return case.output


def around_the_encoder(case: Case) -> Call:
    return lambda images, text: checkpoint(case.output, images, text, use_reentrant=False)


def inside_condition(case: Case) -> Call:
    """Checkpoint the images alone; the text comes from a condition that is closed before backward."""

    def call(images: Tensor, text: Tensor) -> Tensor:
        with case.encoder.condition(text):
            return checkpoint(case.output, images, None, use_reentrant=False)

    return call


def nested(case: Case) -> Call:
    case.encoder.gradient_checkpointing_enable()
    return inside_condition(case)


WAYS = [by_library, around_the_encoder, inside_condition, nested]


# Scenarios: what runs between zero_grad() and the gradients


def one_forward(case: Case, call: Call) -> None:
    call(case.images, case.texts[0]).square().sum().backward()


def two_forwards(case: Case, call: Call) -> None:
    one = call(case.images, case.texts[0]).square().sum()
    two = call(case.others, case.texts[1]).square().sum()
    (one + 3 * two).backward()


def same_images(case: Case, call: Call) -> None:
    one = call(case.images, case.texts[0]).square().sum()
    two = call(case.images, case.texts[1]).square().sum()
    (one + 3 * two).backward()


def other_thread(case: Case, call: Call) -> None:
    loss = call(case.images, case.texts[0]).square().sum() + call(case.images, case.texts[1]).cos().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


def other_condition(case: Case, call: Call) -> None:
    loss = call(case.images, case.texts[0]).square().sum()
    with case.encoder.condition(case.texts[2]):
        loss.backward()


def later_forward_first(case: Case, call: Call) -> None:
    one = call(case.images, case.texts[0]).square().sum()
    two = call(case.images, case.texts[1]).square().sum()
    with torch.no_grad():
        case.encoder.eval()
        call(case.others, case.texts[2])
        case.encoder.train()
    one.backward()
    two.backward()


SCENARIOS = [one_forward, two_forwards, same_images, other_thread, other_condition, later_forward_first]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = max(gradient.abs().max().item(), 1.0)
        assert (found[name] - gradient).abs().max() <= tolerance * scale, name

"""Scopes belong to the running task: asyncio tasks, threads and generators never take each other's text."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import covft
from covft.errors import MissingContextError
from tests.helpers.towers import perturb

TEXTS = ("one", "two", "three", "outer")


class Asked:
    """A wrapped ViT that can tell which text it was run with."""

    def __init__(self) -> None:
        vit, texts = covft.testing.ToyViT().eval(), covft.testing.HashTextEncoder(4)
        self.encoder = covft.wrap(vit, texts, layers=[1], context="text")
        perturb(self.encoder, 0.3)
        self.images = torch.randn(1, 3, 16, 16)
        with torch.no_grad():
            self.outputs = {text: self.encoder(self.images, text) for text in TEXTS}
        for one, other in itertools.pairwise(TEXTS):
            assert not torch.equal(self.outputs[one], self.outputs[other])

    def text(self) -> str | None:
        """The text that the ViT uses now; None if it refuses to run."""
        try:
            with torch.no_grad():
                output: Tensor = self.encoder.vit(self.images)
        except MissingContextError:
            return None
        return next(text for text, wanted in self.outputs.items() if torch.equal(wanted, output))

    def condition(self, text: str) -> Any:
        return self.encoder.condition(text)


@pytest.fixture(scope="module")
def asked():
    return Asked()


@pytest.fixture
def fixture_text(asked):
    with asked.condition("three"):
        yield "three"


# asyncio


def test_asyncio__interleaved_tasks_keep_their_texts(asked):
    async def one(text: str) -> list[str | None]:
        found = []
        with asked.condition(text):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(asked.text())
        return [*found, asked.text()]

    async def main() -> list[list[str | None]]:
        with asked.condition("outer"):
            return await asyncio.gather(*map(one, TEXTS[:3]))

    assert asyncio.run(main()) == [[text, text, text, "outer"] for text in TEXTS[:3]]
    assert asked.text() is None


def test_asyncio__tasks_and_threads_inherit_what_was_open_when_they_started(asked):
    async def main() -> list[str | None]:
        with asked.condition("one"):
            task = asyncio.create_task(asyncio.to_thread(asked.text))
            other = asyncio.create_task(asyncio.to_thread(asked.text))
            with asked.condition("two"):
                found = [await asyncio.to_thread(asked.text)]
        return [*found, await task, await other, asked.text()]

    assert asyncio.run(main()) == ["two", "one", "one", None]


def test_asyncio__a_generator_finished_by_another_task_closes_its_scope(asked):
    async def ask():
        with asked.condition("one"):
            yield asked.text()
            yield asked.text()

    async def main() -> list[str | None]:
        generator = ask()
        found = [await anext(generator), asked.text()]
        await asyncio.create_task(generator.aclose())
        return [*found, asked.text()]

    assert asyncio.run(main()) == ["one", None, None]


def test_asyncio__children_of_a_generator_keep_its_text_while_it_waits(asked):
    async def child() -> str | None:
        await asyncio.sleep(0)
        return asked.text()

    async def ask():
        with asked.condition("one"):
            yield await asyncio.gather(child(), child())

    async def main() -> list[Any]:
        with asked.condition("outer"):
            return [await anext(ask()), asked.text()]

    assert asyncio.run(main()) == [["one", "one"], "outer"]


# Threads


def test_threads__start_without_a_text_unless_they_get_a_context(asked):
    with ThreadPoolExecutor(1) as pool, asked.condition("one"):
        context = contextvars.copy_context()
        assert pool.submit(asked.text).result() is None
        assert pool.submit(context.run, asked.text).result() == "one"
        with asked.condition("two"):
            assert pool.submit(context.run, asked.text).result() == "one"


def test_threads__closing_in_a_copy_of_the_context_closes_nothing_elsewhere(asked):
    def body() -> None:
        held = asked.condition("one")
        held.__enter__()
        thread = threading.Thread(target=contextvars.copy_context().run, args=(held.__exit__, None, None, None))
        thread.start()
        thread.join()
        assert asked.text() == "one"

    contextvars.copy_context().run(body)
    assert asked.text() is None


# Generators


def test_generators__a_suspended_one_does_not_lend_its_text(asked):
    def ask(text: str):
        with asked.condition(text):
            while True:
                yield asked.text()

    one, two = ask("one"), ask("two")
    assert [next(one), next(two), next(one), next(two)] == ["one", "two", "one", "two"]
    assert asked.text() is None
    with pytest.raises(MissingContextError, match="beside a generator that holds a text"):
        asked.encoder.vit(asked.images)
    with asked.condition("outer"):
        three = ask("three")
        assert [next(three), asked.text(), next(one), asked.text()] == ["three", "outer", "one", "outer"]
        one.close()
        assert [asked.text(), next(three)] == ["outer", "three"]
    assert [next(three), next(two), asked.text()] == ["three", "two", None]
    with asked.encoder.condition("outer"):
        del two, three  # unfinished
        assert asked.text() == "outer"
    assert asked.text() is None


def test_generators__delegating_and_iterating(asked):
    def ask():
        with asked.condition("one"):
            yield asked.text()
            yield asked.text()

    def outer():
        yield from ask()
        yield asked.text()
        for text in ask():
            yield text, asked.text()

    for found in (text for text in outer()):
        assert found in ("one", None, ("one", None))
        assert asked.text() is None


def test_generators__with_an_exit_stack(asked):
    def ask():
        with contextlib.ExitStack() as stack:
            stack.enter_context(asked.condition("one"))
            yield asked.text()

    generator = ask()
    assert [next(generator), asked.text()] == ["one", None]


def test_generators__wait_for_threads_that_inherit_their_text(asked):
    def ask(pool: ThreadPoolExecutor):
        with asked.condition("one"):
            context = contextvars.copy_context()
            yield pool.submit(context.run, asked.text).result()
            yield pool.submit(context.run, asked.text)

    with ThreadPoolExecutor(1) as pool:
        first, second = ask(pool)
        assert [first, second.result()] == ["one", "one"]


# Context managers made of generators hold their text for the block


def test_context_managers__of_generators_hold_for_their_block(asked):
    @contextlib.contextmanager
    def plain(text: str):
        with asked.condition(text):
            yield

    class Written:
        def __init__(self, text: str) -> None:
            self.held = plain(text)

        def __enter__(self) -> None:
            self.held.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.held.__exit__(*error)

    for manager in (plain, Written):
        with asked.condition("outer"), manager("one"):
            assert asked.text() == "one"
            with contextlib.ExitStack() as stack:
                stack.enter_context(manager("two"))
                assert asked.text() == "two"
            assert asked.text() == "one"

        def ask(manager=manager):
            with manager("one"):
                yield asked.text()

        generator = ask()
        assert [next(generator), asked.text()] == ["one", None]
        generator.close()


def test_context_managers__asynchronous(asked):
    @contextlib.asynccontextmanager
    async def plain(text: str):
        with asked.condition(text):
            yield

    async def main() -> list[str | None]:
        async with plain("one"):
            await asyncio.sleep(0)
            found = [asked.text()]
        return [*found, asked.text()]

    assert asyncio.run(main()) == ["one", None]


def test_condition__decorates_functions(asked):
    @asked.condition("one")
    def text() -> str | None:
        return asked.text()

    assert [text(), text(), asked.text()] == ["one", "one", None]


def test_fixtures__hold_for_the_test(asked, fixture_text):
    assert asked.text() == fixture_text
    with asked.condition("one"):
        assert asked.text() == "one"
    assert asked.text() == fixture_text


# Order


def test_order__closing_an_outer_one_first_leaves_the_inner_one_open(asked):
    outer, inner = asked.condition("outer"), asked.condition("one")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert asked.text() == "one"
    inner.__exit__(None, None, None)
    assert asked.text() is None


def test_order__encoders_do_not_see_each_others_scopes(asked):
    other = Asked()
    with asked.condition("one"), other.condition("two"):
        assert (asked.text(), other.text()) == ("one", "two")
    with other.condition("two"):
        assert (asked.text(), other.text()) == (None, "two")


def test_order__an_interrupt_in_the_tower_leaves_nothing_open(asked):
    """The hooks of a module do not run after a KeyboardInterrupt."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = next(asked.encoder.vit.children()).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        asked.encoder(asked.images, "one")
    with asked.condition("outer"):
        with pytest.raises(KeyboardInterrupt):
            asked.encoder.vit(asked.images)
        handle.remove()
        assert asked.text() == "outer"
    assert asked.text() is None


@pytest.mark.slow
def test_compile__uses_the_text_of_the_task(asked):
    torch._dynamo.reset()
    compiled = torch.compile(asked.encoder.vit, backend="eager", fullgraph=True)

    async def one(text: str) -> bool:
        with asked.condition(text):
            await asyncio.sleep(0)
            return torch.allclose(compiled(asked.images), asked.outputs[text], atol=1e-6)

    async def main() -> list[bool]:
        return await asyncio.gather(*map(one, TEXTS))

    assert asyncio.run(main()) == [True] * 4
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert asked.text() is None

"""Renders chat templates, and probes them for the text that they write around the contents of messages."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from covft.data.broken import DataError
from covft.errors import ConfigError

# By tokenizer and template.
_WANTS_PARTS: weakref.WeakKeyDictionary[Any, dict[str, bool]] = weakref.WeakKeyDictionary()
_EXCHANGE = [{"role": "user", "content": "Qz1zQ"}, {"role": "assistant", "content": "Qz2zQ"}]


@runtime_checkable
class Tokenizer(Protocol):
    """What building and data sets need of a tokenizer of transformers."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render a conversation."""
        ...

    def convert_ids_to_tokens(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the tokens of ids."""
        ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the ids of tokens."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Return the ids by token."""
        ...


class ChatTemplate:
    """A chat template, given text or lists of parts, whichever it reads.

    Args:
        tokenizer: A tokenizer of transformers, or any object with its `apply_chat_template`.
        template: The template, the name of one of the tokenizer's, or several by name, of which `"default"` or else the
            first is taken. None takes the tokenizer's own.

    Raises:
        ConfigError: If there is no template.
    """

    def __init__(self, tokenizer: Any, template: str | Mapping[str, str] | None = None) -> None:
        own = getattr(tokenizer, "chat_template", None)
        template = template or own
        if isinstance(template, Mapping):
            template = template.get("default") or next(iter(template.values()), None)
        if not template:
            raise ConfigError(
                f"{type(tokenizer).__name__} has no chat template.",
                expected="tokenizer.chat_template, or chat_template=",
                fix='chat_template=covft.data.CHAT_TEMPLATES["vicuna_v1"]',
            )
        self.tokenizer = tokenizer
        self.template: str = own.get(template, template) if isinstance(own, Mapping) else template
        self._wants_parts = self._finds_form()

    def apply(self, messages: Iterable[Mapping[str, Any]], **options: Any) -> Any:
        """Call the tokenizer's `apply_chat_template`, and raise `DataError` if the template refuses the messages."""
        from jinja2 import TemplateError

        if self._wants_parts:
            messages = [{**message, "content": _parts(message["content"])} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=self.template, **options)
        except (TemplateError, TypeError) as error:  # a TypeError adds text to a list of parts
            raise DataError(f"The chat template refuses the conversation: {error}.") from error

    def render(self, messages: Iterable[Mapping[str, Any]], *, prompt: bool = False) -> str:
        """Render messages as text, with the beginning of the next answer if `prompt`; raises as `apply`."""
        return self.apply(messages, tokenize=False, add_generation_prompt=prompt)

    def pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        contents: Iterable[str],
        *,
        prompt: bool = False,
        spelled: bool = False,
    ) -> list[str] | None:
        """Render messages and split the text at some of their contents.

        Args:
            messages: Chat messages.
            contents: Contents to split at, in order; each occurs nowhere else.
            prompt: Whether the beginning of the next answer follows.
            spelled: Whether to tokenize and decode the text first.

        Returns:
            The text before, between and after the contents; None if the template does not write each once, in order.
        """
        text = self.render(messages, prompt=prompt)
        rest = round_trip(self.tokenizer, text) if spelled else text
        pieces = []
        for content in contents:
            if rest.count(content) != 1:
                return None
            before, rest = rest.split(content)
            pieces.append(before)
        return [*pieces, rest]

    def _finds_form(self) -> bool:
        """Find out whether the template reads lists of parts; once for each tokenizer and template."""
        try:
            known = _WANTS_PARTS.setdefault(self.tokenizer, {})
        except TypeError:  # not hashable
            known = {}
        if self.template not in known:
            known[self.template] = not self._reads(parts=False) and self._reads(parts=True)
        return known[self.template]

    def _reads(self, *, parts: bool) -> bool:
        self._wants_parts = parts
        try:
            return self.pieces(_EXCHANGE, [message["content"] for message in _EXCHANGE]) is not None
        except Exception:  # conversation objects of other codebases refuse messages in their own ways
            return False


def reads_image_parts(processor: Any) -> bool:
    """Return whether a processor's chat template writes contents that are lists of parts, images among them.

    Otherwise contents are text, in which the processor's `image_token` stands for an image.

    Args:
        processor: A processor of transformers, or any object with its `apply_chat_template`.
    """
    if not getattr(processor, "chat_template", None):
        return False
    image, question = getattr(processor, "image_token", None), "question 7"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    try:
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception:  # templates refuse what they do not read in their own ways
        return False
    return text.count(question) == 1 and "'type'" not in text and (image is None or image in text)


def round_trip(tokenizer: Any, text: str) -> str:
    """Tokenize and decode a text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def any_of(strings: Iterable[str]) -> str:
    """Build a regular expression for any of the strings, the longest first; it matches nothing without strings."""
    return "|".join(map(re.escape, sorted(filter(None, strings), key=len, reverse=True))) or "(?!)"


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content

"""Reads instructions from prompts written by a codebase's own conversation object.

LLaVA and InternVL write prompts with objects that have `roles`, `append_message` and `get_prompt`. Such an object is
probed for its user turns like a chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from covft.data import CHAT_TEMPLATES
from covft.errors import ConfigError
from covft.integrations.mllm.prompt import PromptReader


def prompt_reader(tokenizer: Any, conversation: Any, image_ids: Iterable[int] = (), **reading: Any) -> PromptReader:
    """Build a reader for the prompts of a codebase.

    Args:
        tokenizer: The model's tokenizer.
        conversation: A conversation object of LLaVA or InternVL, a name in `covft.data.CHAT_TEMPLATES`, a Jinja chat
            template, or None for the tokenizer's own.
        image_ids: Ids of image placeholders; negative ones are not needed.
        **reading: As for `PromptReader`: `turns`, `system`, `empty_instruction`.

    Raises:
        ConfigError: If there is no such template, or `turns` is unknown.
    """
    if hasattr(conversation, "get_prompt"):
        source: Any = _ConversationTokenizer(tokenizer, conversation)
    elif conversation is None:
        source = tokenizer
    else:
        source = SimpleNamespace(
            tokenizer=tokenizer, chat_template=template_of(conversation)
        )  # shaped like a processor
    return PromptReader(source, image_ids, **reading)


def template_of(name: Any) -> str:
    """Look up a Jinja chat template in `covft.data.CHAT_TEMPLATES`; a template itself is returned as it is.

    Raises:
        ConfigError: If the name is unknown.
    """
    if isinstance(name, str) and ("{{" in name or "{%" in name):
        return name
    if name not in CHAT_TEMPLATES:
        raise ConfigError(
            f"conversation={name!r} is not known.",
            expected="a conversation object with get_prompt(), a Jinja template, or a name",
            known=", ".join(CHAT_TEMPLATES),
        )
    return CHAT_TEMPLATES[name]


class _ConversationTokenizer:
    """Gives a tokenizer a conversation object for a chat template; the object is copied before each rendering."""

    def __init__(self, tokenizer: Any, conversation: Any) -> None:
        self._inner, self._conversation = tokenizer, conversation
        self.chat_template = f"conversation {getattr(conversation, 'name', type(conversation).__name__)}"

    def apply_chat_template(
        self, messages: list[Mapping[str, str]], *, add_generation_prompt: bool = False, **_: Any
    ) -> str:
        conversation = self._conversation.copy()
        conversation.messages = []
        user, assistant = conversation.roles[:2]
        for message in messages:
            if message["role"] != "system":
                conversation.append_message({"user": user, "assistant": assistant}[message["role"]], message["content"])
            elif hasattr(conversation, "set_system_message"):
                conversation.set_system_message(message["content"])
            else:
                conversation.system = message["content"]
        if add_generation_prompt:
            conversation.append_message(assistant, None)
        return conversation.get_prompt()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        if name in ("_inner", "_conversation", "tokenizer"):
            raise AttributeError(name)
        return getattr(self._inner, name)

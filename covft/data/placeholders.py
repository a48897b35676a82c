"""Image placeholders in the text that the language model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from covft.data.broken import DataError
from covft.data.checks import function, short, string, whole
from covft.data.turns import IMAGE_TAG, check_messages
from covft.errors import ConfigError


@dataclass(frozen=True)
class ImageText:
    """The text that replaces an `<image>` tag.

    Attributes:
        token: The token that the model replaces by image features.
        per_tile: Number of tokens per tile, or per image without tiling.
        before: Text before the tokens of an image.
        after: Text after the tokens of an image.

    Example:
        >>> ImageText("<image>", per_tile=576)  # LLaVA-1.5 with CLIP-L/14 at 336 px
        >>> ImageText("<IMG_CONTEXT>", per_tile=256, before="<img>", after="</img>")  # InternVL at 448 px
    """

    token: str = IMAGE_TAG
    per_tile: int = 576
    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        for name in ("token", "before", "after"):
            string(getattr(self, name), name)
        if not self.token:
            raise ConfigError("token is empty.", expected="a token of the tokenizer", got=repr(self.token))
        whole(self.per_tile, "per_tile")
        if self.per_tile < 1:
            raise ConfigError(f"per_tile={self.per_tile} is too small.", expected="at least 1 token per tile")

    def __call__(self, tiles: int) -> str:
        """Write the text for an image of this many tiles."""
        whole(tiles, "tiles", least=1)
        return f"{self.before}{self.token * (self.per_tile * tiles)}{self.after}"

    def token_id(self, tokenizer: Any) -> int:
        """Look up the id of the token.

        Raises:
            ConfigError: If it is not a single token of the tokenizer.
        """
        function(tokenizer, "tokenizer")
        ids = tokenizer(self.token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == getattr(tokenizer, "unk_token_id", None):
            raise ConfigError(
                f"{self.token!r} is not a token of the tokenizer.",
                expected="a single token",
                got=f"ids {ids}",
                fix=f'tokenizer.add_special_tokens({{"additional_special_tokens": [{self.token!r}]}})',
            )
        return ids[0]

    def expand(self, messages: Sequence[dict[str, str]], tiles: Sequence[int]) -> list[dict[str, str]]:
        """Replace the tag of each image by its text.

        Args:
            messages: Chat messages with one `<image>` tag per image in the user's text.
            tiles: Number of tiles of each image, in the order of the tags.

        Raises:
            DataError: If tags and images do not match.
        """
        messages = check_messages(messages)
        if not isinstance(tiles, Sequence):
            raise ConfigError("tiles is not a list.", expected="a number of tiles per image", got=short(tiles))
        remaining, expanded = list(tiles), []
        for message in messages:
            if message["role"] == "user":
                first, *others = message["content"].split(IMAGE_TAG)
                if len(others) > len(remaining):
                    raise DataError(f"Too many {IMAGE_TAG} tags for {len(tiles)} images.")
                texts, remaining = remaining[: len(others)], remaining[len(others) :]
                content = first + "".join(self(count) + rest for count, rest in zip(texts, others, strict=True))
                message = {"role": "user", "content": content}
            expanded.append(message)
        if remaining:
            raise DataError(f"Too few {IMAGE_TAG} tags for {len(tiles)} images.")
        return expanded

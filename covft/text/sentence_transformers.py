"""Models of sentence-transformers, with the pooling and scaling that they were trained with."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from covft.errors import TextEncoderError
from covft.text.base import CachedTextEncoder, freeze
from covft.text.cache import DEFAULT_CACHE_BYTES
from covft.text.loading import LOADING_ERRORS, count_tokens, find_json, not_loaded
from covft.utils.arguments import check_kinds
from covft.utils.extras import import_library
from covft.utils.foreign_code import refuse_code

# Others choose classes by files of their own, or are not for text.
_MODULE = re.compile(
    r"sentence_transformers(\.[a-z_]+)*\.(Transformer|Pooling|Normalize|Dense|LayerNorm|Dropout|StaticEmbedding)"
)
# The names that the library reads the arguments of its `Transformer` from.
_ARGUMENT_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


class SentenceTransformersEncoder(CachedTextEncoder):
    """A `SentenceTransformer`; the features are those of its own `encode`.

    Args:
        model: A model id, a folder, or a loaded model, which is frozen in place.
        revision: Branch, tag or commit of a model id.
        cache_bytes: Bound on the memory of the cached features.

    Raises:
        TextEncoderError: If the model cannot be loaded, or does not return dense features.
        MissingDependencyError: If sentence-transformers is not installed and an id or folder is given.
    """

    @check_kinds
    def __init__(
        self, model: str | nn.Module, *, revision: str | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        loaded: Any = model
        if isinstance(model, str):
            if not model:
                raise TextEncoderError("A text encoder needs a name.", expected="a model id or a folder", got="''")
            library = import_library("sentence_transformers", "sentence-transformers", needed_by="This text encoder")
            check_modules(model, revision)
            safely: Any = {"trust_remote_code": False, "model_kwargs": {"weights_only": True}}
            try:
                # On the CPU, like every other encoder that covft loads; the library itself would take a GPU.
                loaded = library.SentenceTransformer(model, revision=revision, device="cpu", **safely)
            except LOADING_ERRORS as error:
                raise not_loaded(model, error) from error
            self._owned = loaded
        if "SentenceTransformer" not in {cls.__name__ for cls in type(loaded).__mro__}:
            raise TextEncoderError(
                "This model of sentence-transformers has no dense features per text.",
                expected="SentenceTransformer",
                got=type(loaded).__name__,
            )
        config = getattr(getattr(loaded[0], "auto_model", None), "config", None)
        saved = getattr(config, "name_or_path", None) or f"sentence_transformers:{type(loaded).__name__}"
        super().__init__(model if isinstance(model, str) else saved, cache_bytes=cache_bytes)
        self.model, self._modules = loaded, [loaded]
        self.revision = revision
        self.max_length = getattr(loaded, "max_seq_length", None)
        self.text_dim = self._probe()
        freeze([loaded])

    def _encode_one(self, text: str) -> Tensor:
        self._is_cut(count_tokens(getattr(self.model, "tokenizer", None), text))
        return self.model.encode([text], convert_to_tensor=True, show_progress_bar=False)

    def _states_of_one(self, text: str) -> Tensor:
        self._is_cut(count_tokens(getattr(self.model, "tokenizer", None), text))
        [states] = self.model.encode([text], output_value="token_embeddings", show_progress_bar=False)
        return states[None] if states.shape[-1] == self.text_dim else super()._states_of_one(text)


def check_modules(source: str, revision: str | None = None) -> list[tuple[str, str]]:
    """Refuse a repository that names classes other than those of the library, or has them run code.

    Args:
        source: A model id or folder.
        revision: Branch, tag or commit of a model id.

    Returns:
        The class name and the path of each of its modules; none where it has no `modules.json`.

    Raises:
        TextEncoderError: If it does, or its `modules.json` is not a list of modules.
        CheckpointError: If a config of it asks for code.
    """
    modules = find_json(source, "modules.json", revision=revision)
    if modules is None:
        return []
    try:
        named = [(str(module["type"]), str(module["path"])) for module in modules]
    except (TypeError, KeyError) as error:
        raise TextEncoderError(
            f"modules.json of {source!r} cannot be read.", expected="a list of modules with type and path"
        ) from error
    foreign = [name for name, _ in named if not _MODULE.fullmatch(name)]
    if foreign:
        raise TextEncoderError(
            f"The model {source!r} names classes that covft does not load from a file, since that may run any code.",
            expected="Transformer, Pooling, Normalize, Dense, LayerNorm, Dropout, StaticEmbedding of "
            "sentence_transformers",
            got=", ".join(repr(name[:100]) for name in foreign[:5]),
            fix="if you trust it: text_encoder=SentenceTransformer(...), loaded by you",
        )
    for name, path in named:
        if name.endswith(".Transformer"):
            for file in ("config.json", *_ARGUMENT_FILES):
                refuse_code(find_json(source, f"{path}/{file}" if path else file, revision=revision), source)
    return [(name.rpartition(".")[2], path) for name, path in named]

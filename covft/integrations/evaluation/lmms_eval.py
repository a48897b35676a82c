"""Models for lmms-eval, which finds them by the entry point group `lmms_eval.models`.

    lmms-eval --model covft_llava_hf --model_args pretrained=FOLDER --tasks gqa ...

Each is a chat class of lmms-eval that gets the model of `covft.load_model`. Besides the arguments of that class,
`--model_args` takes `text_encoder`, `base` and `dtype`, as `load_model` does, `text`, as `told.telling` does, and
`trunk_cache_mb`: benchmarks ask several questions about a picture, and the blocks before the first adapted one run once
for all of them. A row that fails ends the run with exit status 1: some classes of lmms-eval record an empty answer
instead, and its command then exits with 0.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from covft.errors import ConfigError, UnsupportedVersionError
from covft.integrations.building.saved import load_model
from covft.integrations.codebases.patches import loaded_already, one_process
from covft.integrations.evaluation.told import telling
from covft.integrations.mllm.trunk import kept_trunk, trunk_cache
from covft.utils.strict_json import read_strictly

_CHAT = "lmms_eval.models.chat"
# Names for --model, and the chat classes of lmms-eval.
BASES: dict[str, tuple[str, str]] = {
    "covft_huggingface": (f"{_CHAT}.huggingface", "Huggingface"),
    "covft_internvl_hf": (f"{_CHAT}.internvl_hf", "InternVLHf"),
    "covft_llava_hf": (f"{_CHAT}.llava_hf", "LlavaHf"),
    "covft_llava_onevision": (f"{_CHAT}.llava_hf", "LlavaHf"),  # its llava_onevision is for LLaVA's own code
    "covft_qwen2_5_vl": (f"{_CHAT}.qwen2_5_vl", "Qwen2_5_VL"),
    "covft_qwen3_vl": (f"{_CHAT}.qwen3_vl", "Qwen3_VL"),
}


def manifests() -> list[Any]:
    """Return what lmms-eval registers: a name and the path of a class for each model."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return [registry.ModelManifest(name, chat_class_path=f"{__name__}.{name}") for name in BASES]


def __getattr__(name: str) -> Any:
    if name not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base = BASES[name]
    kind = type(name, (AttachedModel, getattr(importlib.import_module(module), base)), {"__module__": __name__})
    globals()[name] = kind
    return kind


class AttachedModel:
    """Comes before a chat class of lmms-eval and gives it the attached model of a folder.

    Args:
        pretrained: A folder that an attached model was saved to, or a repository of the Hugging Face Hub.
        device: As for the class; None takes a GPU where there is one. With several processes, each has its own.
        device_map: As for the class; None takes `device`.
        text_encoder: As for `covft.load_model`.
        base: As for `covft.load_model`. LoRA is added to the weights.
        dtype: As for `covft.load_model`.
        text: What the tower is told, as for `telling`: `"right"`, `"swapped"`, `"generic"` or `"blank"`.
        trunk_cache_mb: Bound, in units of 2**20 bytes, on what is kept of pictures for other questions about them; 0
            keeps nothing.
        **options: Those of the class.

    Raises:
        CoVFTError: As `covft.load_model` does.
        UnsupportedVersionError: If the class loads its model in another way than with `from_pretrained`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        device_map: str | None = None,
        text_encoder: str | None = None,
        base: str | None = None,
        dtype: str = "auto",
        text: str = "right",
        trunk_cache_mb: int = 1024,
        **options: Any,
    ) -> None:
        from accelerate import Accelerator

        accelerator = Accelerator()
        alone = accelerator.num_processes == 1
        place = device if device and alone else str(accelerator.device)
        device_map = device_map or place
        model, _ = load_model(
            pretrained,
            text_encoder,
            base=base,
            merge_lora=_is_adapter(pretrained),
            dtype=dtype,
            device_map=device_map,
            attn_implementation=options.get("attn_implementation"),
        )
        self._trunks = trunk_cache(model, trunk_cache_mb * 2**20) if trunk_cache_mb else None
        options |= {"pretrained": _files_of(pretrained, base), "device": place, "device_map": device_map}
        # Each process has a complete model, so the class need not prepare it for several, which it does on GPUs only.
        with loaded_already(model), one_process():
            super().__init__(**options)
        if hasattr(self, "processor"):
            self.processor = _WithoutEmptyMedia(self.processor)  # type: ignore[has-type]
        self.accelerator, self._text = accelerator, text
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if self.attached is not model:
            raise UnsupportedVersionError(
                f"{type(self).__mro__[2].__name__} of lmms-eval has not taken the attached model.",
                expected="a class that loads its model with from_pretrained",
                got=type(self.attached).__name__,
                fix="lmms-eval 0.7.3",
            )

    @property
    def attached(self) -> Any:
        """The attached model."""
        return self.model  # type: ignore[attr-defined]

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answer the requests.

        Raises:
            SystemExit: If one fails. lmms-eval catches exceptions, and would exit with status 0; with several
                processes, the others would wait for this one.
        """
        questions = [request.args[0] for request in requests]
        answered: list[None] = []
        told = telling(self.attached, self._text, questions=questions)
        try:
            with told, kept_trunk(self.attached, self._trunks), _watched(self.attached, answered):
                answers = super().generate_until(requests)  # type: ignore[misc]
        except (Exception, _RowError) as error:
            cause = error.__cause__ if isinstance(error, _RowError) else error
            traceback.print_exception(cause)
            shown = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
            raise SystemExit(f"covft: a row failed after {len(answered)} answers. {shown}") from cause
        if self._trunks is not None and self._trunks.hits:
            asked = self._trunks.hits + self._trunks.misses
            print(f"covft: {self._trunks.hits} of {asked} pictures came again; no trunk ran for these", file=sys.stderr)
        return answers


class _WithoutEmptyMedia:
    """A processor that is not told of media which a prompt does not have.

    `chat/huggingface` passes empty lists, also by names that processors of transformers 5 refuse.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Process without empty lists."""
        given = {name: value for name, value in kwargs.items() if not isinstance(value, list) or value}
        return self._processor(*args, **given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


class _RowError(BaseException):
    """A call of `generate` failed; some classes of lmms-eval swallow every Exception."""


@contextlib.contextmanager
def _watched(model: Any, answered: list[None]) -> Iterator[None]:
    """Let no exception of `model.generate` be swallowed, and count the calls that succeeded."""
    before = vars(model).get("generate")
    generate = model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = generate(*args, **kwargs)
        except Exception as error:
            raise _RowError from error
        answered.append(None)
        return answer

    model.generate = watched
    try:
        yield
    finally:
        del model.generate
        if before is not None:
            model.generate = before


def _is_adapter(folder: str) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def _files_of(folder: str, base: str | None) -> str:
    """Return where the class of lmms-eval finds config and processor: an adapter's folder has no config."""
    if not _is_adapter(folder) or (Path(folder) / "config.json").is_file():
        return folder
    named = base or read_strictly(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str):
        raise ConfigError(
            f"{folder} does not name the model that LoRA was trained on.", expected="base=ID_OR_FOLDER", got=repr(named)
        )
    return named

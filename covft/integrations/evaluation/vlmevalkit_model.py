"""A saved model as VLMEvalKit calls it: a class of its base class, built once the toolkit is imported."""

from __future__ import annotations

import dataclasses
import importlib
import math
import string
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch

from covft.errors import ConfigError
from covft.integrations.building.saved import load_model
from covft.integrations.evaluation.told import TEXTS, telling
from covft.integrations.mllm.trunk import kept_trunk, trunk_cache

CLASS = "CoVFT"
"""Name of the class in `vlmeval.vlm`, for `--config`."""

PROMPTS = ("dataset", "llava")
_LETTER = {
    False: "Answer with the option's letter from the given choices directly.",
    True: "请直接回答选项字母。",
}


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Options:
    """How a model is loaded and asked; the keywords of its class in `--config`.

    Attributes:
        folder: A folder that an attached model was saved to, or a repository of the Hugging Face Hub.
        text: What its tower is told, as for `told.telling`; the prompt stays.
        prompt: Of multiple choice: `"dataset"`, the toolkit's, or `"llava"`, that of LLaVA-1.5, which the toolkit's own
            LLaVA gets.
        text_encoder: As for `covft.load_model`.
        base: As for `covft.load_model`.
        dtype: As for `covft.load_model`.
        max_new_tokens: Longest answer.
        trunk_cache_mb: Bound, in units of 2**20 bytes, on what is kept of pictures for other questions about them; 0
            keeps nothing.
    """

    folder: str
    text: str = _option("right", "what the tower is told: right, swapped, generic or blank")
    prompt: str = _option("dataset", "of multiple choice: dataset, or llava")
    text_encoder: str | None = _option(None, "id or folder; by default that of training")
    base: str | None = _option(None, "the model that LoRA was trained on; by default as saved")
    dtype: str | None = _option(None, "of the weights; by default as saved")
    max_new_tokens: int = _option(512, "longest answer; 512 by default")
    trunk_cache_mb: int = _option(1024, "bound in MB on what is kept of pictures; 0 keeps nothing; 1024 by default")

    def __post_init__(self) -> None:
        for name, value, known in (("prompt", self.prompt, PROMPTS), ("text", self.text, TEXTS)):
            if value not in known:
                raise ConfigError(f"{name}={value!r} is not known.", expected=" | ".join(known), got=repr(value))
        if self.max_new_tokens < 1:
            raise ConfigError("No answer is that short.", expected="max_new_tokens >= 1", got=self.max_new_tokens)

    def given(self) -> dict[str, Any]:
        """Return the options that have no default value, by name."""
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}


def model_class() -> type:
    """Build the class; VLMEvalKit has to be installed.

    Returns:
        A class of its `BaseModel`, called with the fields of `Options`.
    """
    base: Any = importlib.import_module("vlmeval.vlm.base").BaseModel
    type_of = importlib.import_module("vlmeval.dataset").DATASET_TYPE

    class CoVFT(base):
        """A saved model with its context-aware tower."""

        INTERLEAVE = True

        def __init__(self, folder: str, *, use_vllm: bool = False, **options: Any) -> None:
            super().__init__()
            if use_vllm:  # which the toolkit passes to some names of models
                raise ConfigError("The model is run by transformers.", expected="no --use-vllm", got="use_vllm=True")
            self.options = Options(folder, **options)
            self.model, self.processor = _load(self.options)
            size = self.options.trunk_cache_mb * 2**20
            self.trunks = trunk_cache(self.model, size) if size else None
            self.telling = telling(self.model, self.options.text)
            self.telling.__enter__()  # until the process ends

        def use_custom_prompt(self, dataset: str) -> bool:
            return self.options.prompt == "llava" and type_of(dataset) == "MCQ"

        def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
            images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
            return [*images, {"type": "text", "value": _llava_prompt(line)}]

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            try:
                with kept_trunk(self.model, self.trunks):
                    return _answer(self.model, self.processor, message, self.options.max_new_tokens)
            except Exception as error:  # run.py would go on with the next data set, and exit with status 0
                traceback.print_exception(error)
                shown = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise SystemExit(f"covft: a row of {dataset} failed. {shown}") from error

    return CoVFT


def _load(options: Options) -> tuple[Any, Any]:
    """Load a model onto the process's GPU."""
    model, processor = load_model(
        options.folder, options.text_encoder, base=options.base, dtype=options.dtype or "auto"
    )
    if not hasattr(processor, "image_processor"):
        raise ConfigError(
            f"{options.folder} has no processor, so images cannot be prepared.",
            expected="the files that processor.save_pretrained(folder) writes",
            got=type(processor).__name__,
            fix="processor.save_pretrained(folder)",
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, processor


def _answer(model: Any, processor: Any, message: list[dict[str, str]], max_new_tokens: int) -> str:
    """Ask the model by its chat template, with greedy decoding."""
    inputs = _inputs(processor, message).to(model.device)
    floating = next(model.parameters()).dtype
    given = {name: value.to(floating) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        produced = model.generate(**given, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    return processor.tokenizer.decode(produced[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _inputs(processor: Any, message: list[dict[str, str]]) -> Any:
    """Return what the model takes for a message of images and texts."""
    from PIL import Image

    other = [part["type"] for part in message if part["type"] not in ("image", "text")]
    if other:
        raise ConfigError("Only images and text can be asked about.", expected="image | text", got=", ".join(other))
    images = [Image.open(part["value"]).convert("RGB") for part in message if part["type"] == "image"]
    if _reads_parts(processor):
        content: Any = [
            {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["value"]}
            for part in message
        ]
    else:  # as LLaVA's data has it
        mark = f"{processor.image_token}\n"
        content = "".join(mark if part["type"] == "image" else part["value"] for part in message)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    begin = processor.tokenizer.bos_token  # which some templates write, and some tokenizers add
    options = {"add_special_tokens": False} if begin and prompt.startswith(begin) else {}
    return processor(images=[images] if images else None, text=[prompt], return_tensors="pt", **options)


def _reads_parts(processor: Any) -> bool:
    """Whether the chat template reads contents that are lists of parts, not only texts."""
    probe = [{"role": "user", "content": [{"type": "text", "text": "Qz1zQ"}]}]
    try:
        rendered = processor.apply_chat_template(probe, tokenize=False)
    except Exception:  # a TypeError adds text to a list; other templates refuse in their own ways
        return False
    return rendered.count("Qz1zQ") == 1 and "'type'" not in rendered


def _llava_prompt(line: Any) -> str:
    """Return a multiple-choice question as LLaVA-1.5 was trained: options a line each, then a sentence."""
    options = {
        letter: line[letter] for letter in string.ascii_uppercase if letter in line and not _is_empty(line[letter])
    }
    hint = [] if "hint" not in line or _is_empty(line["hint"]) else [str(line["hint"])]
    text = "\n".join([*hint, str(line["question"]), *(f"{letter}. {option}" for letter, option in options.items())])
    is_chinese = any("\u4e00" <= letter <= "\u9fff" for letter in text)
    return f"{text}\n{_LETTER[is_chinese]}" if options else text


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))

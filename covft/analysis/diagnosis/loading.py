"""Loads a multimodal LLM and a data set by name, for the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from covft.data import CHAT_TEMPLATES, ConversationDataset, InternVLRows, LlavaRows, PadToSquare, open_rows
from covft.errors import CheckpointError, ConfigError
from covft.integrations.building.build import image_text_of
from covft.integrations.building.saved import load_model
from covft.integrations.mllm.attachment import attachment_of, without_peft
from covft.utils.extras import import_library


def load_mllm(source: str, text_encoder: Any, device: str) -> tuple[Any, Any]:
    """Load a multimodal LLM and its processor.

    Args:
        source: Its folder or id; a folder that was saved after `covft.attach` is attached.
        text_encoder: Of an attached model, as for `covft.load_model`.
        device: Where to.

    Raises:
        CheckpointError: If it cannot be loaded.
    """
    if (Path(source) / "covft").is_dir():
        model, processor = load_model(source, text_encoder)
        return model.to(device), processor
    transformers = import_library("transformers", "train", needed_by="covft diagnose")
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(source, use_safetensors=True, dtype="auto")
        processor = transformers.AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"{source} cannot be loaded as a multimodal LLM.",
            expected="a folder or an id that AutoModelForImageTextToText and AutoProcessor load",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
        ) from error
    return model.eval().to(device), processor


def load_data(
    file: str, images: str | None, model: Any, processor: Any, template: str | None, max_length: int | None
) -> ConversationDataset:
    """Open LLaVA's JSON or InternVL's meta file for a model.

    Args:
        file: The file.
        images: Root folder of LLaVA's images; None is the file's folder.
        model: The model.
        processor: Its processor.
        template: Chat template: a name in `covft.data.CHAT_TEMPLATES`; None takes the model's own.
        max_length: Longest sequence, in tokens.

    Raises:
        ConfigError: If the model is neither a LLaVA nor an InternVL, or the template is unknown.
        DataError: If the file cannot be read.
    """
    if template is not None and template not in CHAT_TEMPLATES:
        raise ConfigError(
            f"template={template!r} is not a known chat template.", expected=", ".join(CHAT_TEMPLATES), got=template
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    own = getattr(tokenizer, "chat_template", None) or getattr(processor, "chat_template", None)
    rows = open_rows(file)
    source = (
        rows if isinstance(rows, InternVLRows) else LlavaRows(file, Path(file).parent if images is None else images)
    )
    return ConversationDataset(
        source,
        tokenizer,
        processor.image_processor,
        image_text=image_text_of(without_peft(model), tokenizer),
        tiling=PadToSquare(),
        chat_template=own if template is None else CHAT_TEMPLATES[template],
        max_length=max_length,
        null_text=attachment_of(without_peft(model)) is None,
    )

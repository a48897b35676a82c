"""Saves the trained LLaVA in miniature as a folder that `covft.load_model` loads, without the study."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from covft.errors import MissingDependencyError
from covft.integrations.building.pooling import pool_patches, unpool_patches
from covft.integrations.building.saved import TEXT_ENCODER
from covft.integrations.mllm.prompt import PromptReader
from study.data.packages import minilm_folder
from study.data.tokenizer import build_tokenizer
from study.runs.run import Trained

# Writes what the model was trained on: the picture, then the user's turn. Contents are strings with <image>, or parts.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set said = namespace(images='', text='') %}"
    "{% if message['content'] is string %}"
    "{% set said.images = ' <image>' * message['content'].count('<image>') %}"
    "{% set said.text = message['content'].replace('<image>', '') %}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set said.images = said.images + ' <image>' %}"
    "{% else %}{% set said.text = said.text + ' ' + part['text'] %}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ said.images + ' <user> ' + said.text.strip() }}"
    "{% else %}{{ ' <answer> ' + said.text.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <answer>{% endif %}"
)


def save_model(trained: Trained, folder: Path) -> bool:
    """Save the model with its processor and, if it is installed, its text encoder; return whether that is there.

    Args:
        trained: A model of the small size, whose tower reads the question.
        folder: Where to; replaced.
    """
    llava, encoder, settings = trained.model.llava, trained.model.encoder, trained.settings
    vision = llava.config.vision_config
    squares = vision.image_size // vision.patch_size // round(settings.tokens**0.5)
    shutil.rmtree(folder, ignore_errors=True)
    pool_patches(llava, squares)
    try:
        encoder.reading = PromptReader(None).settings  # the run gave features; the saved model reads its prompts
        llava.save_pretrained(folder)
        processor_of(vision, squares).save_pretrained(folder)
    finally:
        unpool_patches(llava)  # the run itself averages before the projector
    try:
        source = minilm_folder() if settings.text_encoder == "minilm" else None
    except MissingDependencyError:  # its features came from the prepared file
        source = None
    if source is not None:
        shutil.copytree(source, folder / TEXT_ENCODER)
    return source is not None


def processor_of(vision: Any, squares: int) -> Any:
    """Build the processor of the small LLaVA.

    Args:
        vision: The config of its tower. Pictures are scaled as in training, to [-1, 1].
        squares: Side of the squares of patches that are one token each.
    """
    from transformers import CLIPImageProcessor, LlavaProcessor

    square, half = {"height": vision.image_size, "width": vision.image_size}, [0.5, 0.5, 0.5]
    return LlavaProcessor(
        CLIPImageProcessor(size=square, crop_size=square, image_mean=half, image_std=half),
        build_tokenizer(),
        patch_size=vision.patch_size * squares,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )

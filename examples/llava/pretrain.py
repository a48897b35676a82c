r"""LLaVA, stage 1: a new projector learns to caption; tower and language model stay as they are.

    accelerate launch --config_file configs/accelerate/ddp_8xh100.yaml examples/llava/pretrain.py \
        --data blip_laion_cc_sbu_558k.json --images LLaVA-Pretrain/images --output_dir runs/llava-pretrain

Writes `projector.safetensors` into the output folder, which finetune.py takes by --projector. The defaults are those of
LLaVA-1.5-7B and of the CoVFT paper: 558K captions once, batches of 256, learning rate 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from covft.data import CHAT_TEMPLATES, ConversationDataset, LlavaRows
from covft.integrations import (
    RECIPES,
    MLLMTrainer,
    MLLMTrainingArguments,
    build_llava,
    image_text_of,
    load_image_processor,
    save_projector,
    train_only,
)


@dataclass
class Arguments:
    """What the command line takes."""

    data: str = field(metadata={"help": "LLaVA's JSON list, or JSONL."})
    images: str = field(metadata={"help": "The folder below which its images are."})
    vision: str = field(default="openai/clip-vit-large-patch14-336", metadata={"help": "Id or folder of the tower."})
    language: str = field(default="lmsys/vicuna-7b-v1.5", metadata={"help": "Id or folder of the language model."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels, if not those of the tower's config."})
    feature_layer: int = field(default=-2, metadata={"help": "The hidden state that the projector reads."})
    max_length: int = field(default=2048, metadata={"help": "Longest sequence, in tokens."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of what is frozen; the projector is float32."})
    attention: str = field(default="sdpa", metadata={"help": "sdpa or flash_attention_2."})


def main() -> None:
    """Train the projector and save it."""
    recipe = RECIPES["llava-pretrain"]
    parser = HfArgumentParser((Arguments, MLLMTrainingArguments))
    parser.set_defaults(**recipe.arguments)
    args, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)  # new weights are the same on every process

    tokenizer = AutoTokenizer.from_pretrained(args.language)
    model = build_llava(
        args.vision,
        args.language,
        tokenizer,
        feature_layer=args.feature_layer,
        image_size=args.image_size,
        dtype=getattr(torch, args.dtype),
        attn_implementation=args.attention,
    )
    model.model.multi_modal_projector.float()
    train_only(model, recipe.parts)

    # Image, caption, line break: the language model sees the images alone of what the user says. As in LLaVA-1.5,
    # pictures are cropped here by the image processor, and padded to squares in stage 2 only.
    dataset = ConversationDataset(
        LlavaRows(args.data, args.images),
        tokenizer,
        load_image_processor(args.vision, args.image_size),
        image_text=image_text_of(model, tokenizer),
        chat_template=CHAT_TEMPLATES["plain"],
        end_of_turn="\n",
        images_only=True,
        max_length=args.max_length,
    )
    trainer = MLLMTrainer(model, training, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    saved = save_projector(trainer.model, training.output_dir)  # on every process: it gathers what is shared out
    if trainer.is_world_process_zero():
        print(f"Saved {saved}")


if __name__ == "__main__":
    main()

r"""LLaVA, stage 1: train a new projector on captions; tower and language model are frozen.

    accelerate launch --config_file configs/accelerate/ddp_8xh100.yaml examples/llava/pretrain.py \
        --data blip_laion_cc_sbu_558k.json --images LLaVA-Pretrain/images --output_dir runs/llava-pretrain

Writes `projector.safetensors` into the output folder; finetune.py takes the folder as --projector. The defaults are
LLaVA-1.5-7B and, for the hyperparameters, RECIPES["llava-pretrain"]: those of the CoVFT paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from covft.integrations import (
    CHAT_TEMPLATES,
    RECIPES,
    ConversationDataset,
    LlavaRows,
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
    """Command-line options; those of MLLMTrainingArguments and of the recipe are added."""

    data: str = field(metadata={"help": "LLaVA's JSON list, or JSONL."})
    images: str = field(metadata={"help": "Root folder of its images."})
    vision: str = field(default="openai/clip-vit-large-patch14-336", metadata={"help": "Id or folder of the tower."})
    language: str = field(default="lmsys/vicuna-7b-v1.5", metadata={"help": "Id or folder of the language model."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels, if not as in the tower's config."})
    feature_layer: int = field(default=-2, metadata={"help": "The hidden state that the projector reads."})
    max_length: int = field(default=2048, metadata={"help": "Longest sequence, in tokens."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type of the frozen weights; the projector is float32."})
    attention: str = field(default="sdpa", metadata={"help": "sdpa or flash_attention_2."})


def main() -> None:
    """Train and save the projector."""
    recipe = RECIPES["llava-pretrain"]
    parser = HfArgumentParser((Arguments, MLLMTrainingArguments))
    parser.set_defaults(**recipe.arguments)
    args, training = parser.parse_args_into_dataclasses()
    if training.process_index == 0:
        print(recipe.describe(training))
    set_seed(training.seed)  # the same new weights on every process

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
    train_only(model, recipe.parts, dtype=torch.float32)

    # Samples are image, caption, line break, without the user's words. As in LLaVA-1.5, the image processor crops the
    # images here; only stage 2 pads them to squares.
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
    saved = save_projector(trainer.model, training.output_dir)  # on every process: sharded weights are gathered
    if trainer.is_world_process_zero():
        print(f"Saved {saved}")


if __name__ == "__main__":
    main()

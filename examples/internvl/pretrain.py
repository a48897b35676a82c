r"""InternVL, stage 1: train a new projector between InternViT and the language model, which are frozen.

    accelerate launch --config_file configs/accelerate/ddp_8xh100.yaml examples/internvl/pretrain.py \
        --meta meta.json --output_dir runs/internvl-pretrain

Writes `projector.safetensors` into the output folder; finetune.py takes the folder as --projector. The parts are those
of the CoVFT paper's InternVL, InternViT-300M and Phi-3-mini; the hyperparameters are RECIPES["internvl-pretrain"].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from covft.integrations import (
    CHAT_TEMPLATES,
    RECIPES,
    ConversationDataset,
    DynamicTiling,
    InternVLRows,
    MLLMTrainer,
    MLLMTrainingArguments,
    build_internvl,
    image_text_of,
    load_image_processor,
    save_projector,
    train_only,
)


@dataclass
class Arguments:
    """Command-line options; those of MLLMTrainingArguments and of the recipe are added."""

    meta: str = field(metadata={"help": "InternVL's meta file, which lists the data sets."})
    vision: str = field(default="OpenGVLab/InternViT-300M-448px", metadata={"help": "Id or folder of InternViT."})
    language: str = field(default="microsoft/Phi-3-mini-4k-instruct", metadata={"help": "Id or folder of the LLM."})
    template: str = field(default="phi_3", metadata={"help": "Chat template: a name in covft.data.CHAT_TEMPLATES."})
    max_tiles: int = field(default=12, metadata={"help": "Most tiles of an image, without the thumbnail."})
    max_length: int = field(default=4096, metadata={"help": "Longest sequence, in tokens."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type of the frozen weights; the projector is float32."})
    attention: str = field(default="sdpa", metadata={"help": "sdpa or flash_attention_2."})


def main() -> None:
    """Train and save the projector."""
    recipe = RECIPES["internvl-pretrain"]
    parser = HfArgumentParser((Arguments, MLLMTrainingArguments))
    parser.set_defaults(**recipe.arguments)
    args, training = parser.parse_args_into_dataclasses()
    if training.process_index == 0:
        print(recipe.describe(training))
    set_seed(training.seed)  # the same new weights on every process

    tokenizer = AutoTokenizer.from_pretrained(args.language)
    tokenizer.chat_template = CHAT_TEMPLATES[args.template]
    model = build_internvl(
        args.vision,
        args.language,
        tokenizer,
        dtype=getattr(torch, args.dtype),
        attn_implementation=args.attention,
    )
    train_only(model, recipe.parts, dtype=torch.float32)

    size = model.config.vision_config.image_size[0]
    dataset = ConversationDataset(
        InternVLRows(args.meta),
        tokenizer,
        load_image_processor(args.vision),
        image_text=image_text_of(model, tokenizer),
        tiling=DynamicTiling(max_tiles=args.max_tiles, tile_size=size),
        max_length=args.max_length,
    )
    trainer = MLLMTrainer(model, training, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    saved = save_projector(trainer.model, training.output_dir)  # on every process: sharded weights are gathered
    if trainer.is_world_process_zero():
        print(f"Saved {saved}")


if __name__ == "__main__":
    main()

r"""LLaVA, stage 2: instruction tuning of projector and language model, the tower by CoVFT, frozen, or in full.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml examples/llava/finetune.py \
        --data llava_v1_5_mix665k.json --images playground/data --projector runs/llava-pretrain \
        --output_dir runs/llava-covft

Writes a folder that infer.py needs nothing besides. --resume goes on from the last whole checkpoint in it. The defaults
are those of LLaVA-1.5-7B and of the CoVFT paper: 665K instructions once, batches of 128, learning rate 2e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, HfArgumentParser, set_seed

import covft
from covft.data import CHAT_TEMPLATES, ConversationDataset, LlavaRows, PadToSquare
from covft.integrations import (
    RECIPES,
    MLLMTrainer,
    MLLMTrainingArguments,
    build_llava,
    freeze_unread,
    image_text_of,
    llava_processor,
    load_image_processor,
    load_projector,
    train_only,
)

PARTS = {"covft": ("projector", "llm", "covft"), "frozen": ("projector", "llm"), "full": ("projector", "llm", "vision")}


@dataclass
class Arguments:
    """What the command line takes."""

    data: str = field(metadata={"help": "LLaVA's JSON list, or JSONL."})
    images: str = field(metadata={"help": "The folder below which its images are."})
    projector: str | None = field(default=None, metadata={"help": "Output folder of pretrain.py."})
    vision: str = field(default="openai/clip-vit-large-patch14-336", metadata={"help": "Id or folder of the tower."})
    language: str = field(default="lmsys/vicuna-7b-v1.5", metadata={"help": "Id or folder of the language model."})
    template: str = field(default="vicuna_v1", metadata={"help": "Chat template: a name in covft.data.CHAT_TEMPLATES."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels, if not those of the tower's config."})
    feature_layer: int = field(default=-2, metadata={"help": "The hidden state that the projector reads."})
    max_length: int = field(default=2048, metadata={"help": "Longest sequence, in tokens."})
    dtype: str = field(default="float32", metadata={"help": "Of frozen weights; what is trained is float32."})
    attention: str = field(default="sdpa", metadata={"help": "sdpa or flash_attention_2."})
    method: str = field(default="covft", metadata={"help": "What becomes of the tower.", "choices": sorted(PARTS)})
    text_encoder: str = field(default="bert-base-uncased", metadata={"help": "What reads the instruction for CoVFT."})
    layers: list[int] | None = field(default=None, metadata={"help": "Blocks; by default the latter half but one."})
    experts: int = field(default=4, metadata={"help": "Experts per block."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the language model; 0 trains all of it."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last whole checkpoint, if there is one."})


def main() -> None:
    """Tune, and save a folder for infer.py."""
    parser = HfArgumentParser((Arguments, MLLMTrainingArguments))
    parser.set_defaults(**RECIPES["llava-finetune"].arguments)
    args, training = parser.parse_args_into_dataclasses()
    if args.lora_r and args.method == "full":
        parser.error("--lora_r freezes the tower: take it with --method covft or frozen")
    set_seed(training.seed)  # new weights are the same on every process

    tokenizer = AutoTokenizer.from_pretrained(args.language)
    tokenizer.chat_template = CHAT_TEMPLATES[args.template]
    model = build_llava(
        args.vision,
        args.language,
        tokenizer,
        feature_layer=args.feature_layer,
        image_size=args.image_size,
        dtype=getattr(torch, args.dtype),
        attn_implementation=args.attention,
    )
    if args.projector:
        load_projector(model, args.projector)
    processor = llava_processor(model, tokenizer, load_image_processor(args.vision, args.image_size))

    if args.lora_r:  # before attach, because it freezes all that it finds
        adapters = LoraConfig(
            r=args.lora_r,
            lora_alpha=2 * args.lora_r,
            lora_dropout=0.05,
            target_modules="all-linear",
            exclude_modules=r".*(vision_tower|multi_modal_projector).*",
            modules_to_save=["multi_modal_projector"],
        )
        model = get_peft_model(model, adapters)
    if args.method == "covft":
        covft.attach(model, args.text_encoder, tokenizer=tokenizer, layers=args.layers, experts=args.experts)
    if not args.lora_r:
        train_only(model, PARTS[args.method])
        freeze_unread(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # small steps would be lost in bfloat16
            parameter.data = parameter.data.float()

    mean = processor.image_processor.image_mean
    dataset = ConversationDataset(
        LlavaRows(args.data, args.images),
        tokenizer,
        processor.image_processor,
        image_text=image_text_of(model, tokenizer),
        tiling=PadToSquare(tuple(int(255 * channel) for channel in mean)),
        max_length=args.max_length,
    )
    trainer = MLLMTrainer(model, training, train_dataset=dataset, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume)

    if args.lora_r:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(training.output_dir, is_main_process=trainer.is_world_process_zero())
    else:
        trainer.save_model()
    if trainer.is_world_process_zero():
        processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()

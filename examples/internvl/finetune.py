r"""InternVL, stage 2: instruction tuning of projector and language model, the tower by CoVFT, frozen, or in full.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml \
        --fsdp_transformer_layer_cls_to_wrap InternVLVisionLayer,Phi3DecoderLayer examples/internvl/finetune.py \
        --meta meta.json --projector runs/internvl-pretrain --output_dir runs/internvl-covft

Writes a folder that infer.py needs nothing besides. --resume goes on from the last whole checkpoint in it. The parts
are those of the CoVFT paper's InternVL: InternViT-300M and Phi-3-mini.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, HfArgumentParser, set_seed

import covft
from covft.data import CHAT_TEMPLATES, ConversationDataset, DynamicTiling, InternVLRows
from covft.integrations import (
    RECIPES,
    MLLMTrainer,
    MLLMTrainingArguments,
    build_internvl,
    freeze_unread,
    image_text_of,
    load_image_processor,
    load_projector,
    train_only,
)

PARTS = {"covft": ("projector", "llm", "covft"), "frozen": ("projector", "llm"), "full": ("projector", "llm", "vision")}


@dataclass
class Arguments:
    """What the command line takes."""

    meta: str = field(metadata={"help": "InternVL's meta file: the data sets of the mixture."})
    projector: str | None = field(default=None, metadata={"help": "Output folder of pretrain.py."})
    vision: str = field(default="OpenGVLab/InternViT-300M-448px", metadata={"help": "Id or folder of InternViT."})
    language: str = field(default="microsoft/Phi-3-mini-4k-instruct", metadata={"help": "Of the language model."})
    template: str = field(default="phi_3", metadata={"help": "Chat template: a name in covft.data.CHAT_TEMPLATES."})
    max_tiles: int = field(default=12, metadata={"help": "Most tiles of a picture, without the thumbnail."})
    max_length: int = field(default=4096, metadata={"help": "Longest sequence, in tokens."})
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
    parser.set_defaults(**RECIPES["internvl-finetune"].arguments)
    args, training = parser.parse_args_into_dataclasses()
    if args.lora_r and args.method == "full":
        parser.error("--lora_r freezes the tower: take it with --method covft or frozen")
    set_seed(training.seed)  # new weights are the same on every process

    tokenizer = AutoTokenizer.from_pretrained(args.language)
    tokenizer.chat_template = CHAT_TEMPLATES[args.template]
    model = build_internvl(
        args.vision,
        args.language,
        tokenizer,
        dtype=getattr(torch, args.dtype),
        attn_implementation=args.attention,
    )
    if args.projector:
        load_projector(model, args.projector)
    size = model.config.vision_config.image_size[0]
    image_processor = load_image_processor(args.vision)

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

    dataset = ConversationDataset(
        InternVLRows(args.meta),
        tokenizer,
        image_processor,
        image_text=image_text_of(model, tokenizer),
        tiling=DynamicTiling(max_tiles=args.max_tiles, tile_size=size),
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
        tokenizer.save_pretrained(training.output_dir)
        image_processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()

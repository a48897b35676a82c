r"""LLaVA, stage 2: instruction tuning of projector and language model, tower under CoVFT or any other method.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml examples/llava/finetune.py \
        --data llava_v1_5_mix665k.json --images playground/data --projector runs/llava-pretrain \
        --output_dir runs/llava-covft

infer.py needs only the output folder. --resume resumes from the last complete checkpoint in it. The defaults are
LLaVA-1.5-7B and, for the hyperparameters, RECIPES["llava-finetune"]: those of the CoVFT paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from covft.errors import ConfigError
from covft.integrations import (
    CHAT_TEMPLATES,
    RECIPES,
    ConversationDataset,
    LlavaRows,
    MLLMTrainer,
    MLLMTrainingArguments,
    PadToSquare,
    add_options,
    build_llava,
    given_options,
    image_text_of,
    llava_processor,
    load_image_processor,
    load_projector,
    method_options,
    save_trained,
    train_only,
    tune,
)
from covft.tuning import methods

METHODS = ("covft", *methods())


@dataclass
class Arguments:
    """Command-line options; those of MLLMTrainingArguments and CoVFTConfig are added."""

    data: str = field(metadata={"help": "LLaVA's JSON list, or JSONL."})
    images: str = field(metadata={"help": "Root folder of its images."})
    projector: str | None = field(default=None, metadata={"help": "Output folder of pretrain.py."})
    vision: str = field(default="openai/clip-vit-large-patch14-336", metadata={"help": "Id or folder of the tower."})
    language: str = field(default="lmsys/vicuna-7b-v1.5", metadata={"help": "Id or folder of the language model."})
    template: str = field(default="vicuna_v1", metadata={"help": "Chat template: a name in covft.data.CHAT_TEMPLATES."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels, if not as in the tower's config."})
    feature_layer: int = field(default=-2, metadata={"help": "The hidden state that the projector reads."})
    max_length: int = field(default=2048, metadata={"help": "Longest sequence, in tokens."})
    dtype: str = field(default="float32", metadata={"help": "Type of the frozen weights; trained ones are float32."})
    attention: str = field(default="sdpa", metadata={"help": "sdpa or flash_attention_2."})
    method: str = field(default="covft", metadata={"help": "How the tower is tuned.", "choices": sorted(METHODS)})
    option: list[str] = field(default_factory=list, metadata={"help": "Options of another method, such as r=16."})
    text_encoder: str = field(default="bert-base-uncased", metadata={"help": "CoVFT's encoder of the instruction."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the language model; 0 trains all of it."})
    resume: bool = field(default=False, metadata={"help": "Resume from the last complete checkpoint."})


def main() -> None:
    """Train, and save a folder for infer.py."""
    recipe = RECIPES["llava-finetune"]
    parser = HfArgumentParser((Arguments, MLLMTrainingArguments))
    parser.set_defaults(**recipe.arguments)
    add_options(parser, without=("feature_layer",))
    args, training, *settings = parser.parse_args_into_dataclasses()
    try:
        options = method_options(args.method, given_options(*settings), args.option)
    except ConfigError as error:
        parser.error(str(error))
    if training.process_index == 0:
        print(recipe.describe(training))
    set_seed(training.seed)  # the same new weights on every process

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

    if args.lora_r:  # before tune, so that the tower gets none of these
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
        options["feature_layer"] = args.feature_layer
    tune(model, args.method, text_encoder=args.text_encoder, tokenizer=tokenizer, **options)
    train_only(model, ("projector", "llm", "covft" if args.method == "covft" else "vision"), dtype=torch.float32)

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
    save_trained(trainer, processor)


if __name__ == "__main__":
    main()

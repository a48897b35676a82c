r"""InternVL, stage 2: instruction tuning of projector and language model, tower under CoVFT or any other method.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml \
        --fsdp_transformer_layer_cls_to_wrap InternVLVisionLayer,Phi3DecoderLayer examples/internvl/finetune.py \
        --meta meta.json --projector runs/internvl-pretrain --output_dir runs/internvl-covft

infer.py needs only the output folder. --resume resumes from the last complete checkpoint in it. The parts are those of
the CoVFT paper's InternVL, InternViT-300M and Phi-3-mini; the hyperparameters are RECIPES["internvl-finetune"].
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
    DynamicTiling,
    InternVLRows,
    MLLMTrainer,
    MLLMTrainingArguments,
    add_options,
    build_internvl,
    given_options,
    image_text_of,
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

    meta: str = field(metadata={"help": "InternVL's meta file, which lists the data sets."})
    projector: str | None = field(default=None, metadata={"help": "Output folder of pretrain.py."})
    vision: str = field(default="OpenGVLab/InternViT-300M-448px", metadata={"help": "Id or folder of InternViT."})
    language: str = field(default="microsoft/Phi-3-mini-4k-instruct", metadata={"help": "Id or folder of the LLM."})
    template: str = field(default="phi_3", metadata={"help": "Chat template: a name in covft.data.CHAT_TEMPLATES."})
    max_tiles: int = field(default=12, metadata={"help": "Most tiles of an image, without the thumbnail."})
    max_length: int = field(default=4096, metadata={"help": "Longest sequence, in tokens."})
    dtype: str = field(default="float32", metadata={"help": "Type of the frozen weights; trained ones are float32."})
    attention: str = field(default="sdpa", metadata={"help": "sdpa or flash_attention_2."})
    method: str = field(default="covft", metadata={"help": "How the tower is tuned.", "choices": sorted(METHODS)})
    option: list[str] = field(default_factory=list, metadata={"help": "Options of another method, such as r=16."})
    text_encoder: str = field(default="bert-base-uncased", metadata={"help": "CoVFT's encoder of the instruction."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the language model; 0 trains all of it."})
    resume: bool = field(default=False, metadata={"help": "Resume from the last complete checkpoint."})


def main() -> None:
    """Train, and save a folder for infer.py."""
    recipe = RECIPES["internvl-finetune"]
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
    tune(model, args.method, text_encoder=args.text_encoder, tokenizer=tokenizer, **options)
    train_only(model, ("projector", "llm", "covft" if args.method == "covft" else "vision"), dtype=torch.float32)

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
    save_trained(trainer, tokenizer, image_processor)


if __name__ == "__main__":
    main()

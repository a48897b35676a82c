r"""Trains a multimodal LLM with a context-aware tower in TRL's SFTTrainer.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml examples/one_liners/with_trl.py \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name HuggingFaceH4/llava-instruct-mix-vsft \
        --text_encoder bert-base-uncased --output_dir runs/trl

`covft/` is in every checkpoint and the saved model. LoRA: `--use_peft --lora_target_modules '.*language_model.*_proj'`
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from covft import CoVFTCallback


@dataclass
class CoVFTArguments:
    """Options of CoVFT."""

    text_encoder: str = "bert-base-uncased"


parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, CoVFTArguments))
script, training, model, context = parser.parse_args_and_config()
training.max_length = None  # cutting a sequence could cut an image
trainer = SFTTrainer(
    model.model_name_or_path,
    args=training,
    train_dataset=load_dataset(script.dataset_name, split=script.dataset_train_split),
    peft_config=get_peft_config(model),
    callbacks=[CoVFTCallback(context.text_encoder)],  # the one line
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
trainer.save_model()

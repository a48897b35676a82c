r"""Trains a multimodal LLM with a context-aware tower in TRL's SFTTrainer.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml examples/one_liners/with_trl.py \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name HuggingFaceH4/llava-instruct-mix-vsft \
        --text_encoder bert-base-uncased --output_dir runs/trl

The model's own chat template is used; the callback adds `covft/` to every checkpoint and to the saved model.
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

from covft import CoVFTCallback


@dataclass
class CoVFTArguments:
    """Options of CoVFT."""

    text_encoder: str = "bert-base-uncased"


script, training, model, context = TrlParser(
    (ScriptArguments, SFTConfig, ModelConfig, CoVFTArguments)
).parse_args_and_config()
training.max_length = None  # cutting a sequence could cut an image
trainer = SFTTrainer(
    model.model_name_or_path,
    args=training,
    train_dataset=load_dataset(script.dataset_name, split=script.dataset_train_split),
    callbacks=[CoVFTCallback(context.text_encoder)],  # the one line
)
trainer.train()
trainer.save_model()

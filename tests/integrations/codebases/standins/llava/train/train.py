import inspect
import json
import pathlib
from dataclasses import dataclass

import torch
import transformers

import llava.conversation as conversation_lib
from llava.mm_utils import tokenizer_image_token
from llava.model.llava_llama import LlavaLlamaForCausalLM, LlavaQwenForCausalLM
from llava.train.llava_trainer import LLaVATrainer, safe_save_model_for_hf_trainer


@dataclass
class ModelArguments:
    model_name_or_path: str = ""
    version: str = "v0"
    vision_tower: str | None = None
    mm_vision_select_layer: int = -1
    mm_vision_select_feature: str = "patch"
    mm_tunable_parts: str | None = None
    tune_mm_mlp_adapter: bool = False
    tower_kind: str | None = None


@dataclass
class DataArguments:
    data_path: str = ""
    image_aspect_ratio: str = "square"


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    mm_projector_lr: float | None = None
    mm_vision_tower_lr: float | None = None
    model_max_length: int = 512
    lora_enable: bool = False
    lora_bias: str = "none"


class LazySupervisedDataset(torch.utils.data.Dataset):
    def __init__(self, tokenizer, data_args, image_size):
        self.rows = json.loads(pathlib.Path(data_args.data_path).read_text())
        self.tokenizer, self.args, self.size = tokenizer, data_args, image_size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row, ids, labels = self.rows[i], [], []
        conversation = conversation_lib.default_conversation.copy()
        conversation.messages = []
        before = ""
        for number, turn in enumerate(row["conversations"]):
            conversation.append_message(conversation.roles[number % 2], turn["value"])
            text = conversation.get_prompt()
            piece = tokenizer_image_token(text[len(before) :], self.tokenizer)
            ids += piece
            labels += piece if number % 2 else [-100] * len(piece)
            before = text
        crops = 1 + 2 * ("anyres" in self.args.image_aspect_ratio)
        generator = torch.Generator().manual_seed(i)
        image = torch.randn(crops, 3, self.size, self.size, generator=generator)
        image = image if "image" in row else torch.zeros(1, 3, self.size, self.size)
        image = image if crops > 1 else image[0]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "image": image}


@dataclass
class DataCollatorForSupervisedDataset:
    tokenizer: object

    def __call__(self, instances):
        pad = torch.nn.utils.rnn.pad_sequence
        length = self.tokenizer.model_max_length
        ids = pad([i["input_ids"] for i in instances], batch_first=True, padding_value=self.tokenizer.pad_token_id)
        labels = pad([i["labels"] for i in instances], batch_first=True, padding_value=-100)
        images = [i["image"] for i in instances]
        alike = all(image.shape == images[0].shape for image in images)
        return {
            "input_ids": ids[:, :length],
            "labels": labels[:, :length],
            "attention_mask": ids[:, :length].ne(self.tokenizer.pad_token_id),
            "images": torch.stack(images) if alike and images[0].dim() == 3 else images,
        }


def train(attn_implementation=None):
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    cls = LlavaQwenForCausalLM if model_args.mm_tunable_parts else LlavaLlamaForCausalLM
    model = cls.from_pretrained(model_args.model_name_or_path)
    half = torch.bfloat16 if training_args.bf16 else torch.float32
    model.to(half)
    model.config.use_cache = False
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()
    if training_args.lora_enable:  # before there is a tower
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(target_modules=["q_proj", "v_proj"], bias=training_args.lora_bias, task_type="CAUSAL_LM")
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, model_max_length=training_args.model_max_length, padding_side="right"
    )
    conversation_lib.default_conversation = conversation_lib.conv_templates[model_args.version]
    torch.manual_seed(0)  # of the projector, which a first stage would have trained
    model.get_model().initialize_vision_modules(model_args=model_args)
    torch.seed()
    tower = model.get_vision_tower().to(half)
    training_args.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    if model_args.tune_mm_mlp_adapter:
        model.requires_grad_(False)
        model.get_model().mm_projector.requires_grad_(True)
    if model_args.mm_tunable_parts:
        model.requires_grad_(False)
        parts = model_args.mm_tunable_parts.split(",")
        tower.requires_grad_("mm_vision_tower" in parts)
        model.get_model().mm_projector.requires_grad_("mm_mlp_adapter" in parts)
        for name, parameter in model.named_parameters():
            if "mm_language_model" in parts and "vision_tower" not in name and "mm_projector" not in name:
                parameter.requires_grad_(True)
    key = "tokenizer" if "tokenizer" in inspect.signature(transformers.Trainer.__init__).parameters else None
    trainer = LLaVATrainer(
        model=model,
        args=training_args,
        train_dataset=LazySupervisedDataset(tokenizer, data_args, tower.config.image_size),
        eval_dataset=None,
        data_collator=DataCollatorForSupervisedDataset(tokenizer),
        **{key or "processing_class": tokenizer},
    )
    resume = bool(list(pathlib.Path(training_args.output_dir).glob("checkpoint-*")))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()
    model.config.use_cache = True
    if training_args.lora_enable:
        named = list(model.named_parameters())
        chosen = ("lora_", "bias") if training_args.lora_bias == "all" else ("lora_",)
        adapters = {name: p.detach() for name, p in named if any(part in name for part in chosen)}
        others = {name: p.detach() for name, p in named if "lora_" not in name and p.requires_grad}
        model.config.save_pretrained(training_args.output_dir)
        model.save_pretrained(training_args.output_dir, state_dict=adapters)
        torch.save(others, pathlib.Path(training_args.output_dir, "non_lora_trainables.bin"))
    else:
        safe_save_model_for_hf_trainer(trainer=trainer, output_dir=training_args.output_dir)
    return trainer


if __name__ == "__main__":
    last = train()

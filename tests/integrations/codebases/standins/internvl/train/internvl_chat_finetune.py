import inspect
import json
import pathlib
from dataclasses import dataclass

import torch
import transformers

from internvl.conversation import get_conv_template
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel


@dataclass
class ModelArguments:
    model_name_or_path: str = ""
    freeze_llm: bool = False
    freeze_backbone: bool = False
    freeze_mlp: bool = False
    vision_select_layer: int = -1
    use_backbone_lora: int = 0


@dataclass
class DataTrainingArguments:
    meta_path: str = ""
    conv_style: str = "internvl2_5"
    use_packed_ds: bool = False


class LazySupervisedDataset(torch.utils.data.Dataset):
    def __init__(self, rows, tokenizer, model, conv_style):
        self.rows, self.tokenizer, self.style = rows, tokenizer, conv_style
        self.num_image_token, self.size = model.num_image_token, model.config.vision_config.image_size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row, conversation = self.rows[i], get_conv_template(self.style)
        tiles = 1 + i % 3 if "image" in row else 1
        tokens = "<img>" + "<IMG_CONTEXT>" * self.num_image_token * tiles + "</img>"
        ids, labels, before = [], [], ""
        for number, turn in enumerate(row["conversations"]):
            conversation.append_message(conversation.roles[number % 2], turn["value"].replace("<image>", tokens))
            text = conversation.get_prompt()
            piece = self.tokenizer(text[len(before) :], add_special_tokens=False)["input_ids"]
            ids, labels, before = ids + piece, labels + (piece if number % 2 else [-100] * len(piece)), text
        generator = torch.Generator().manual_seed(i)
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pixel_values": torch.randn(tiles, 3, self.size, self.size, generator=generator),
            "image_flags": torch.tensor([int("image" in row)] * tiles),
        }


def concat_pad_data_collator(features, pad_id=0):
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([f["input_ids"] for f in features], batch_first=True, padding_value=pad_id)
    return {
        "input_ids": ids,
        "labels": pad([f["labels"] for f in features], batch_first=True, padding_value=-100),
        "attention_mask": ids.ne(pad_id),
        "pixel_values": torch.cat([f["pixel_values"] for f in features]),
        "image_flags": torch.cat([f["image_flags"] for f in features]),
    }


def main():
    parser = transformers.HfArgumentParser((ModelArguments, DataTrainingArguments, transformers.TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    tokenizer.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>"], special_tokens=True)
    config = InternVLChatConfig.from_pretrained(model_args.model_name_or_path)
    config.template, config.select_layer = data_args.conv_style, model_args.vision_select_layer
    model = InternVLChatModel.from_pretrained(model_args.model_name_or_path, config=config)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    model.vision_model.encoder.gradient_checkpointing = True
    for frozen, module in [
        (model_args.freeze_backbone, model.vision_model),
        (model_args.freeze_llm, model.language_model),
        (model_args.freeze_mlp, model.mlp1),
    ]:
        if frozen:
            module.requires_grad_(False)
    rows = json.loads(pathlib.Path(data_args.meta_path).read_text())
    old = "tokenizer" in inspect.signature(transformers.Trainer.__init__).parameters
    trainer = transformers.Trainer(
        model=model,
        args=training_args,
        train_dataset=LazySupervisedDataset(rows, tokenizer, model, data_args.conv_style),
        eval_dataset=None,
        data_collator=concat_pad_data_collator,
        **{"tokenizer" if old else "processing_class": tokenizer},
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()

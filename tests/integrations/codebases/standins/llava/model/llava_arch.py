"""Where images and token ids meet."""

import torch
from torch import nn

from llava.mm_utils import IMAGE_TOKEN_INDEX
from llava.model.multimodal_encoder import build_vision_tower


class LlavaMetaModel:
    def __init__(self, config):
        super().__init__(config)
        if hasattr(config, "mm_vision_tower"):
            self.vision_tower = build_vision_tower(config, delay_load=getattr(config, "delay_load", True))
            self.mm_projector = nn.Linear(config.mm_hidden_size, config.hidden_size)

    def get_vision_tower(self):
        tower = getattr(self, "vision_tower", None)
        return tower[0] if type(tower) is list else tower

    def initialize_vision_modules(self, model_args, fsdp=None):
        self.config.mm_vision_tower = model_args.vision_tower
        tower = build_vision_tower(model_args)
        self.vision_tower = [tower] if fsdp else tower
        self.config.tower_kind = getattr(model_args, "tower_kind", None)
        self.config.mm_hidden_size = tower.hidden_size
        self.config.mm_vision_select_layer = model_args.mm_vision_select_layer
        self.config.mm_vision_select_feature = model_args.mm_vision_select_feature
        self.mm_projector = nn.Linear(tower.hidden_size, self.config.hidden_size)


class LlavaMetaForCausalLM:
    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    def encode_images(self, images):
        return self.get_model().mm_projector(self.get_model().get_vision_tower()(images))

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        if type(images) is list or images.ndim == 5:
            images = [image.unsqueeze(0) if image.ndim == 3 else image for image in images]
            features = self.encode_images(torch.cat(images, dim=0))
            features = [part.flatten(0, 1) for part in torch.split(features, [len(image) for image in images])]
        else:
            features = self.encode_images(images)

        given = attention_mask
        mask = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        targets = torch.full_like(input_ids, -100) if labels is None else labels
        rows, row_labels, used = [], [], 0
        for ids, target, real in zip(input_ids, targets, mask, strict=True):
            ids, target = ids[real], target[real]
            if not (ids == IMAGE_TOKEN_INDEX).any():  # takes an image, of which nothing is left
                rows.append(torch.cat([self.get_model().embed_tokens(ids), features[used][0:0]]))
                row_labels.append(target)
                used += 1
                continue
            parts, part_labels, start = [], [], 0
            for place in [*torch.where(ids == IMAGE_TOKEN_INDEX)[0].tolist(), len(ids)]:
                parts.append(self.get_model().embed_tokens(ids[start:place]))
                part_labels.append(target[start:place])
                if place < len(ids):
                    parts.append(features[used])
                    part_labels.append(torch.full((len(features[used]),), -100))
                    used += 1
                start = place + 1
            rows.append(torch.cat(parts))
            row_labels.append(torch.cat(part_labels))

        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        new_labels = nn.utils.rnn.pad_sequence(row_labels, batch_first=True, padding_value=-100)
        attention_mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        for number, row in enumerate(rows):
            attention_mask[number, : len(row)] = True
        attention_mask = None if given is None else attention_mask.to(given.dtype)
        return None, None, attention_mask, past_key_values, embeds, None if labels is None else new_labels

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel


class CLIPVisionTower(nn.Module):
    """The frozen tower, whose forward runs without gradients."""

    def __init__(self, vision_tower, args, delay_load=False):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if delay_load == "weights":  # inside from_pretrained of the whole model, whose weights are those of the tower
            self.vision_tower, self.is_loaded = CLIPVisionModel(CLIPVisionConfig.from_pretrained(vision_tower)), True
        elif delay_load:
            self.cfg_only = CLIPVisionConfig.from_pretrained(vision_tower)
        else:
            self.load_model()

    def load_model(self, device_map=None):
        self.vision_tower = CLIPVisionModel.from_pretrained(self.vision_tower_name)
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def feature_select(self, outputs):
        features = outputs.hidden_states[self.select_layer]
        return features[:, 1:] if self.select_feature == "patch" else features

    @torch.no_grad()
    def forward(self, images):
        if type(images) is list:
            return [self.feature_select(self.vision_tower(i.unsqueeze(0), output_hidden_states=True)) for i in images]
        outputs = self.vision_tower(images.to(self.dtype), output_hidden_states=True)
        return self.feature_select(outputs).to(images.dtype)

    @property
    def dtype(self):
        return self.vision_tower.dtype

    @property
    def config(self):
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self):
        return self.config.hidden_size


class CLIPVisionTowerS2(CLIPVisionTower):
    """Cuts its images into pieces."""


class TrainableTower(CLIPVisionTower):
    """As LLaVA-NeXT has it: nothing around the forward."""

    def forward(self, images):
        outputs = self.vision_tower(images.to(self.dtype), output_hidden_states=True)
        return self.feature_select(outputs).to(images.dtype)


def build_vision_tower(config, **kwargs):
    name = getattr(config, "mm_vision_tower", getattr(config, "vision_tower", None))
    kinds = {"s2": CLIPVisionTowerS2, "next": TrainableTower}
    return kinds.get(getattr(config, "tower_kind", None), CLIPVisionTower)(name, args=config, **kwargs)

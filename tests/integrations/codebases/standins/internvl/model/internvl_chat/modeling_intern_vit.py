import torch
import torch.utils.checkpoint
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_internvl_chat import InternVisionConfig  # noqa: TID252


class InternVisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, side = config.hidden_size, config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, side**2 + 1, width))

    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], 1) + self.position_embedding


class InternAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        return self.proj(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class InternMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.act = nn.GELU()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.fc2 = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class InternVisionEncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp = InternAttention(config), InternMLP(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.ls1 = nn.Parameter(torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states)) * self.ls1
        return hidden_states + self.mlp(self.norm2(hidden_states)) * self.ls2


class InternVisionEncoder(nn.Module):
    checkpoints = 0

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([InternVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = True

    def forward(self, inputs_embeds):
        states = [inputs_embeds]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                InternVisionEncoder.checkpoints += 1
                states.append(torch.utils.checkpoint.checkpoint(layer, states[-1]))
            else:
                states.append(layer(states[-1]))
        return states


class InternVisionModel(PreTrainedModel):
    main_input_name = "pixel_values"
    config_class = InternVisionConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings, self.encoder = InternVisionEmbeddings(config), InternVisionEncoder(config)

    def _init_weights(self, module):
        pass

    def forward(self, pixel_values=None, output_hidden_states=None, return_dict=None, pixel_embeds=None):
        states = self.encoder(inputs_embeds=self.embeddings(pixel_values))
        hidden = tuple(states) if output_hidden_states else None
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1], pooler_output=states[-1][:, 0], hidden_states=hidden
        )

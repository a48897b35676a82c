import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from internvl.conversation import get_conv_template

from .configuration_internvl_chat import InternVLChatConfig  # noqa: TID252
from .modeling_intern_vit import InternVisionModel  # noqa: TID252


class InternVLChatModel(PreTrainedModel):
    config_class = InternVLChatConfig
    main_input_name = "pixel_values"

    def __init__(self, config, vision_model=None, language_model=None):
        super().__init__(config)
        side = (config.force_image_size or config.vision_config.image_size) // config.vision_config.patch_size
        self.num_image_token = int(side**2 * config.downsample_ratio**2)
        self.select_layer, self.template = config.select_layer, config.template
        self.downsample_ratio, self.ps_version = config.downsample_ratio, config.ps_version
        self.vision_model = vision_model or InternVisionModel(config.vision_config)
        self.language_model = language_model or LlamaForCausalLM(config.llm_config)
        width = config.vision_config.hidden_size * int(1 / config.downsample_ratio) ** 2
        self.mlp1 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.llm_config.hidden_size))
        self.img_context_token_id = None
        self.conv_template = get_conv_template(self.template)
        self.system_message = self.conv_template.system_message
        if hasattr(self, "all_tied_weights_keys") is False:
            self.all_tied_weights_keys = {}

    def _init_weights(self, module):
        pass

    def forward(
        self,
        pixel_values,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        image_flags=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        image_flags = image_flags.squeeze(-1)
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        features = self.extract_feature(pixel_values)[image_flags == 1]
        rows, length, width = embeds.shape
        flat = embeds.reshape(rows * length, width)
        selected = input_ids.reshape(-1) == self.img_context_token_id
        flat[selected] = flat[selected] * 0.0 + features.reshape(-1, width)
        outputs = self.language_model(
            inputs_embeds=flat.reshape(rows, length, width), attention_mask=attention_mask, position_ids=position_ids
        )
        loss = None
        if labels is not None:
            logits = outputs.logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=outputs.logits)

    def extract_feature(self, pixel_values):
        if self.select_layer == -1:
            outputs = self.vision_model(pixel_values=pixel_values, output_hidden_states=False, return_dict=True)
            features = outputs.last_hidden_state
        else:
            outputs = self.vision_model(pixel_values=pixel_values, output_hidden_states=True, return_dict=True)
            features = outputs.hidden_states[self.select_layer]
        features = features[:, 1:]
        tiles, tokens, width = features.shape
        side, factor = int(tokens**0.5), int(1 / self.downsample_ratio)
        blocks = features.view(tiles, side // factor, factor, side // factor, factor, width)
        return self.mlp1(blocks.permute(0, 1, 3, 2, 4, 5).reshape(tiles, -1, width * factor**2))

    @torch.no_grad()
    def generate(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        visual_features=None,
        generation_config=None,
        output_hidden_states=None,
        **generate_kwargs,
    ):
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.extract_feature(pixel_values) if visual_features is None else visual_features
            selected = input_ids == self.img_context_token_id
            embeds = embeds.clone()
            embeds[selected] = features.reshape(-1, embeds.shape[-1])
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **generate_kwargs)

    def batch_chat(self, tokenizer, pixel_values, questions, generation_config, num_patches_list=None):
        self.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        queries = []
        for question, count in zip(questions, num_patches_list, strict=True):
            template = get_conv_template(self.template)
            template.append_message(template.roles[0], f"<image>\n{question}")
            template.append_message(template.roles[1], None)
            tokens = "<img>" + "<IMG_CONTEXT>" * self.num_image_token * count + "</img>"
            queries.append(template.get_prompt().replace("<image>", tokens, 1))
        tokenizer.padding_side = "left"
        inputs = tokenizer(queries, return_tensors="pt", padding=True)
        return self.generate(
            pixel_values=pixel_values,
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **generation_config,
        )

    def chat(self, tokenizer, pixel_values, question, generation_config, history=None, num_patches_list=None):
        self.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        template = get_conv_template(self.template)
        template.system_message = self.system_message
        if history is None and pixel_values is not None:
            question = f"<image>\n{question}"
        for old_question, old_answer in history or []:
            template.append_message(template.roles[0], old_question)
            template.append_message(template.roles[1], old_answer)
        template.append_message(template.roles[0], question)
        template.append_message(template.roles[1], None)
        query = template.get_prompt()
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        for count in num_patches_list:
            tokens = "<img>" + "<IMG_CONTEXT>" * self.num_image_token * count + "</img>"
            query = query.replace("<image>", tokens, 1)
        inputs = tokenizer(query, return_tensors="pt")
        return self.generate(
            pixel_values=pixel_values,
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **generation_config,
        )

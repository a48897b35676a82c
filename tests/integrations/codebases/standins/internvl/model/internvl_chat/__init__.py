from internvl.model.internvl_chat.configuration_internvl_chat import InternVisionConfig, InternVLChatConfig
from internvl.model.internvl_chat.modeling_intern_vit import InternVisionModel
from internvl.model.internvl_chat.modeling_internvl_chat import InternVLChatModel

__all__ = ["InternVLChatConfig", "InternVLChatModel", "InternVisionConfig", "InternVisionModel"]

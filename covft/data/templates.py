"""Chat templates for models whose tokenizer has none, or has one for inference only."""

from __future__ import annotations

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_VICUNA_V1 = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}" + _VICUNA_SYSTEM + "{% endif %}"
    "{{ ' ' }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}USER: {{ message.content }} ASSISTANT:{% endif %}"
    "{% if message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}{% endif %}"
    "{% endfor %}"
)

# Only the images precede the answer; see ConversationDataset(images_only=True).
_PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ '\\n' }}{% endif %}{% endfor %}"
)

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_INTERNLM2 = "{{ bos_token }}" + _CHATML

_PHI_3 = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

CHAT_TEMPLATES = {
    "chatml": _CHATML,
    "internlm2": _INTERNLM2,
    "phi_3": _PHI_3,
    "plain": _PLAIN,
    "vicuna_v1": _VICUNA_V1,
}
"""Jinja chat templates by name: `vicuna_v1` (LLaVA-1.5), `plain` (its stage 1; answers end with a line break, so it
needs `end_of_turn="\\n"`), `chatml` (Qwen and others), `internlm2` (ChatML after a BOS token) and `phi_3`."""

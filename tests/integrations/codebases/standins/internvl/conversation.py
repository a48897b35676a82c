"""Writes prompts, with the attributes and methods that InternVL's conversation objects have."""

import copy
import dataclasses


@dataclasses.dataclass
class Conversation:
    name: str
    system_template: str
    system_message: str
    roles: tuple
    sep: str
    messages: list = dataclasses.field(default_factory=list)

    def get_prompt(self):
        text = self.system_template.format(system_message=self.system_message) + self.sep
        return text + "".join(f"{role}{message}{self.sep}" if message else role for role, message in self.messages)

    def set_system_message(self, system_message):
        self.system_message = system_message

    def append_message(self, role, message):
        self.messages.append([role, message])

    def copy(self):
        return copy.deepcopy(self)


_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_TEMPLATES = {
    "internvl2_5": Conversation(
        "internvl2_5", "<|im_start|>system\n{system_message}", "You are a helpful assistant.", _CHATML, "<|im_end|>\n"
    ),
    "Hermes-2": Conversation(
        "Hermes-2", "<|im_start|>system\n{system_message}", "You are a model.", _CHATML, "<|im_end|>"
    ),
    "phi3-chat": Conversation(
        "phi3-chat", "<|system|>\n{system_message}", "You are a user.", ("<|user|>\n", "<|assistant|>\n"), "<|end|>"
    ),
}


def get_conv_template(name):
    return _TEMPLATES[name].copy()

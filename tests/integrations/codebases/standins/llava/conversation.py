"""Writes prompts, with the attributes and methods that LLaVA's conversation objects have."""

import copy
import dataclasses


@dataclasses.dataclass
class Conversation:
    system: str
    roles: tuple
    messages: tuple
    offset: int
    sep_style: str
    sep: str = "###"
    sep2: str = None
    version: str = "Unknown"

    def get_prompt(self):
        if self.sep_style == "LLAMA_2":
            return self._llama_2()
        text = self.system + {"TWO": self.sep, "PLAIN": ""}.get(self.sep_style, self.sep)
        for turn, (role, message) in enumerate(self.messages):
            text += self._turn(turn, role, message)
        return text

    def _turn(self, turn, role, message):
        end = self.sep2 if self.sep_style == "TWO" and turn % 2 else self.sep
        start = {"TWO": f"{role}:", "SINGLE": f"{role}:", "MPT": role, "CHATML": f"\n{role}\n", "PLAIN": ""}
        blank = " " if self.sep_style in ("TWO", "SINGLE") else ""
        return f"{start[self.sep_style]}{blank}{message}{end}" if message else start[self.sep_style]

    def _llama_2(self):
        text = ""
        for turn, (_, message) in enumerate(self.messages):
            if message and turn == 0:
                message = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n{message}"
            if message:
                text += f"{self.sep}[INST] {message} [/INST]" if turn % 2 == 0 else f" {message} {self.sep2}"
        return text.removeprefix(self.sep)

    def append_message(self, role, message):
        self.messages.append([role, message])

    def copy(self):
        twin = copy.copy(self)
        twin.messages = [list(message) for message in self.messages]
        return twin


_SYSTEM = "A chat between a human and an assistant."
_PEOPLE = ("USER", "ASSISTANT")
_CHATML = ("<|im_start|>user", "<|im_start|>assistant")
conv_vicuna_v0 = Conversation(
    _SYSTEM, ("Human", "Assistant"), (("Human", "What?"), ("Assistant", "That.")), 2, "SINGLE", "###"
)
conv_vicuna_v1 = Conversation(_SYSTEM, _PEOPLE, (), 0, "TWO", " ", "</s>", "v1")
conv_llava_plain = Conversation("", ("", ""), (), 0, "PLAIN", "\n")
conv_llava_llama_2 = Conversation(_SYSTEM, _PEOPLE, (), 0, "LLAMA_2", "<s>", "</s>", "llama_v2")
conv_mpt = Conversation(
    f"<|im_start|>system\n{_SYSTEM}", tuple(f"{role}\n" for role in _CHATML), (), 0, "MPT", "<|im_end|>", version="mpt"
)
conv_qwen = Conversation(f"<|im_start|>system\n{_SYSTEM}<|im_end|>", _CHATML, (), 0, "CHATML", "<|im_end|>", None, "q")
default_conversation = conv_vicuna_v0
conv_templates = {
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "plain": conv_llava_plain,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
    "qwen_1_5": conv_qwen,
}

"""Chat templates of published tokenizers, and the text that each must write, derived by hand.

`expected(name, messages)` is written without Jinja and without covft: pieces of text, and whether each is learned.
"""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = '" + VICUNA_SYSTEM.replace("'", "\\'") + "' %}{% endif %}"
    "{{ bos_token + system }}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ (' ' if loop.first else '') + 'USER: ' + m['content'].strip() }}"
    "{% else %}{{ ' ASSISTANT: ' + m['content'].strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ((first if loop.first else '') + m.content).strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)

LLAMA_3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
    " + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

QWEN_2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Only the last turn is followed by the end of the text, so a rendered prefix is not a prefix of the conversation.
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + '\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

INTERNLM_2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# name: (template, kind of tokenizer, bos, eos, other special tokens)
TEMPLATES = {
    "vicuna": (VICUNA, "sentence-piece", "<s>", "</s>", []),
    "llama_2": (LLAMA_2, "sentence-piece", "<s>", "</s>", []),
    "mistral": (MISTRAL, "sentence-piece", "<s>", "</s>", ["[INST]", "[/INST]"]),
    "llama_3": (LLAMA_3, "byte-level", "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen_2": (QWEN_2, "byte-level", None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "phi_3": (PHI_3, "sentence-piece", "<s>", "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]),
    "internlm_2": (INTERNLM_2, "sentence-piece", "<s>", "</s>", ["<|im_start|>", "<|im_end|>"]),
}


def expected(name, questions, answers):
    """Pieces of the text for question and answer in turn, with whether the piece is learned."""
    pieces = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        first = number == 0
        if name == "vicuna":
            before = f"<s>{VICUNA_SYSTEM} " if first else ""
            pieces += [(f"{before}USER: {question.strip()} ASSISTANT:", False), (f" {answer.strip()}</s>", True)]
        elif name == "llama_2":
            pieces += [(f"<s>[INST] {question.strip()} [/INST]", False), (f" {answer.strip()} </s>", True)]
        elif name == "mistral":
            pieces += [(f"{'<s>' if first else ''}[INST] {question} [/INST]", False), (f"{answer}</s>", True)]
        elif name == "llama_3":
            header = "<|start_header_id|>{}<|end_header_id|>\n\n"
            before = "<|begin_of_text|>" if first else ""
            prompt = f"{before}{header.format('user')}{question.strip()}<|eot_id|>{header.format('assistant')}"
            pieces += [(prompt, False), (f"{answer.strip()}<|eot_id|>", True)]
        elif name in ("qwen_2", "internlm_2"):
            start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if name == "qwen_2" else "<s>"
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            pieces += [((start if first else "") + prompt, False), (f"{answer}<|im_end|>", True), ("\n", False)]
        elif name == "phi_3":
            pieces += [
                (f"<|user|>\n{question}<|end|>\n<|assistant|>\n", False),
                (f"{answer}<|end|>", True),
                ("\n", False),
            ]
    return [*pieces, ("<|endoftext|>", False)] if name == "phi_3" else pieces

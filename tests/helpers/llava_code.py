"""Models of LLaVA's own code, which a stand-in plays, and batches for them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from covft.integrations.codebases import llava as launcher
from covft.testing import HashTextEncoder
from tests.helpers.codebases import save_llm, tokenizer_for

LAYERS = (1, 2)


def build(home, version="v1", kind="LlavaLlamaForCausalLM", tower=None):
    """Their model with its tower loaded, as it is before training."""
    import llava.conversation
    from llava.model import llava_llama

    tokenizer = tokenizer_for(version)
    save_llm(home / version, tokenizer)
    model = getattr(llava_llama, kind).from_pretrained(home / version)
    arguments = SimpleNamespace(
        vision_tower=str(home / "clip"),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        tower_kind=tower,
    )
    torch.manual_seed(3)
    model.get_model().initialize_vision_modules(arguments)
    return model.eval(), tokenizer, llava.conversation.conv_templates[version]


def batch_of(tokenizer, conversation, questions, images):
    """Prompts with `images[i]` placeholders in row i, padded on the right."""
    from llava.mm_utils import tokenizer_image_token

    prompts = []
    for question, count in zip(questions, images, strict=True):
        turn = conversation.copy()
        turn.messages = []
        turn.append_message(turn.roles[0], "<image>\n" * count + question)
        turn.append_message(turn.roles[1], None)
        prompts.append(torch.tensor(tokenizer_image_token(turn.get_prompt(), tokenizer)))
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": ids.ne(tokenizer.pad_token_id)}


def attached(home, version="v1", kind="LlavaLlamaForCausalLM", tower=None, **settings):
    model, tokenizer, conversation = build(home, version, kind, tower)
    settings = {"layers": LAYERS, **settings}
    launcher.attach(model, HashTextEncoder(16), tokenizer=tokenizer, conversation=conversation, **settings)
    return model, tokenizer, conversation


QUESTIONS = ["what is left of the cup?", "how many people are there?", "where is the dog?"]

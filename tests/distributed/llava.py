"""A small LLaVA with a context-aware tower, and a batch of which one half has no image: for any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import covft
from covft.data import IGNORE_INDEX, Collator
from covft.integrations import attach, get_encoder, train_only
from covft.utils.sharding import gathered
from tests.helpers.mllm_configs import SIZE
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.towers import perturb
from tests.helpers.tuned import OPTIONS

LLAVA = BY_NAME["llava"]
IMAGE_TOKENS = 16
# The second half, which is all that the second process sees, is text alone.
ROWS = [
    Row(1, "what is left of the cup?"),
    Row(2, "how many people are there?"),
    Row(0, "a dog, and where?"),
    Row(0, "what is a cup?"),
]
TEXTS = covft.testing.HashTextEncoder(16)


def save_base(folder: Path) -> None:
    """Write the weights that every process starts from, where `attached_model` finds them."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
    LLAVA.build().save_pretrained(folder / "base")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(LLAVA.tokenizer), **sizes)).save_pretrained(folder / "text")
    LLAVA.tokenizer.save_pretrained(folder / "text")


def attached_model(folder: Path, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """The same model in every process; texts matter, and all that users train is trained."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "base", dtype=dtype)
    torch.manual_seed(8)
    attach(model, TEXTS, tokenizer=LLAVA.tokenizer, **settings)
    encoder = get_encoder(model)
    with gathered(encoder.parameters(), changed=True):
        perturb(encoder)
    return model.train()


# What `option_model` is made with, by what it is about.
SETTINGS: dict[str, dict[str, Any]] = {
    "attention_rank": {"attention_rank": 2},
    "strength": {},
    "null_text": {"null_text": True, "null_text_rate": 0.0},  # each process draws rows of its own
}


def option_model(folder: Path, option: str) -> Any:
    """The model with one more option of covft."""
    model = attached_model(folder, **SETTINGS[option])
    if option == "strength":
        get_encoder(model).strength = 0.4
    return model


def option_loss(model: nn.Module, option: str, rank: int, world: int) -> torch.Tensor:
    """The loss of the batch, whose second row has no text where there is a null text."""
    return loss_of(model, rank, world, silent=(1,) if option == "null_text" else ())


def tuned_model(folder: Path, method: str) -> Any:
    """The same model, its tower tuned by another method, whose new weights matter, and a projector that is trained."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float64)
    torch.manual_seed(8)
    options: dict[str, Any] = dict(OPTIONS.get(method, {}))
    if method == "svpt":
        options["images"] = torch.randn(2, 3, SIZE, SIZE)
    covft.tune(model, method, text_encoder=TEXTS, tokenizer=LLAVA.tokenizer, projector=True, **options)
    with torch.no_grad():
        for parameter in get_encoder(model).trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def lora_model(folder: Path) -> Any:
    """The same model with LoRA on its language model, and a projector that is trained too."""
    import peft

    model = attached_model(folder)
    lora = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q|v)_proj",
        init_lora_weights=False,
        task_type="CAUSAL_LM",  # otherwise peft saves the name of the model's class, which FSDP changes
    )
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    train_only(model, ["projector", "llm", "covft"])
    return model


def samples() -> list[dict[str, Any]]:
    """One sample per row, as the data set makes them."""
    torch.manual_seed(9)
    made = []
    for row in ROWS:
        prompt = LLAVA.tokenizer(LLAVA.prompt(row, [IMAGE_TOKENS] * row.images), add_special_tokens=False)["input_ids"]
        answer = LLAVA.tokenizer(f" a ball, {row.question}", add_special_tokens=False)["input_ids"]
        made.append(
            {
                "input_ids": torch.tensor(prompt + answer),
                "labels": torch.tensor([IGNORE_INDEX] * len(prompt) + answer),
                "pixel_values": torch.randn(row.images, 3, SIZE, SIZE, dtype=torch.float64) if row.images else None,
                "num_tiles": [1] * row.images,
                "context_text": row.question,
            }
        )
    return made


def batch_of(rank: int, world: int, silent: tuple[int, ...] = ()) -> dict[str, Any]:
    """The part of the global batch that a process sees; silent rows have no text."""
    chosen = [{**sample, "context_text": None} if i in silent else sample for i, sample in enumerate(samples())]
    share = len(chosen) // world
    collator = Collator(LLAVA.tokenizer.pad_token_id, image_shape=(3, SIZE, SIZE))
    batch = collator(chosen[rank * share : (rank + 1) * share])
    return {**batch, "pixel_values": batch["pixel_values"].double()}


def loss_of(model: nn.Module, rank: int, world: int, silent: tuple[int, ...] = ()) -> torch.Tensor:
    """The mean over all tokens of the global batch, as this process adds to it before gradients are averaged."""
    batch = batch_of(rank, world, silent)
    like = next(model.parameters())
    batch["pixel_values"] = batch["pixel_values"].to(like.dtype)
    batch = {name: value.to(like.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    total = sum(int((sample["labels"][1:] != IGNORE_INDEX).sum()) for sample in samples())
    logits = model(**batch, use_cache=False).logits[:, :-1]  # the model's own loss is rounded to float32
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / total * world


def trained_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of all that is trained, unsharded; a parameter without one is an error."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            grad = parameter.grad
            name = name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()
    return found

"""Public fakes for tests and examples: a text encoder, a small ViT, a router, small multimodal LLMs.

Everything is built on the spot with random weights; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from covft.errors import ConfigError
from covft.nn.router import Routing
from covft.text.hashed import HashTextEncoder
from covft.utils.arguments import check_kinds
from covft.utils.extras import import_library

__all__ = ["FixedRouter", "HashTextEncoder", "TinyMLLM", "ToyViT", "tiny_internvl", "tiny_llava"]

# `USER: question ASSISTANT: answer</s>`, and the turns of ChatML.
_VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ToyBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, D)` in and out."""
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ToyViT(nn.Module):
    """Patches, a class token, blocks, a norm; random weights.

    Args:
        width: Width D of the tokens.
        depth: Number of blocks.
        num_heads: Attention heads; must divide `width`.
        image_size: Height and width of the images in pixels.
        patch_size: Height and width of a patch in pixels.

    Raises:
        ConfigError: If a size cannot be used.

    Example:
        >>> ToyViT()(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 5, 16])
    """

    @check_kinds
    def __init__(
        self, width: int = 16, depth: int = 4, num_heads: int = 4, image_size: int = 16, patch_size: int = 8
    ) -> None:
        super().__init__()
        sizes = {"width": width, "depth": depth, "num_heads": num_heads, "image_size": image_size}
        wrong = [
            f"{name}={size}" for name, size in {**sizes, "patch_size": patch_size}.items() if not 1 <= size <= 4096
        ]
        if wrong or width % num_heads:
            raise ConfigError(
                "This ViT cannot be built.",
                expected="sizes from 1 to 4096, and num_heads that divides width",
                got=", ".join(wrong) or f"width={width}, num_heads={num_heads}",
            )
        self.image_size = image_size
        self.patch_size = patch_size
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(ToyBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` to tokens `(B, 1 + N, D)`."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class FixedRouter(nn.Module):
    """Gives the same weights to every image, or the given weights to each.

    Args:
        weights: Routing weights, shape `(E,)` for every image, or `(B, E)` for a batch of B; rows sum to 1.

    Example:
        >>> FixedRouter(torch.tensor([0.5, 0.5]))(None, 3, device=torch.device("cpu")).weights_BE.shape
        torch.Size([3, 2])
    """

    needs_context = False
    weights: Tensor

    @check_kinds
    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.num_experts = weights.shape[-1]
        self.register_buffer("weights", weights, persistent=False)

    def forward(
        self,
        context_BW: Tensor | None,
        batch_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> Routing:
        """The given weights, shape `(B, E)`."""
        return Routing(self.weights.to(device, dtype).expand(batch_size, -1))


class TinyMLLM(NamedTuple):
    """A small multimodal LLM with a tokenizer that spells any text, byte by byte.

    Attributes:
        model: The model, in eval mode.
        tokenizer: Its tokenizer, with a chat template.
        image: What stands for one image in a prompt.
    """

    model: Any
    tokenizer: Any
    image: str

    def prompt(self, question: str, images: int = 1, answer: str | None = None) -> str:
        """Write one conversation as the chat template does.

        Args:
            question: What the user asks.
            images: Images that the user shows first.
            answer: What the assistant says; None leaves the answer to the model.
        """
        messages = [{"role": "user", "content": "\n".join([self.image] * images + [question])}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)

    def batch(
        self, questions: Sequence[str], images: Sequence[int] | None = None, answers: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Make a batch with random images.

        Args:
            questions: One per row.
            images: Images of each row; None is one each.
            answers: One per row; with answers there are labels too, the prompts left out of them.

        Returns:
            `input_ids`, `attention_mask` and, with answers, `labels`, shape `(R, L)`; `pixel_values`, `(B, 3, H, W)`.
        """
        counts = [1] * len(questions) if images is None else list(images)
        said: Sequence[str | None] = [None] * len(questions) if answers is None else answers
        texts = [self.prompt(*row) for row in zip(questions, counts, said, strict=True)]
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        size = self.model.config.vision_config.image_size
        side = size if isinstance(size, int) else size[0]
        if sum(counts):
            batch["pixel_values"] = torch.randn(sum(counts), 3, side, side)
        if answers is not None:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            for row, (question, count) in enumerate(zip(questions, counts, strict=True)):
                prompt = self.tokenizer(self.prompt(question, count), add_special_tokens=False)["input_ids"]
                start = int(batch["attention_mask"][row].argmax())  # rows are padded on the left
                labels[row, : start + len(prompt)] = -100
            batch["labels"] = labels
        return batch


@check_kinds
def tiny_llava(depth: int = 6) -> TinyMLLM:
    """Build a small LLaVA with random weights from transformers' own classes: a CLIP tower and a Llama.

    Args:
        depth: Blocks of the tower.

    Example:
        >>> tiny = tiny_llava()
        >>> sorted(tiny.batch(["what is left of the cup?"]))
        ['attention_mask', 'input_ids', 'pixel_values']
    """
    _check_sizes(depth=depth)
    transformers = import_library("transformers", "transformers", needed_by="tiny_llava")
    tokenizer = _byte_tokenizer("<image>", template=_VICUNA)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, num_hidden_layers=depth, image_size=32, patch_size=16),
        text_config=transformers.LlamaConfig(**small, num_hidden_layers=2, **_ids_of(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    return TinyMLLM(_with_ids(model, tokenizer), tokenizer, "<image>" * 4)


@check_kinds
def tiny_internvl(depth: int = 6) -> TinyMLLM:
    """Build a small InternVL with random weights from transformers' own classes: an InternViT and a Qwen2.

    Args:
        depth: Blocks of the tower.

    Example:
        >>> tiny_internvl().image.count("<IMG_CONTEXT>")
        4
    """
    _check_sizes(depth=depth)
    transformers = import_library("transformers", "transformers", needed_by="tiny_internvl")
    tokenizer = _byte_tokenizer("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>", template=_CHATML)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            **small, num_hidden_layers=depth, image_size=[32, 32], patch_size=[8, 8]
        ),
        text_config=transformers.Qwen2Config(**small, num_key_value_heads=4, num_hidden_layers=2, **_ids_of(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    model = transformers.InternVLForConditionalGeneration(config).eval()
    return TinyMLLM(_with_ids(model, tokenizer), tokenizer, f"<img>{'<IMG_CONTEXT>' * 4}</img>")


def _check_sizes(**sizes: int) -> None:
    wrong = [f"{name}={size}" for name, size in sizes.items() if not 1 <= size <= 1024]
    if wrong:
        raise ConfigError("This model cannot be built.", expected="sizes from 1 to 1024", got=", ".join(wrong))


def _byte_tokenizer(*specials: str, template: str) -> Any:
    """Build a tokenizer with one token per byte, so that it spells, and decodes, any text exactly."""
    tokenizers = import_library("tokenizers", "transformers", needed_by="This tokenizer")
    transformers = import_library("transformers", "transformers", needed_by="This tokenizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    known = ["<pad>", "<s>", "</s>", *specials]
    vocabulary = {token: number for number, token in enumerate([*known, *alphabet])}
    bytes_alone = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bytes_alone.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_alone.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(specials),
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = template
    return tokenizer


def _ids_of(tokenizer: Any) -> dict[str, int]:
    names = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return {"vocab_size": len(tokenizer), **names}


def _with_ids(model: Any, tokenizer: Any) -> Any:
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model

"""Small processors from the real classes, each with a tokenizer that has the family's marks."""

from __future__ import annotations

from typing import Any

from tests.helpers.mllm_configs import PATCH, PINPOINTS, SIZE
from tests.helpers.prompts import KINDS, TEMPLATES

SQUARE = {"height": SIZE, "width": SIZE}
CLIP = {"size": {"shortest_edge": SIZE}, "crop_size": SQUARE}
PACKED = {"patch_size": PATCH, "size": {"shortest_edge": 16 * PATCH**2, "longest_edge": 64 * PATCH**2}}


def written(image: str, user: str, after: str, answer: str, end: str, start: str = "") -> str:
    """Return a chat template for messages whose contents are strings or lists of parts.

    Args:
        image: What stands for an image.
        user: What begins a user's turn.
        after: What ends it.
        answer: What begins an answer.
        end: What ends it.
        start: What begins the text.
    """
    text, role = "part['text']", "message['role'] == 'assistant'"
    one = f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ {text} }}}}{{% endif %}}"
    parts = f"{{% for part in message['content'] %}}{one}{{% endfor %}}"
    content = f"{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}{parts}{{% endif %}}"
    turn = f"{{% if {role} %}}{answer}{content}{end}{{% else %}}{user}{content}{after}{{% endif %}}"
    prompt = f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    return f"{start}{{% for message in messages %}}{turn}{{% endfor %}}{prompt}"


def chatml(image: str) -> str:
    end = "<|im_end|>\n"
    return written(image, "<|im_start|>user\n", end, "<|im_start|>assistant\n", end)


def tokenizer(specials: list[str], kind: str = "PreTrainedTokenizerFast", **named: str) -> Any:
    """Return a tokenizer whose special tokens come first: the first two begin and end a text, the third pads it.

    Args:
        specials: The tokens.
        kind: Its class, for processors of transformers before 5, which take no other.
        **named: Names that the processor asks for, each with its token.
    """
    import transformers

    if transformers.__version__ >= "5":
        kind = "PreTrainedTokenizerFast"
    return getattr(transformers, kind)(
        tokenizer_object=KINDS["byte-level"](specials),
        bos_token=specials[0],
        eos_token=specials[1],
        pad_token=specials[2],
        additional_special_tokens=specials[3:],
        extra_special_tokens=named,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def llava() -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        CLIPImageProcessor(**CLIP),
        tokenizer(["<s>", "</s>", "<pad>", "<image>"]),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES["llava-hf"].jinja,
    )


def llava_next() -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    return LlavaNextProcessor(
        LlavaNextImageProcessor(**CLIP, image_grid_pinpoints=PINPOINTS),
        tokenizer(["<s>", "</s>", "<pad>", "<image>", "[INST]", "[/INST]"]),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=written("<image>\n", "[INST] ", " [/INST]", " ", "</s>", "<s>"),
    )


def llava_onevision() -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer(["<|endoftext|>", "<|im_end|>", "<pad>", "<image>", "<video>", "<|im_start|>"]),
        LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=(SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>\n"),
    )


def internvl() -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=SQUARE),
        tokenizer(["<s>", "<|im_end|>", "<pad>", *marks.values(), "<|im_start|>"], **marks),
        InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )


def qwen(kind: str, **more: Any) -> Any:
    import transformers

    image = "<|vision_start|><|image_pad|><|vision_end|>"
    marks = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    return getattr(transformers, f"{kind}Processor")(
        transformers.Qwen2VLImageProcessor(**PACKED, **more),
        tokenizer(["<|endoftext|>", "<|im_end|>", "<pad>", *marks, "<|im_start|>"], "Qwen2TokenizerFast"),
        getattr(transformers, f"{kind.replace('2_5_', '2')}VideoProcessor")(**PACKED, **more),
        chat_template=chatml(image),
    )


def gemma3() -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    marks = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    end = "<end_of_turn>\n"
    return Gemma3Processor(
        Gemma3ImageProcessor(size=SQUARE),
        tokenizer(["<bos>", "<eos>", "<pad>", *marks.values(), "<start_of_turn>", "<end_of_turn>"], **marks),
        image_seq_length=4,
        chat_template=written("<start_of_image>", "<start_of_turn>user\n", end, "<start_of_turn>model\n", end, "<bos>"),
    )


def paligemma() -> Any:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    images = SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = (SIZE // PATCH) ** 2
    return PaliGemmaProcessor(images, tokenizer(["<bos>", "<eos>", "<pad>", "<image>"], image_token="<image>"))


def idefics3() -> Any:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    end = "<end_of_utterance>\n"
    return Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE}),
        tokenizer(
            ["<|im_start|>", "<end_of_utterance>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>"]
            + [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
        ),
        image_seq_len=4,
        chat_template=written("<image>", "User:", end, "Assistant:", end, "<|im_start|>"),
    )


def smolvlm() -> Any:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    images = {"size": {"longest_edge": 2 * SIZE}, "max_image_size": {"longest_edge": SIZE}}
    plain = idefics3()
    return SmolVLMProcessor(
        SmolVLMImageProcessor(**images),
        plain.tokenizer,
        SmolVLMVideoProcessor(**images),
        image_seq_len=4,
        chat_template=plain.chat_template,
    )


def glm4v() -> Any:
    from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    image = "<|begin_of_image|><|image|><|end_of_image|>"
    marks = ["<|image|>", "<|begin_of_image|>", "<|end_of_image|>"]
    marks += ["<|video|>", "<|begin_of_video|>", "<|end_of_video|>"]
    return Glm4vProcessor(
        Glm4vImageProcessor(**PACKED),
        tokenizer(["<sop>", "<|endoftext|>", "<pad>", *marks, "<|user|>", "<|assistant|>"]),
        Glm4vVideoProcessor(**PACKED),
        chat_template=written(image, "<|user|>\n", "", "<|assistant|>\n", "\n", "<sop>"),
    )


def pixtral(merge: int = 1) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    return PixtralProcessor(
        PixtralImageProcessor(patch_size=PATCH * merge, size={"longest_edge": 6 * PATCH}),
        tokenizer(["<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"]),
        patch_size=PATCH,
        spatial_merge_size=merge,
        chat_template=written("[IMG]", "[INST]", "[/INST]", "", "</s>", "<s>"),
    )


def mllama() -> Any:
    from transformers import MllamaImageProcessor, MllamaProcessor

    def begun(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    marks = ["<|image|>", "<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>"]
    end = "<|eot_id|>"
    return MllamaProcessor(
        MllamaImageProcessor(size=SQUARE, max_image_tiles=4),
        tokenizer(["<|begin_of_text|>", end, "<pad>", *marks]),
        chat_template=written("<|image|>", begun("user"), end, begun("assistant"), end, "<|begin_of_text|>"),
    )

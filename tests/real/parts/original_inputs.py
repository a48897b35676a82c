"""Make tiny models and data for the original codebases: `original_inputs.py llava|internvl FOLDER`."""

from __future__ import annotations

import inspect
import json
import random
import shutil
import sys
from pathlib import Path

import torch
from PIL import Image

QUESTIONS = ("What is left of the cup?", "How many people are there?", "Where is the dog?", "Which color is the ball?")
ANSWERS = ("a spoon", "two", "on the grass", "red")
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is left of the cup?",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. ASSISTANT: a spoon",
    "How many people are there? Where is the dog? on the grass Which color is the ball? red two",
    "system user assistant You are a helpful assistant. Describe the image. Who are you?",
]
LLM = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def main(codebase: str, folder: Path) -> None:
    """Make what one codebase needs."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    images(folder / "images")
    bert(folder / "bert")
    {"llava": llava, "internvl": internvl}[codebase](folder)


def llava(folder: Path) -> None:
    """A language model with Llama's own tokenizer, a CLIP, rows of both stages, and questions."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    tokenizer = llama_tokenizer(folder / "vicuna")
    LlamaForCausalLM(
        LlamaConfig(**LLM, vocab_size=len(tokenizer), max_position_embeddings=2048, pad_token_id=0)
    ).save_pretrained(folder / "vicuna")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 5}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=56, patch_size=14))
    rounded(tower).save_pretrained(folder / "clip")
    size = {"shortest_edge": 56}
    CLIPImageProcessor(size=size, crop_size={"height": 56, "width": 56}).save_pretrained(folder / "clip")
    write(folder / "data.json", rows())
    write(folder / "plain.json", [row("<image>", answer, n) for n, answer in enumerate(ANSWERS)])
    lines = [{"question_id": n, "image": f"{n}.jpg", "text": text} for n, text in enumerate(QUESTIONS)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def internvl(folder: Path) -> None:
    """A chat model with Qwen2's tokenizer and remote code, as their model folders are, rows, and a benchmark."""
    from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
    from transformers import Qwen2Config

    tokenizer = qwen_tokenizer(folder / "base")
    start, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    sizes = {**LLM, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    llm = Qwen2Config(**sizes, bos_token_id=start, eos_token_id=end)
    vit = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 5}
    vit |= {"image_size": 56, "patch_size": 14, "qk_normalization": False, "norm_type": "layer_norm", "qkv_bias": True}
    config = InternVLChatConfig(
        vision_config={**vit, "architectures": ["InternVisionModel"], "use_flash_attn": False},
        llm_config={**llm.to_dict(), "architectures": ["Qwen2ForCausalLM"]},
        template="internvl2_5",
        force_image_size=56,
        downsample_ratio=0.5,
        ps_version="v2",
    )
    names = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    names |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "modeling_internvl_chat.InternVLChatModel")
    config.auto_map = names
    rounded(InternVLChatModel(config)).to(torch.bfloat16).save_pretrained(folder / "base")
    for file in Path(inspect.getfile(InternVLChatModel)).parent.glob("[cm]o*.py"):
        shutil.copy(file, folder / "base")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(line) + "\n" for line in rows())
    entry = {"root": "images", "annotation": "data.jsonl", "data_augment": False, "repeat_time": 1, "length": 8}
    write(folder / "meta.json", {"tiny": entry})
    benchmark(folder)


def benchmark(folder: Path) -> None:
    """Questions in the files of TextVQA, where their evaluation looks for them."""
    home = folder / "data" / "textvqa"
    home.mkdir(parents=True, exist_ok=True)
    asked = [
        {"image": f"images/{n}.jpg", "question": text, "question_id": n, "answer": ANSWERS[n]}
        for n, text in enumerate(QUESTIONS)
    ]
    (home / "textvqa_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
    (home / "textvqa_train.jsonl").write_text("", encoding="utf-8")
    known = [{"question_id": n, "answers": [{"answer": answer}] * 10} for n, answer in enumerate(ANSWERS)]
    write(home / "textvqa_val_annotations.json", {"annotations": known})


def llama_tokenizer(folder: Path) -> object:
    """Train a sentencepiece model with Llama's ids of special tokens."""
    import sentencepiece
    from transformers import LlamaTokenizer

    folder.mkdir(exist_ok=True)
    text = folder / "corpus.txt"
    text.write_text("\n".join(CORPUS * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    text.unlink()
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def qwen_tokenizer(folder: Path) -> object:
    """Train a byte-level BPE with Qwen2's special tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Tokenizer

    folder.mkdir(exist_ok=True)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS * 20, vocab_size=400, show_progress=False)
    vocab, merges = trained.save_model(str(folder))
    tokenizer = Qwen2Tokenizer(vocab, merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert(folder: Path) -> None:
    """A text encoder like bert-base-uncased, with its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = sorted({word.strip(".,?:").lower() for line in CORPUS for word in line.split()})
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", ".", *letters, *(f"##{c}" for c in letters), *words]
    vocab = list(dict.fromkeys(vocab))
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    BertModel(BertConfig(**sizes, vocab_size=len(vocab))).save_pretrained(folder)


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """Round weights to bfloat16, so that a tower that was cast to it equals one that is loaded anew.

    They are larger than they start, so that the text shows in the features.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 3 if parameter.dim() > 1 else 1
            parameter.copy_((parameter * scale).bfloat16())
    return model


def images(folder: Path) -> None:
    """Pictures of noise."""
    folder.mkdir(exist_ok=True)
    generator = random.Random(0)
    for number in range(8):
        picture = Image.frombytes("RGB", (70, 60), generator.randbytes(70 * 60 * 3))
        picture.save(folder / f"{number}.jpg")


def rows() -> list[dict]:
    """Rows with one image, two turns, and none."""
    made = [row(f"<image>\n{QUESTIONS[n % 4]}", ANSWERS[n % 4], n) for n in range(6)]
    more = [{"from": "human", "value": QUESTIONS[1]}, {"from": "gpt", "value": ANSWERS[1]}]
    made[0]["conversations"] += more
    text_only = row("Who are you?", "an assistant", 6)
    del text_only["image"]
    return [*made, text_only, row(f"{QUESTIONS[3]}\n<image>", ANSWERS[3], 7)]


def row(question: str, answer: str, number: int) -> dict:
    """A row of LLaVA's format."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": f"{number}.jpg", "conversations": turns}


def write(path: Path, value: object) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

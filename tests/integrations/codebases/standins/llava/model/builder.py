from transformers import AutoTokenizer

from llava.model.llava_llama import LlavaLlamaForCausalLM, LlavaQwenForCausalLM


def load_pretrained_model(model_path, model_base, model_name, load_8bit=False, load_4bit=False, device_map="auto"):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    cls = LlavaQwenForCausalLM if "qwen" in model_name else LlavaLlamaForCausalLM
    model = cls.from_pretrained(model_path)
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model(device_map=device_map)
    return tokenizer, model, None, 2048

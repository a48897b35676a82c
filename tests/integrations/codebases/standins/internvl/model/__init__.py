from transformers import AutoTokenizer

from internvl.model.internvl_chat import InternVLChatModel


def load_model_and_tokenizer(args):
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = InternVLChatModel.from_pretrained(args.checkpoint).eval()
    return model, tokenizer

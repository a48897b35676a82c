import warnings

import pytest
import torch

from covft.errors import TextEncoderError
from covft.text import OpenCLIPTextEncoder

TEXTS = ["What is left of the cup?", "a cat"]
VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def native():
    from open_clip.model import CLIP

    return CLIP(24, VISION, TEXT)


def custom():
    from open_clip.model import CustomTextCLIP

    return CustomTextCLIP(24, VISION, TEXT)


def coca():
    from open_clip.coca_model import CoCa

    caption = {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "attn_pooler_heads": 2,
    }
    # CoCa's text tower takes one token of the context for its own use.
    text = {**TEXT, "context_length": 15, "embed_cls": True, "output_tokens": True}
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    return CoCa(24, multimodal_cfg=caption, text_cfg=text, vision_cfg=vision)


KINDS = {"native": native, "custom": custom, "coca": coca}


@pytest.fixture(params=list(KINDS))
def model(request):
    return KINDS[request.param]().train()


def expected(model, text):
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=getattr(model, "text", model).context_length)
    model.eval()
    with torch.no_grad():
        return model.encode_text(tokenizer([text]), normalize=False)


def test_features_are_those_of_encode_text(model):
    encoder = OpenCLIPTextEncoder(model)
    features = encoder.encode(TEXTS)
    assert encoder.text_dim == 24
    torch.testing.assert_close(features, torch.cat([expected(model, text) for text in TEXTS]))


def test_only_the_text_tower_is_frozen(model):
    encoder = OpenCLIPTextEncoder(model)
    encoder.encode(TEXTS)
    assert model.visual.training
    assert all(parameter.requires_grad for parameter in model.visual.parameters())
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith(("visual.", "logit_", "text_decoder.")) for name in free)


def test_eval_comes_back_at_every_call(model):
    encoder = OpenCLIPTextEncoder(model, cache_bytes=0)
    tower = getattr(model, "text", model)
    seen = []
    tower.transformer.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model.train()
    encoder.encode(["a cat"])
    assert seen == [False]


def test_too_long_texts_are_cut_with_one_warning(model):
    encoder = OpenCLIPTextEncoder(model)
    limit = getattr(model, "text", model).context_length
    with pytest.warns(UserWarning, match=f"at most {limit} tokens; a text of 32 tokens"):
        encoder.encode(["cup " * 30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["cat " * 30])


def test_a_vocabulary_that_is_not_clips_needs_its_tokenizer():
    from open_clip.model import CLIP

    model = CLIP(24, VISION, {**TEXT, "vocab_size": 1000})
    with pytest.raises(TextEncoderError, match="which tokenizer"):
        OpenCLIPTextEncoder(model)

    def tokenizer(texts):
        ids = torch.zeros(len(texts), 16, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text[:15])] = torch.tensor([ord(letter) % 900 for letter in text[:15]])
        ids[:, 15] = 999
        return ids

    assert OpenCLIPTextEncoder(model, tokenizer).encode(TEXTS).shape == (2, 24)


def test_the_image_tower_alone_is_refused():
    with pytest.raises(TextEncoderError, match="no text tower"):
        OpenCLIPTextEncoder(native().visual)


def test_a_name_that_does_not_load_says_so():
    with pytest.raises(TextEncoderError, match="open_clip cannot load 'ViT-Q-32/openai'"):
        OpenCLIPTextEncoder("ViT-Q-32/openai")

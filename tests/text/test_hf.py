"""Hugging Face text models: tiny ones from configs, and the real MiniLM."""

import inspect
import json
import warnings

import pytest
import torch
from torch import nn

from covft.errors import MissingDependencyError, ShapeError, TextEncoderError
from covft.text import HFTextEncoder
from tests.helpers.towers import image_features

TEXTS = ["What is left of the cup?", "a cat", "Describe the picture in three sentences, with every detail."]


@pytest.fixture(scope="module")
def minilm(minilm_folder):
    return HFTextEncoder(minilm_folder, cache_bytes=0)


def hidden(encoder, text):
    """The oracle: one text, tokenised and run by hand."""
    tokens = encoder.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        return encoder.model(**tokens).last_hidden_state


def test_real_model_cls(minilm, minilm_folder):
    features = minilm.encode(TEXTS)
    assert (minilm.text_dim, minilm.name, minilm.pooling) == (384, f"{minilm_folder}?pooling=cls", "cls")
    for text, row in zip(TEXTS, features, strict=True):
        torch.testing.assert_close(row, hidden(minilm, text)[0, 0], rtol=0, atol=1e-6)


def test_real_model_mean(minilm_folder, minilm):
    encoder = HFTextEncoder(minilm_folder, pooling="mean")
    expected = torch.stack([hidden(minilm, text)[0].mean(0) for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_neighbours_and_their_padding_change_nothing(make_bert, bert_tokenizer, pooling):
    encoder = HFTextEncoder(make_bert(), pooling, bert_tokenizer, cache_bytes=0)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    assert torch.equal(encoder.encode(TEXTS), alone)
    assert torch.equal(encoder.encode(TEXTS[::-1]).flip(0), alone)


def test_the_model_is_frozen_and_eval_comes_back_at_every_call(make_bert, bert_tokenizer):
    model = make_bert()
    encoder = HFTextEncoder(model, tokenizer=bert_tokenizer, cache_bytes=0)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = encoder.encode(TEXTS)
    model.train()
    assert torch.equal(encoder.encode(TEXTS), before)
    model.train()
    assert not torch.equal(model(torch.tensor([[1, 2]]))[0], model(torch.tensor([[1, 2]]))[0])  # dropout is real


def test_a_loaded_model_stays_where_it_is_and_a_fetched_one_moves(make_bert, bert_tokenizer, minilm_folder):
    given = HFTextEncoder(make_bert(), tokenizer=bert_tokenizer)
    assert given.to("meta") is given
    assert given.device.type == "cpu"
    assert HFTextEncoder(minilm_folder).to("meta").device.type == "meta"


def test_the_pooled_output_is_selectable(make_bert, bert_tokenizer):
    model = make_bert()
    encoder = HFTextEncoder(model, "pooled", bert_tokenizer)
    with torch.no_grad():
        expected = model(**bert_tokenizer(TEXTS[0], return_tensors="pt")).pooler_output
    torch.testing.assert_close(encoder.encode(TEXTS[:1]), expected, rtol=0, atol=1e-6)
    bare = make_bert()
    bare.pooler = None
    with pytest.raises(TextEncoderError, match="no output for pooling='pooled'"):
        HFTextEncoder(bare, "pooled", bert_tokenizer)


def test_normalised_features_have_length_one(minilm_folder):
    features = HFTextEncoder(minilm_folder, "mean", normalize=True).encode(TEXTS)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))


def test_unknown_pooling_is_refused(make_bert, bert_tokenizer):
    with pytest.raises(TextEncoderError, match=r"cls \| mean \| pooled"):
        HFTextEncoder(make_bert(), "max", bert_tokenizer)


def test_too_long_texts_are_cut_with_one_warning(make_bert, bert_tokenizer):
    encoder = HFTextEncoder(make_bert(), "mean", bert_tokenizer)
    assert encoder.max_length == 64
    long = " ".join(["cup"] * 100)
    with pytest.warns(UserWarning, match="at most 64 tokens; a text of 102 tokens"):
        features = encoder.encode([long])
    # The model reads 62 words and the two marks.
    torch.testing.assert_close(features, encoder.encode([" ".join(["cup"] * 62)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([long + " cup"])


def test_a_text_of_exactly_the_limit_is_not_cut(make_bert, bert_tokenizer):
    encoder = HFTextEncoder(make_bert(), tokenizer=bert_tokenizer, max_length=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["cup " * 8])


def test_roberta_positions_start_after_the_padding(bert_tokenizer):
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    encoder = HFTextEncoder(RobertaModel(config), tokenizer=bert_tokenizer)
    assert encoder.max_length == 32
    with pytest.warns(UserWarning, match="32 tokens"):
        encoder.encode(["cup " * 50])


# ------------------------------------------------------------------------------- tokenised batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_give_the_features_of_their_strings(make_bert, bert_tokenizer, side):
    encoder = HFTextEncoder(make_bert(), tokenizer=bert_tokenizer)
    batch = bert_tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    assert torch.equal(encoder.encode_tokens(batch), encoder.encode(TEXTS))
    del batch["attention_mask"]
    assert torch.equal(encoder.encode_tokens(batch), encoder.encode(TEXTS))


def test_tokens_need_no_tokenizer_but_strings_do(make_bert, bert_tokenizer):
    encoder = HFTextEncoder(make_bert())
    assert encoder.text_dim == 16
    batch = bert_tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert encoder.encode_tokens(batch).shape == (3, 16)
    with pytest.raises(TextEncoderError, match="has no tokenizer"):
        encoder.encode(TEXTS)


def test_tokens_are_kept_like_strings(make_bert, bert_tokenizer):
    model = make_bert()
    encoder = HFTextEncoder(model, tokenizer=bert_tokenizer)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = bert_tokenizer(["a cat", "a cat", "a dog"], padding=True, return_tensors="pt")
    encoder.encode_tokens(batch)
    encoder.encode_tokens(batch)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ({}, TextEncoderError, "input_ids"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, ShapeError, r"\(S, L\)"),
        ({"input_ids": [[1, 2], [1]]}, ShapeError, "padding=True"),
        ({"input_ids": torch.ones(2, 5), "attention_mask": torch.ones(2, 4)}, ShapeError, "as input_ids"),
        ({"input_ids": torch.ones(1, 65, dtype=torch.long)}, ShapeError, "at most 64"),
        ({"input_ids": torch.tensor([[5, 6], [0, 0]])}, TextEncoderError, "Text 1 is empty"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(make_bert, bert_tokenizer, batch, error, words):
    with pytest.raises(error, match=words):
        HFTextEncoder(make_bert(), tokenizer=bert_tokenizer).encode_tokens(batch)


# ------------------------------------------------------------------------------- other families


def clip_tokenizer(folder, length):
    """A CLIP tokenizer of a few letters; like CLIP's, it pads with its end mark."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz?"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {word: index for index, word in enumerate(words)}
    if "vocab_file" not in inspect.signature(CLIPTokenizer.__init__).parameters:
        return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)
    (folder / "vocab.json").write_text(json.dumps(vocab))  # before release 5 of transformers
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def two_tower_config(cls, **text):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "vocab_size": 64,
        "attention_dropout": 0.5,
    }
    return cls(
        text_config={**tower, **marks, "max_position_embeddings": 12, **text},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
    )


@pytest.fixture
def clip(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(two_tower_config(CLIPConfig)), clip_tokenizer(tmp_path, 12)


def test_clip_takes_the_end_of_the_text(clip):
    model, tokenizer = clip
    encoder = HFTextEncoder(model.text_model, "cls", tokenizer)
    assert encoder.pooling == "pooled"
    model.eval()
    for text in ("a cup", "left"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            end = model.text_model(ids).last_hidden_state[:, (ids[0] == 1).nonzero()[0, 0]]
        torch.testing.assert_close(encoder.encode([text]), end)
    padded = tokenizer(["a cup", "left of"], padding="max_length", return_tensors="pt")
    torch.testing.assert_close(encoder.encode_tokens(padded), encoder.encode(["a cup", "left of"]))
    del padded["attention_mask"]  # the end mark is also the padding id: it must not be dropped
    torch.testing.assert_close(encoder.encode_tokens(padded), encoder.encode(["a cup", "left of"]))


def test_two_towers_give_projected_features_and_the_vision_tower_is_left_alone(clip):
    model, tokenizer = clip
    model.train()
    encoder = HFTextEncoder(model, tokenizer=tokenizer)
    ids = tokenizer("a cup", return_tensors="pt")
    features = encoder.encode(["a cup"])
    assert model.vision_model.training
    assert not model.text_model.training
    assert all(parameter.requires_grad for parameter in model.vision_model.parameters())
    assert model.visual_projection.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in model.text_model.parameters())
    assert not model.text_projection.weight.requires_grad
    with torch.no_grad():
        expected = image_features(model.eval().get_text_features(**ids))
    assert encoder.text_dim == expected.shape[1] == 512
    torch.testing.assert_close(features, expected)


def test_a_text_model_with_projection(tmp_path):
    from transformers import CLIPConfig, CLIPTextModelWithProjection

    config = two_tower_config(CLIPConfig, projection_dim=24).text_config
    model = CLIPTextModelWithProjection(config).eval()
    tokenizer = clip_tokenizer(tmp_path, 12)
    encoder = HFTextEncoder(model, tokenizer=tokenizer)
    assert encoder.text_dim == 24
    with torch.no_grad():
        expected = model(**tokenizer("a cup", return_tensors="pt")).text_embeds
    torch.testing.assert_close(encoder.encode(["a cup"]), expected)


def test_siglip_reads_texts_padded_to_its_full_length(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    model = SiglipModel(two_tower_config(SiglipConfig, projection_size=16)).eval()
    tokenizer = clip_tokenizer(tmp_path, 12)
    ids = tokenizer("a cup", padding="max_length", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 12)
    with torch.no_grad():
        expected = image_features(model.get_text_features(input_ids=ids))
    for part in (model, model.text_model):
        torch.testing.assert_close(HFTextEncoder(part, tokenizer=tokenizer).encode(["a cup"]), expected)


def causal_lm():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30522,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def test_the_first_token_of_a_language_model_is_refused(bert_tokenizer):
    with pytest.raises(TextEncoderError, match="causal"):
        HFTextEncoder(causal_lm(), "cls", bert_tokenizer)


def test_a_language_model_pools_its_hidden_states(bert_tokenizer):
    model = causal_lm()
    encoder = HFTextEncoder(model, "mean", bert_tokenizer)
    ids = bert_tokenizer("a cup", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder.encode(["a cup"]), expected)


def test_mean_is_the_default_without_a_cls_token(minilm_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    tokenizer.cls_token = None
    assert HFTextEncoder(causal_lm(), tokenizer=tokenizer).pooling == "mean"


def test_the_encoder_of_a_sequence_to_sequence_model(bert_tokenizer):
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=30522, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = T5Model(config)
    encoder = HFTextEncoder(model, "mean", bert_tokenizer)
    model.eval()
    with torch.no_grad():
        expected = model.encoder(**bert_tokenizer("a cup", return_tensors="pt", return_token_type_ids=False))
    torch.testing.assert_close(encoder.encode(["a cup"]), expected.last_hidden_state.mean(1))


def test_a_model_that_reads_no_text_is_refused(bert_tokenizer):
    from transformers import ViTConfig, ViTModel

    vit = ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    )
    with pytest.raises(TextEncoderError, match="cannot encode a text"):
        HFTextEncoder(vit, tokenizer=bert_tokenizer)
    assert all(parameter.requires_grad for parameter in vit.parameters())


# ------------------------------------------------------------------------------- loading


def test_an_id_that_is_not_cached_says_what_to_do():
    with pytest.raises(TextEncoderError) as caught:
        HFTextEncoder("nobody/no-such-bert")
    for words in ("hf download nobody/no-such-bert", "HF_HUB_OFFLINE", "local folder", "loaded model"):
        assert words in str(caught.value)


def test_a_folder_that_is_missing_or_incomplete_says_so(tmp_path):
    with pytest.raises(TextEncoderError, match="does not exist"):
        HFTextEncoder(str(tmp_path / "nothing"))
    with pytest.raises(TextEncoderError, match="cannot be loaded"):
        HFTextEncoder(str(tmp_path))


def test_a_missing_library_names_the_extra(monkeypatch):
    import importlib

    real = importlib.import_module

    def without(name, *args):
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingDependencyError, match=r'pip install "covft\[transformers\]"'):
        HFTextEncoder("bert-base-uncased")


def test_a_saved_folder_gives_the_features_of_the_model(make_bert, bert_tokenizer, tmp_path):
    model = make_bert()
    model.save_pretrained(tmp_path)
    bert_tokenizer.save_pretrained(tmp_path)
    fetched = HFTextEncoder(str(tmp_path))
    given = HFTextEncoder(model, tokenizer=bert_tokenizer)
    assert torch.equal(fetched.encode(TEXTS), given.encode(TEXTS))
    assert fetched.name == f"{tmp_path}?pooling=cls"
    # A loaded model knows where it came from, and finds its tokenizer there.
    again = HFTextEncoder(type(model).from_pretrained(tmp_path))
    assert again.name == fetched.name
    assert torch.equal(again.encode(TEXTS), given.encode(TEXTS))


def test_the_vision_half_of_a_fetched_pair_is_dropped(clip, tmp_path):
    model, tokenizer = clip
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    encoder = HFTextEncoder(str(tmp_path / "clip"))
    assert isinstance(encoder.model, nn.Module)
    assert encoder.model.vision_model is None
    given = HFTextEncoder(model, tokenizer=tokenizer)
    torch.testing.assert_close(encoder.encode(["a cup"]), given.encode(["a cup"]))

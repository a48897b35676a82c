"""States of the tokens of a text, which some tuning methods read instead of pooled features."""

import torch

from covft.testing import HashTextEncoder
from covft.text import CallableTextEncoder, HFTextEncoder, SentenceTransformersEncoder

TEXTS = ["a cat", "What is left of the cup?", "a cat"]


def test_states_are_those_of_each_text_alone_and_cached(minilm_folder):
    encoder = HFTextEncoder(minilm_folder)
    states, mask = encoder.encode_states(TEXTS)
    for row, (text, kept) in enumerate(zip(TEXTS, mask, strict=True)):
        tokens = encoder.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = encoder.model(**tokens).last_hidden_state[0]
        torch.testing.assert_close(states[row][kept], expected, rtol=0, atol=1e-6)
        assert not states[row][~kept].any()
    assert mask.sum(1).tolist() == [len(encoder.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert len(encoder.cache) == 2
    assert not states.requires_grad


def test_sentence_transformers_states_are_its_token_embeddings(minilm_folder):
    encoder = SentenceTransformersEncoder(minilm_folder)
    states, mask = encoder.encode_states(TEXTS)
    expected = encoder.model.encode(TEXTS[:2], output_value="token_embeddings", show_progress_bar=False)
    for row in range(2):
        torch.testing.assert_close(states[row][mask[row]], expected[row].cpu(), rtol=0, atol=1e-5)


def test_an_encoder_without_tokens_gives_its_features_as_one_state():
    ones = CallableTextEncoder(lambda texts: torch.full((len(texts), 4), float(len(texts[0]))))
    states, mask = ones.encode_states(["ab", "c"])
    assert states.tolist() == [[[2.0] * 4], [[1.0] * 4]]
    assert mask.tolist() == [[True], [True]]
    hashed = HashTextEncoder(8)
    assert torch.equal(hashed.encode_states(["a b"]).states[:, 0], hashed.encode(["a b"]))

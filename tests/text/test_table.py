"""Precomputed features: equal to the encoder's own, from a complete file."""

from __future__ import annotations

import pytest
import torch

import covft
from covft.errors import TextEncoderError
from covft.testing import HashTextEncoder
from covft.text import FeatureTable
from tests.helpers.towers import TOWERS

TEXTS = ["what is left of the cup?", "how many people are there?", "où est le chien ?", "what is left of the cup?"]


class Counting(HashTextEncoder):
    def __init__(self, width):
        super().__init__(width)
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        return super().encode(texts)


def test_precompute__each_distinct_text_once_and_the_same_features(tmp_path):
    encoder = Counting(16)
    path = tmp_path / "folder" / "texts.safetensors"
    table = FeatureTable.precompute(encoder, TEXTS, path)
    assert encoder.seen == TEXTS[:3]
    assert len(table) == 3
    wanted = HashTextEncoder(16).encode(TEXTS)
    for found in (table, FeatureTable.load(path)):
        assert found.text_dim == 16
        assert found.name == encoder.name
        assert torch.equal(found.encode(TEXTS), wanted)
    assert [entry.name for entry in path.parent.iterdir()] == ["texts.safetensors"]


def test_precompute__more_texts_than_one_step():
    texts = [f"question {number}?" for number in range(700)]
    table = FeatureTable.precompute(HashTextEncoder(4), texts)
    assert torch.equal(table.encode(texts[::-1]), HashTextEncoder(4).encode(texts[::-1]))


def test_table__a_missing_text_is_refused_or_encoded_by_the_fallback(tmp_path):
    table = FeatureTable.precompute(HashTextEncoder(16), TEXTS, tmp_path / "texts.safetensors")
    with pytest.raises(TextEncoderError, match=r"no features of 'who\?'"):
        table.encode([TEXTS[0], "who?"])
    fallback = FeatureTable.load(tmp_path / "texts.safetensors", fallback=Counting(16))
    assert torch.equal(fallback.encode(["who?", TEXTS[0]]), HashTextEncoder(16).encode(["who?", TEXTS[0]]))
    assert fallback.fallback.seen == ["who?"]
    with pytest.raises(TextEncoderError, match="another encoder"):
        FeatureTable.load(tmp_path / "texts.safetensors", fallback=HashTextEncoder(8))


def test_table__replaces_its_encoder(tmp_path):
    tower = TOWERS[0]
    torch.manual_seed(0)
    vit = tower.build().eval()
    encoder = covft.wrap(vit, FeatureTable.precompute(HashTextEncoder(16), TEXTS), layers=[1])
    images = tower.images(2)
    output = encoder(images, TEXTS[:2])
    encoder.set_text_encoder(HashTextEncoder(16))
    assert torch.equal(encoder(images, TEXTS[:2]), output)
    assert encoder.text_name == HashTextEncoder(16).name


def test_load__refuses_other_files(tmp_path):
    from safetensors.torch import save_file

    FeatureTable.precompute(HashTextEncoder(16), TEXTS, tmp_path / "texts.safetensors")
    content = (tmp_path / "texts.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[:-50])
    save_file({"features": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    for name, problem in (
        ("short", "cannot be read"),
        ("nothing", "cannot be read"),
        ("other", "does not hold text features"),
    ):
        with pytest.raises(TextEncoderError, match=problem):
            FeatureTable.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(TextEncoderError, match="needs texts"):
        FeatureTable.precompute(HashTextEncoder(16), [])
    with pytest.raises(TextEncoderError, match="is empty"):
        FeatureTable.precompute(HashTextEncoder(16), ["what?", " "])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load__finds_every_flipped_bit(tmp_path, dtype):
    whole = tmp_path / "texts.safetensors"
    made = FeatureTable.precompute(HashTextEncoder(16), TEXTS)
    FeatureTable(_digests(made), made.encode(TEXTS[:3]).to(dtype), "mine").save(whole)
    content = whole.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    # Some of each part: length, header, features and digests of the texts.
    bits = [*range(0, 64, 7), *range(64, 8 * header, 23), *range(8 * header, 8 * len(content), 37)]
    undetected = []
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        whole.write_bytes(changed)
        try:
            FeatureTable.load(whole)
        except TextEncoderError:
            continue
        undetected.append(bit)
    whole.write_bytes(content)
    assert len(FeatureTable.load(whole)) == 3
    assert len(bits) > 100
    assert undetected == []


def test_load__refuses_a_table_without_a_digest_and_numbers_that_are_not_finite(tmp_path):
    from safetensors.torch import save_file

    tensors = {"digests": torch.zeros(1, 32, dtype=torch.uint8), "features": torch.ones(1, 4)}
    save_file(tensors, tmp_path / "old.safetensors", {"covft": "text features", "name": "x"})
    with pytest.raises(TextEncoderError, match="does not hold text features"):
        FeatureTable.load(tmp_path / "old.safetensors")
    FeatureTable(tensors["digests"], torch.full((1, 4), torch.nan), "x").save(tmp_path / "nan.safetensors")
    with pytest.raises(TextEncoderError, match="finite"):
        FeatureTable.load(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    ("digests", "features"),
    [
        (torch.zeros(1, 32, dtype=torch.uint8), torch.tensor(1.0)),
        (torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1, 0)),
        (torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1, 4, dtype=torch.int32)),
        (torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1, 4, dtype=torch.complex64)),
        (torch.zeros(1, 32), torch.ones(1, 4)),
        (torch.zeros(2, 32, dtype=torch.uint8), torch.ones(1, 4)),
    ],
)
def test_table__other_tensors_are_refused(digests, features):
    with pytest.raises(TextEncoderError, match="not features of texts"):
        FeatureTable(digests, features, "x")


def _digests(table):
    return torch.stack([torch.frombuffer(bytearray(digest), dtype=torch.uint8) for digest in table._rows])

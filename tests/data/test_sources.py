"""LLaVA's and InternVL's files, images in folders and in shards."""

import io
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from covft.data import (
    DataError,
    ImageDecoder,
    ImageFolder,
    InternVLRows,
    LlavaRows,
    MetaEntry,
    TarImages,
    parse_row,
    read_meta,
)
from covft.errors import ConfigError
from tests.helpers.data import RECORDS, pack, photograph, talk, write

# ------------------------------------------------------------------------------------------------ LLaVA


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_llava_rows(folder, name):
    rows = LlavaRows(folder / name, folder / "images")
    assert len(rows) == 5
    assert rows[0].messages == (
        {"role": "user", "content": "<image>\nWhat animal is it?"},
        {"role": "assistant", "content": "A cat."},
    )
    assert [row.images for row in map(rows.__getitem__, range(5))] == [
        ("coco/cat.jpg",),
        (),
        ("coco/cup.png",),
        ("coco/cat.jpg", "coco/cup.png"),
        ("vg/rocket.jpg",),
    ]
    assert rows[3].id == "3"
    assert rows[4].messages[1]["content"] == "Eine Rakete — 火箭 🚀."
    place = rows.place(4)
    assert (place.file, place.row, place.line) == (str(folder / name), 4, 5 if name.endswith("l") else None)
    assert np.array_equal(rows.image(2, "coco/cup.png"), photograph("coffee"))


def test_the_tag_of_one_image_comes_first_unless_it_shall_not(folder):
    assert LlavaRows(folder / "llava.json")[2].messages[0]["content"] == "<image>\nWhat is in the cup?"
    kept = LlavaRows(folder / "llava.json", image_first=False)
    assert kept[2].messages[0]["content"] == "What is in the cup?\n<image>"
    assert LlavaRows(folder / "llava.json")[3].messages[0]["content"] == "Is <image> in <image>?"


def test_images_need_a_folder(folder):
    with pytest.raises(ConfigError, match="no folder of images was given"):
        LlavaRows(folder / "llava.json").image(0, "coco/cat.jpg")
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        LlavaRows(folder / "llava.json", folder / "none")


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ([], "not a JSON object"),
        ({"video": "a.mp4", "conversations": talk("Why?", "So.")}, "video"),
        ({"image": "a", "conversations": talk("Why?", "So.")}, "Too few <image> tags in the questions: 0 for 1"),
        ({"image": "a", "conversations": talk("<image><image>?", "So.")}, "Too many <image> tags .*: 2 for 1"),
        ({"conversations": talk("<image>?", "So.")}, "Too many <image> tags .*: 1 for 0"),
        ({"image": ["a", "b"], "conversations": talk("<image>?", "So.")}, "Too few"),
        ({"image": "a", "conversations": talk("<image>?", "So <image>.")}, "outside the questions"),
        ({"image": 3, "conversations": talk("<image>?", "So.")}, "neither a name"),
        ({"image": ["a", ""], "conversations": talk("<image>?", "So.")}, "neither a name"),
        ({"image": "a", "conversations": talk("Why?", "So.", "<image>")}, "Too few"),
    ],
)
def test_rows_that_do_not_fit(record, why):
    with pytest.raises(DataError, match=why):
        parse_row(record)


def test_a_missing_tag_may_be_added():
    record = {"image": "a", "conversations": talk("Why?", "So.")}
    assert parse_row(record, add_missing_tag=True).messages[0]["content"] == "<image>\nWhy?"
    with pytest.raises(DataError, match="Too few"):
        parse_row({**record, "image": ["a", "b"]}, add_missing_tag=True)
    assert parse_row({**record, "image": ""}, add_missing_tag=True).messages[0]["content"] == "Why?"


def test_a_broken_row_is_named(folder):
    path = write(folder / "bad.jsonl", [RECORDS[0], {"image": "a", "conversations": talk("Why?", "So.")}])
    with pytest.raises(DataError) as error:
        LlavaRows(path)[1]
    assert str(error.value).startswith(f"{path}, row 1 (line 2): Too few <image> tags")


# --------------------------------------------------------------------------------------------- InternVL


@pytest.fixture
def meta(folder):
    """Two data sets, ten rows about images and four about none."""
    write(folder / "a.jsonl", [{**RECORDS[0], "id": f"a{number}"} for number in range(10)])
    write(folder / "b.jsonl", [{**RECORDS[1], "id": f"b{number}"} for number in range(4)])
    entries = {
        "photos": {
            "root": str(folder / "images"),
            "annotation": str(folder / "a.jsonl"),
            "data_augment": True,
            "repeat_time": 1,
            "length": 10,
            "max_dynamic_patch": 6,
        },
        "text": {
            "root": "",
            "annotation": str(folder / "b.jsonl"),
            "data_augment": False,
            "repeat_time": 1,
            "length": 4,
        },
    }

    def make(**changes):
        path = folder / "meta.json"
        path.write_text(json.dumps({name: {**entries[name], **changes.get(name, {})} for name in entries}))
        return path

    return make


def test_a_mixture(meta):
    rows = InternVLRows(meta())
    assert [rows[index].id for index in range(len(rows))] == [f"a{n}" for n in range(10)] + [f"b{n}" for n in range(4)]
    assert (rows[0].dataset, rows[0].max_tiles, rows[0].augment) == ("photos", 6, True)
    assert (rows[10].dataset, rows[10].max_tiles, rows[10].augment) == ("text", None, False)
    assert rows.place(12).file.endswith("b.jsonl")
    assert (rows.place(12).row, rows.place(12).line) == (2, 3)
    assert rows.image(0, "coco/cat.jpg").size == photograph("chelsea").size
    with pytest.raises(IndexError):
        rows[14]
    with pytest.raises(ConfigError, match="no root"):
        rows.image(10, "coco/cat.jpg")


@pytest.mark.parametrize(
    ("repeat", "ids"),
    [
        (0.5, "01"),
        (0.99, "012"),
        (1, "0123"),
        (1.0, "0123"),
        (2, "01230123"),
        (2.5, "0123012301"),
        (1.2, "0123"),
    ],
)
def test_repeat_time(meta, repeat, ids):
    rows = InternVLRows(meta(text={"repeat_time": repeat}, photos={"repeat_time": 0.3}))
    assert [rows[index].id for index in range(len(rows))] == ["a0", "a1", "a2"] + [f"b{number}" for number in ids]
    scanned = dict(rows.scan())
    assert sorted(scanned) == list(range(len(rows)))
    assert all(scanned[index]["id"] == rows[index].id for index in range(len(rows)))


@given(st.integers(1, 1000), st.fractions(0.01, 5))
def test_counts_of_repeated_rows(rows, repeat):
    entry = MetaEntry("x", "x.jsonl", repeat_time=float(repeat))
    assert abs(entry.count(rows) - float(repeat) * rows) < 1
    assert MetaEntry("x", "x.jsonl", repeat_time=3).count(rows) == 3 * rows


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"repeat_time": 0}, ConfigError, "repeat_time of 'text'"),
        ({"repeat_time": True}, ConfigError, "repeat_time of 'text'"),
        ({"repeat_time": "2"}, ConfigError, "repeat_time of 'text'"),
        ({"repeat_time": 0.2}, ConfigError, "leaves a data set without rows"),
        ({"max_dynamic_patch": 0}, ConfigError, "max_dynamic_patch of 'text'"),
        ({"annotation": None}, DataError, "'text' in .* has no annotation"),
        ({"annotation": "none.jsonl"}, DataError, "cannot be read"),
        ({"root": "nowhere"}, DataError, "image folder .* does not exist"),
    ],
)
def test_meta_files_that_cannot_work(meta, changes, error, why):
    with pytest.raises(error, match=why):
        InternVLRows(meta(text=changes))


def test_a_wrong_length_is_told(meta):
    with pytest.warns(UserWarning, match=r"gives 'text' 5 rows; .*b\.jsonl has 4"):
        InternVLRows(meta(text={"length": 5}))


@pytest.mark.parametrize("content", ["", "[]", "{}", "3"])
def test_files_that_are_no_meta_file(tmp_path, content):
    path = tmp_path / "meta.json"
    path.write_text(content)
    with pytest.raises(DataError, match="meta file"):
        read_meta(path)


def test_shards_instead_of_a_root(meta, folder):
    shards = TarImages(pack(folder, ["coco/cat.jpg"]))
    rows = InternVLRows(meta(photos={"root": ""}), images={"photos": shards})
    assert rows.image(0, "coco/cat.jpg").size == photograph("chelsea").size
    with pytest.raises(ConfigError, match="not in the meta file"):
        InternVLRows(meta(), images={"photo": shards})


# ----------------------------------------------------------------------------------------------- images


def test_shards_hold_what_the_folder_holds(folder):
    pack(folder, ["coco/cat.jpg", "coco/cup.png"], "s-00.tar")
    pack(folder, ["vg/rocket.jpg"], "s-01.tar", prefix="./")
    names = ["coco/cat.jpg", "coco/cup.png", "vg/rocket.jpg"]
    whole = ImageFolder(folder / "images")
    for given_as in (
        str(folder / "s-*.tar"),
        str(folder / "s-{00..01}.tar"),
        [folder / "s-00.tar", folder / "s-01.tar"],
    ):
        shards = pickle.loads(pickle.dumps(TarImages(given_as)))
        assert len(shards) == 3
        assert all(name in shards for name in names)
        for name in names:
            assert np.array_equal(shards.open(name), whole.open(name))
        with pytest.raises(DataError, match="None of the 2 tar shards contains"):
            shards.open("coco/dog.jpg")


def test_shards_that_cannot_be_used(folder):
    with pytest.raises(DataError, match="No tar shard matches"):
        TarImages(folder / "none-*.tar")
    with pytest.raises(DataError, match="uncompressed"):
        TarImages(pack(folder, ["coco/cat.jpg"], "c.tar.gz", mode="w:gz"))
    shard = pack(folder, ["coco/cat.jpg", "vg/rocket.jpg"], "cut.tar")
    shard.write_bytes(shard.read_bytes()[:-40_000])
    with pytest.raises(DataError, match="cannot be read as a tar shard"):
        TarImages(shard)
    pack(folder, ["coco/cat.jpg"], "one.tar")
    pack(folder, ["coco/cat.jpg"], "two.tar")
    with pytest.raises(DataError, match=r"Two images .* are named coco/cat.jpg"):
        TarImages([folder / "one.tar", folder / "two.tar"])


def test_a_shard_that_disappears(folder):
    shards = TarImages(pack(folder, ["coco/cat.jpg"]))
    (folder / "0.tar").unlink()
    with pytest.raises(DataError, match="No such file"):
        shards.open("coco/cat.jpg")


def test_damaged_images(folder):
    images = ImageFolder(folder / "images")
    with pytest.raises(DataError, match=r"none.jpg cannot be read: No such file"):
        images.open("none.jpg")
    for name in ("coco/cat.jpg", "coco/cup.png"):
        path = folder / "images" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=f"{name} cannot be decoded"):
            images.open(name)
    (folder / "images/page.html").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"page.html cannot be decoded: UnidentifiedImageError"):
        images.open("page.html")


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "CMYK", "LA", "I;16"])
def test_every_picture_becomes_rgb(tmp_path, mode):
    picture = photograph("chelsea").convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.array(picture, dtype=np.uint16) * 256)
    path = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    picture.save(path, **({"transparency": b"\x00" * 10} if mode == "P" else {}))
    read = ImageFolder(tmp_path).open(path.name)
    assert read.mode == "RGB"
    assert read.size == picture.size
    if mode == "I;16":  # PIL alone would cut it off at 255: a white picture
        assert np.array_equal(np.array(read)[..., 0], np.array(photograph("chelsea").convert("L")))


def test_absolute_names_stand_for_themselves(folder):
    assert ImageFolder(folder).open(str(folder / "images/coco/cat.jpg")).size == photograph("chelsea").size


def test_decoding_needs_no_file():
    buffer = io.BytesIO()
    photograph("coffee").save(buffer, "PNG")
    assert ImageDecoder()(buffer.getvalue(), "x").size == photograph("coffee").size

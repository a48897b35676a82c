"""Annotations name files of the image folder and nothing else; only regular files are opened."""

import io
import json
import os
import socket
import tarfile

import numpy as np
import pytest

from covft.data import (
    DataError,
    DatasetsRows,
    ImageFolder,
    InternVLRows,
    JsonRecords,
    LlavaRows,
    TarImages,
    open_rows,
    read_meta,
)
from covft.errors import ConfigError, CoVFTError
from tests.helpers.data import RECORDS, llava_dataset, pack, photograph, talk, write


def row(name):
    return {"image": name, "conversations": talk("<image>\nWhat is it?", "A cat.")}


@pytest.fixture
def secret(folder):
    """A picture next to the image folder."""
    path = folder / "secret.png"
    photograph("coffee").save(path)
    return path


# ------------------------------------------------------------------------------------------ the folder


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "coco/../../secret.png",
        "./../secret.png",
        "coco/../coco/cat.jpg",
        "{absolute}",
        "/{absolute}",
        "..",
    ],
)
def test_names_outside_the_folder(folder, secret, name):
    name = name.format(absolute=secret)
    with pytest.raises(DataError, match="lies outside the image folder"):
        ImageFolder(folder / "images").open(name)
    write(folder / "rows.jsonl", [RECORDS[1], row(name)])
    data = llava_dataset(folder, "rows.jsonl", max_broken=1)
    with pytest.warns(UserWarning, match=r"row 1 \(line 2\): The image .* lies outside the image folder"):
        assert data[1]["row"] == 0


def test_absolute_names_below_the_folder_and_by_option(folder, secret, monkeypatch):
    images = ImageFolder(folder / "images")
    assert images.open(str(folder / "images/coco/cat.jpg")).size == photograph("chelsea").size
    monkeypatch.chdir(folder)
    assert ImageFolder("images").open(str(folder / "images/coco/cat.jpg")).size == photograph("chelsea").size
    anywhere = ImageFolder(folder / "images", allow_absolute=True)
    assert np.array_equal(anywhere.open(str(secret)), photograph("coffee"))
    assert anywhere.open("coco/cat.jpg").size == photograph("chelsea").size
    with pytest.raises(DataError, match="lies outside"):
        anywhere.open("../secret.png")
    assert LlavaRows("llava.json", anywhere).image(0, str(secret)).size == photograph("coffee").size


def test_links_lead_out_of_the_folder_unless_they_shall_not(folder, secret):
    (folder / "images/linked.png").symlink_to(secret)
    (folder / "images/elsewhere").symlink_to(folder)
    (folder / "images/inside.jpg").symlink_to("coco/cat.jpg")
    for name in ("linked.png", "elsewhere/secret.png"):
        assert np.array_equal(ImageFolder(folder / "images").open(name), photograph("coffee"))
        with pytest.raises(DataError, match="lies outside"):
            ImageFolder(folder / "images", follow_links=False).open(name)
    strict = ImageFolder(folder / "images", follow_links=False)
    assert strict.open("inside.jpg").size == photograph("chelsea").size
    (folder / "images/loop").symlink_to("loop")
    with pytest.raises(DataError, match="cannot be read"):
        ImageFolder(folder / "images").open("loop")


@pytest.mark.parametrize(
    "url", ["http://example.org/a.png", "https://example.org/a.png", "s3://b/a.png", "file:///etc/a.png"]
)
def test_urls_are_named_in_full(folder, url):
    with pytest.raises(DataError, match=f"The image {url} is a URL; covft reads files only"):
        ImageFolder(folder / "images").open(url)
    with pytest.raises(DataError, match=url):
        LlavaRows(url)
    with pytest.raises(DataError, match=url):
        ImageFolder(url)
    with pytest.raises(DataError, match=url):
        TarImages(url)
    with pytest.raises(DataError, match=url):
        read_meta(url)
    with pytest.raises(DataError, match=url):
        InternVLRows(write_meta(folder, annotation=url))
    with pytest.raises(DataError, match=f"'set' in .*meta.json: The image folder {url}"):
        InternVLRows(write_meta(folder, root=url))


def test_data_strings_are_not_shown_in_full(folder):
    with pytest.raises(DataError, match="is a URL") as error:
        ImageFolder(folder / "images").open("data:image/png;base64," + "A" * 1_000_000)
    assert len(str(error.value)) < 600


def write_meta(folder, **entry):
    write(folder / "set.jsonl", RECORDS[:1])
    values = {"root": str(folder / "images"), "annotation": str(folder / "set.jsonl"), **entry}
    (folder / "meta.json").write_text(json.dumps({"set": values}))
    return folder / "meta.json"


# ---------------------------------------------------------------------------------------- special files


@pytest.fixture(params=["pipe", "device", "zero", "socket", "folder"])
def special(request, tmp_path):
    """A file that is not a regular one, by a link to it where it cannot be made."""
    path = tmp_path / f"{request.param}.png"
    with socket.socket(socket.AF_UNIX) as listener:
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "socket":
            listener.bind(os.path.relpath(path))  # such names are at most 108 characters long
        elif request.param == "folder":
            path.mkdir()
        else:
            path.symlink_to({"device": "/dev/tty", "zero": "/dev/zero"}[request.param])
        yield path


KIND = "it is a (named pipe|device|socket|folder), not a regular file"


def test_special_files_are_never_opened(special, folder):
    images = special.parent
    with pytest.raises(DataError, match=KIND):
        ImageFolder(images).open(special.name)
    for read in (JsonRecords, LlavaRows, read_meta, InternVLRows):
        with pytest.raises(DataError, match=KIND):
            read(special)
    with pytest.raises(DataError, match=KIND):
        TarImages(special)
    with pytest.raises(DataError, match=KIND):
        TarImages([pack(folder, ["coco/cat.jpg"]), special])
    with pytest.raises(CoVFTError, match=KIND):
        open_rows(special)
    with pytest.raises(DataError, match="'set' in .*" + KIND):
        InternVLRows(write_meta(folder, annotation=str(special)))


def test_a_file_that_becomes_a_pipe(folder):
    rows = LlavaRows(folder / "llava.jsonl", folder / "images")
    shards = TarImages(pack(folder, ["coco/cat.jpg"]))
    for path in (folder / "llava.jsonl", folder / "0.tar", folder / "images/coco/cat.jpg"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"has changed.*\n.*named pipe"):
        rows[0]
    with pytest.raises(DataError, match="named pipe"):
        rows.image(0, "coco/cat.jpg")
    with pytest.raises(DataError, match="named pipe"):
        shards.open("coco/cat.jpg")


# --------------------------------------------------------------------------------------------- shards


def test_members_that_are_no_regular_files(folder):
    with tarfile.open(folder / "odd.tar", "w") as tar:
        for name, kind in [
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(folder / "images/coco/cat.jpg")
            tar.addfile(member)
        for name in ("../../etc/cat.jpg", "/etc/cat.jpg"):  # names in a shard are keys, never paths
            data = (folder / "images/coco/cat.jpg").read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    shards = TarImages(folder / "odd.tar")
    assert len(shards) == 2
    assert shards.open("../../etc/cat.jpg").size == photograph("chelsea").size
    for name in ("link.jpg", "hard.jpg", "pipe.jpg"):
        with pytest.raises(DataError, match="None of the 1 tar shards"):
            shards.open(name)


def test_members_that_claim_too_much(folder):
    member = tarfile.TarInfo("huge.jpg")
    member.size = 1 << 40
    (folder / "huge.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(DataError, match=r"cannot be read as a tar shard|more than the limit"):
        TarImages(folder / "huge.tar").open("huge.jpg")
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 1 << 32
    with (folder / "pax.tar").open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 33)  # takes no space on the disk
    with pytest.raises(DataError, match="cannot be read as a tar shard: a header of 4,294,967,296 bytes"):
        TarImages(folder / "pax.tar")


@pytest.mark.parametrize("pattern", ["s-{0..99999999999}.tar", "s-{5..3}.tar", "s-{1..%s}.tar" % ("9" * 5000)])
def test_ranges_that_cannot_be_meant(folder, pattern):
    with pytest.raises(DataError, match="range of shards"):
        TarImages(folder / pattern)


# ---------------------------------------------------------------------------------- the datasets library


def test_a_data_set_names_no_files_of_its_own_choice(folder, secret, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    buffer = io.BytesIO()
    photograph("coffee").save(buffer, "PNG")
    files = [
        {"bytes": None, "path": str(secret)},
        {"bytes": None, "path": str(folder / "images/coco/cat.jpg")},
        {"bytes": None, "path": "coco/cat.jpg"},
        {"bytes": None, "path": "https://example.org/a.png"},
        {"bytes": buffer.getvalue(), "path": "../a.png"},
    ]
    table = datasets.Dataset.from_dict(
        {"conversations": [row("x")["conversations"]] * len(files), "image": files},
        features=datasets.Features(
            {
                "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
                "image": datasets.Image(decode=False),
            }
        ),
    )
    rows = DatasetsRows(table)
    for index in range(3):
        with pytest.raises(DataError, match=r'instead of holding it; DatasetsRows\(..., folder="images"\)'):
            rows.image(index, "0")
    below = DatasetsRows(table, folder=folder / "images")
    assert [below.image(index, "0").size for index in (1, 2)] == [photograph("chelsea").size] * 2
    with pytest.raises(DataError, match="lies outside the image folder"):
        below.image(0, "0")
    with pytest.raises(DataError, match=r"https://example.org/a.png is a URL"):
        below.image(3, "0")
    assert np.array_equal(rows.image(4, "0"), photograph("coffee"))
    with pytest.raises(ConfigError):
        rows.image(4, "1")

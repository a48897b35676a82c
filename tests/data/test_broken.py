"""Broken rows are reported once, replaced and limited, across workers, pickles and forks, too."""

import gc
import os
import pickle
import sys
import warnings
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from covft.data import (
    Collator,
    ConversationDataset,
    DataError,
    ImageText,
    LlavaRows,
    TarImages,
)
from covft.data.broken import BrokenLog, Place, _remove
from covft.errors import ConfigError
from tests.helpers.data import (
    RECORDS,
    TEXT,
    build_tokenizer,
    internvl_dataset,
    llava_dataset,
    pack,
    same,
    talk,
    to_tensor,
    write,
)

GOOD = {"id": "good", "conversations": talk("Who wrote Faust?", "Goethe did.")}
TWO = "<image>\nWhat is it?"


def break_it(folder, kind):
    """A row that cannot be used, and what its report says."""
    image = {"image": "coco/cat.jpg", "conversations": talk(TWO, "A cat.")}
    if kind == "missing image":
        return {**image, "image": "coco/none.jpg"}, "none.jpg cannot be read: No such file"
    if kind == "truncated image":
        path = folder / "images" / "coco/cut.jpg"
        path.write_bytes((folder / "images/coco/cat.jpg").read_bytes()[:5000])
        return {**image, "image": "coco/cut.jpg"}, "cut.jpg cannot be decoded"
    if kind == "malformed conversation":
        return {**image, "conversations": talk(TWO)}, "no question with an answer"
    if kind == "too many tags":
        return {**image, "conversations": talk(TWO + "<image>", "A cat.")}, "Too many <image> tags"
    if kind == "too few tags":
        return {**image, "conversations": talk("What?", "A cat.")}, "Too few <image> tags"
    if kind == "image tokens in the text":
        return {"conversations": talk("What is <IMG_CONTEXT>?", "A token.")}, "1 image tokens, but its images need 0"
    if kind == "no instruction":
        return {**image, "conversations": talk("<image>", "A cat.")}, "hold only images"
    if kind == "too long":
        return {"conversations": talk("Why? " * 50, "So.")}, "leaves no answer"
    if kind == "images cut off":
        many = {"image": ["coco/cat.jpg"] * 20, "conversations": talk("<image>" * 20 + "?", "Cats.")}
        return many, "truncates images"
    raise AssertionError(kind)


KINDS = [
    "missing image",
    "truncated image",
    "malformed conversation",
    "too many tags",
    "too few tags",
    "image tokens in the text",
    "no instruction",
    "too long",
    "images cut off",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_broken_row_is_reported_once_and_replaced(folder, kind, name):
    row, why = break_it(folder, kind)
    write(folder / name, [RECORDS[0], row, GOOD, RECORDS[2]])
    text = ImageText("<IMG_CONTEXT>", per_tile=4) if kind == "image tokens in the text" else TEXT
    data = llava_dataset(folder, name, image_text=text, max_length=100, max_broken=1)
    with pytest.warns(UserWarning, match=r"Skipped a broken row.*row 1") as seen:
        sample = data[1]
    assert len(seen) == 1
    assert sample["row"] == 2
    assert same(sample, data[2])  # and no second warning, which would be an error here
    assert same(sample, data[1])
    (broken,) = data.broken
    assert (broken.file, broken.row, broken.line) == (str(folder / name), 1, 2 if name.endswith("l") else None)
    assert why in broken.reason
    assert str(broken) in str(seen[0].message)


def test_a_line_that_is_not_json_is_a_broken_row(folder):
    path = write(folder / "rows.jsonl", [RECORDS[0], GOOD])
    path.write_text(path.read_text() + '{"conversations": [\n')
    data = llava_dataset(folder, "rows.jsonl", max_broken=1)
    with pytest.warns(UserWarning, match=r"row 2 \(line 3\): The row is not JSON"):
        assert data[2]["row"] == 0
    assert data.modality_lengths()[2] == 1


def test_missing_from_a_shard(folder):
    shards = TarImages(pack(folder, ["coco/cat.jpg", "coco/cup.png"]))
    rows = LlavaRows(folder / "llava.json", shards)
    data = ConversationDataset(rows, build_tokenizer("vicuna"), to_tensor(8), image_text=TEXT, max_broken=1)
    assert data[3]["num_tiles"] == [1, 1]
    with pytest.warns(UserWarning, match="None of the 1 tar shards contains the image vg.rocket.jpg"):
        assert data[4]["row"] == 0


def test_too_many_broken_rows_are_an_error(folder):
    bad = {"conversations": talk("Why?")}
    write(folder / "rows.jsonl", [GOOD] + [bad] * 7)
    data = llava_dataset(folder, "rows.jsonl", max_broken=6)
    with pytest.warns(UserWarning, match="Skipped a broken row") as seen, pytest.raises(DataError) as error:
        data[1]
    assert len(seen) == 7
    message = str(error.value)
    assert message.startswith("7 of 8 rows are broken, more than max_broken=6 allows.")
    assert all(f"row {row} (line {row + 1}): " in message for row in range(1, 6))
    assert "row 6" not in message
    assert "and 2 more" in message
    assert error.value.__cause__.place.row == 7
    with pytest.raises(DataError, match="7 of 8"):  # it does not pass the second time
        data[1]


@pytest.mark.parametrize(("limit", "allowed"), [(0, 0), (2, 2), (0.0, 0), (0.25, 2), (0.24, 1), (1.0, 8), (100, 8)])
def test_limits(folder, limit, allowed):
    write(folder / "rows.jsonl", [GOOD, {"conversations": talk("Why?")}] * 4)
    data = llava_dataset(folder, "rows.jsonl", max_broken=limit)
    met = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in (1, 3, 5, 7):
            try:
                data[row]
                met += 1
            except DataError:
                break
    assert met == min(allowed, 4)


@pytest.mark.parametrize("limit", [-1, 1.5, -0.1, True, "1", None, float("nan")])
def test_limits_that_cannot_work(folder, limit):
    with pytest.raises(ConfigError, match="max_broken"):
        llava_dataset(folder, max_broken=limit)


def test_when_no_row_is_left(folder):
    write(folder / "rows.jsonl", [{"conversations": talk("Why?")}] * 3)
    data = llava_dataset(folder, "rows.jsonl", max_broken=1.0)
    with (
        pytest.warns(UserWarning, match="Skipped a broken row"),
        pytest.raises(DataError, match="None of the 3 rows is usable"),
    ):
        data[0]


def test_check_reads_everything_and_replaces_nothing(folder):
    rows = [break_it(folder, kind)[0] for kind in ("missing image", "too few tags")]
    write(folder / "rows.jsonl", [GOOD, *rows, RECORDS[0]])
    data = llava_dataset(folder, "rows.jsonl", max_broken=0)
    assert [entry.row for entry in data.check()] == [1, 2]
    assert [entry.row for entry in data.check([0, 2])] == [2]
    assert data.broken == ()


def test_repeated_rows_count_once(folder):
    data = internvl_dataset(folder, {"repeat_time": 3}, [RECORDS[1], {"conversations": talk("Why?")}], max_broken=1)
    with pytest.warns(UserWarning, match="Skipped a broken row") as seen:
        assert [data[row]["row"] for row in range(6)] == [0, 2, 2, 4, 4, 0]
    assert len(seen) == 1
    assert len(data.broken) == 1


# --------------------------------------------------------------------------- workers, pickles, open files


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_read_the_same_and_report_to_the_data_set(folder):
    row, _ = break_it(folder, "missing image")
    write(folder / "rows.jsonl", [*RECORDS, row, *RECORDS, row])
    data = llava_dataset(folder, "rows.jsonl", max_broken=2)
    collate = Collator(0, image_shape=(3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apart = list(DataLoader(data, batch_size=3, num_workers=2, collate_fn=collate))
    assert [entry.row for entry in sorted(data.broken, key=lambda entry: entry.row)] == [5, 11]
    together = list(DataLoader(data, batch_size=3, collate_fn=collate))  # no warning: already reported
    assert len(apart) == len(together) == 4
    assert all(same(one, two) for one, two in zip(apart, together, strict=True))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_share_the_limit(folder):
    row, _ = break_it(folder, "missing image")
    write(folder / "rows.jsonl", [GOOD, row] * 4)
    data = llava_dataset(folder, "rows.jsonl", max_broken=3)
    errors = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = iter(DataLoader(data, batch_size=1, num_workers=2, collate_fn=_numbers))
        while True:  # to the end: after an error torch waits five seconds for each worker that was not
            try:
                next(batches)
            except StopIteration:
                break
            except DataError as error:
                errors.append(str(error))
    assert errors
    assert all("4 of 8 rows are broken" in error for error in errors)


def _numbers(samples):
    return [sample["row"] for sample in samples]


@pytest.mark.parametrize("store", ["folder", "shards"])
def test_a_pickle_reads_the_same(folder, store):
    names = ["coco/cat.jpg", "coco/cup.png", "vg/rocket.jpg"]
    images = TarImages(pack(folder, names)) if store == "shards" else folder / "images"
    rows = LlavaRows(folder / "llava.jsonl", images)
    data = ConversationDataset(rows, build_tokenizer("vicuna"), to_tensor(8), image_text=TEXT)
    copy = pickle.loads(pickle.dumps(data))
    assert all(same(data[row], copy[row]) for row in range(5))


def test_the_log_is_shared_by_copies_and_goes_with_the_first(folder):
    write(folder / "rows.jsonl", [{"conversations": talk("Why?")}, GOOD])
    data = llava_dataset(folder, "rows.jsonl", max_broken=1)
    path = data._log._path
    assert not path.exists()
    copy = pickle.loads(pickle.dumps(data))
    with pytest.warns(UserWarning, match="Skipped a broken row"):
        copy[0]
    assert len(data.broken) == 1
    del copy
    gc.collect()
    assert path.exists()
    del data
    gc.collect()
    assert not path.exists()


def test_a_forked_worker_leaves_the_log_to_its_owner(tmp_path):
    path = tmp_path / "log"
    path.touch()
    _remove(path, os.getpid() + 1)
    assert path.exists()
    _remove(path, os.getpid())
    assert not path.exists()


def test_no_file_stays_open(folder):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("lists open files by /proc")
    shards = TarImages(pack(folder, ["coco/cat.jpg", "coco/cup.png", "vg/rocket.jpg"]))
    data = ConversationDataset(
        LlavaRows(folder / "llava.json", shards), build_tokenizer("vicuna"), to_tensor(8), image_text=TEXT
    )
    for row in range(5):
        data[row]
    handles = [str(handle.readlink()) for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()]
    assert not [handle for handle in handles if str(folder) in handle]


def calls_to_log(rows):
    """Calls of functions, also of C, that it takes to log broken rows of which half come from another process."""
    log = BrokenLog(rows, rows)
    other = pickle.loads(pickle.dumps(log))
    errors = [DataError("not readable", place=Place("rows.json", row)) for row in range(rows)]
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event.endswith("call")

    before = sys.getprofile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.setprofile(count)
        try:
            for row, error in enumerate(errors):
                (log, other)[row % 2].add(error)
        finally:
            sys.setprofile(before)
    assert [entry.row for entry in log.entries()] == list(range(rows))
    return calls


def test_twice_as_many_broken_rows_take_twice_the_work():
    assert calls_to_log(80) < 2.5 * calls_to_log(40)

"""Shards: each row is written exactly once, whichever process dies."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import covft
from covft.errors import CheckpointError, ConfigError
from covft.utils.shards import Shards

ROOT = Path(covft.__file__).parents[1]
# Writes each row as a line. One that is told to hang does so in the middle of writing a shard.
WORKER = """
import sys
from covft.utils.shards import Shards
folder, hangs = sys.argv[1], sys.argv[2] == "hang"
for shard in Shards(folder, rows=11, size=2, suffix=".txt"):
    def write(path):
        with path.open("w") as file:
            for row in shard.rows:
                file.write(f"{row}\\n")
                file.flush()
                if hangs and shard.number == 2:
                    print("hangs", flush=True)
                    sys.stdin.read()
    shard.write(write)
    print(shard.number, flush=True)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def start(folder, how):
    command = [sys.executable, "-c", WORKER, str(folder), how]
    return subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def rows_in(folder):
    return [int(line) for path in sorted(folder.glob("shard-*.txt")) for line in path.read_text().splitlines()]


def work(shards, most=None):
    """Write the rows of the first shards that this process can have."""
    for shard in itertools.islice(shards, most):
        shard.write(lambda path, shard=shard: path.write_text("".join(f"{row}\n" for row in shard.rows)))


def claim_of(folder, number, machine=None, **changes):
    """Claim a shard as another process would, of a machine; None is this one."""
    made = Shards(folder, 4, 2, suffix=".txt")
    claim = made._claim(number, 0)
    holder = {**json.loads(claim.read_text()), **changes}
    claim.write_text(json.dumps({**holder, "machine": machine or holder["machine"]}))
    return claim


@pytest.mark.long
def test_a_killed_process_loses_and_repeats_nothing(tmp_path):
    with start(tmp_path, "hang") as dies:
        assert [dies.stdout.readline() for _ in range(3)][-1] == "hangs\n"
        with start(tmp_path, "work") as survivor:
            assert survivor.stdout.readline() == "3\n", "both are at work"
            dies.send_signal(signal.SIGKILL)
            survivor.stdout.read()
    assert (dies.returncode, survivor.returncode) == (-signal.SIGKILL, 0)
    assert rows_in(tmp_path) == list(range(11))
    assert sorted(path.name for path in tmp_path.iterdir())[:2] == ["claims", "shard-00000.txt"], "nothing else is left"
    assert not list((tmp_path / "claims").iterdir())


def test_after_all_were_killed_the_next_start_does_what_is_left(tmp_path):
    with start(tmp_path, "hang") as dies:
        assert [dies.stdout.readline() for _ in range(3)][-1] == "hangs\n"
        dies.kill()
    assert rows_in(tmp_path) == [0, 1, 2, 3], "a half-written shard does not count"
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.txt")}
    with start(tmp_path, "work") as again:
        again.stdout.read()
    assert again.returncode == 0
    assert rows_in(tmp_path) == list(range(11))
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before, "finished shards are not redone"


def test_a_start_goes_on_where_another_stopped(tmp_path):
    shards = Shards(tmp_path, 5, 2, suffix=".txt", about={"model": "a"})
    assert len(shards) == 3
    work(shards, 1)
    again = Shards(tmp_path, 5, 2, suffix=".txt", about={"model": "a"})
    assert again.missing() == [1, 2]
    work(again)
    assert rows_in(tmp_path) == [0, 1, 2, 3, 4]
    assert list(again) == []


def test_two_processes_never_have_the_same_shard(tmp_path):
    one, two = iter(Shards(tmp_path, 4, 2, suffix=".txt")), iter(Shards(tmp_path, 4, 2, suffix=".txt"))
    first, second = next(one), next(two)
    assert {first.number, second.number} == {0, 1}


def test_only_one_process_takes_over_the_claim_of_a_dead_one(tmp_path):
    claim_of(tmp_path, 0, started="0")  # its number has another process now
    shards = [Shards(tmp_path, 4, 2, suffix=".txt") for _ in range(2)]
    latest = [each._latest_claims() for each in shards]
    taken = [each._claim(0, found[0]) for each, found in zip(shards, latest, strict=True)]
    assert [claim is None for claim in taken] == [False, True]


def test_a_process_of_another_machine_is_dead_once_it_is_silent(tmp_path):
    claim = claim_of(tmp_path, 0, machine="elsewhere")
    shards = Shards(tmp_path, 4, 2, suffix=".txt", stale_after=100.0)
    assert shards._claim(0, 1) is None
    os.utime(claim, (0, 0))
    assert shards._claim(0, 1) is not None
    claim = claim_of(tmp_path, 1)  # and so is one of this machine that hangs
    claim.write_text("")  # killed before it said who it was
    assert shards._claim(1, 1) is None
    os.utime(claim, (0, 0))
    assert shards._claim(1, 1) is not None


def test_a_beat_keeps_a_claim(tmp_path):
    claimed = iter(Shards(tmp_path, 4, 2, suffix=".txt"))
    shard = next(claimed)
    os.utime(shard.claim, (0, 0))
    shard.beat()
    assert shard.claim.stat().st_mtime > 1e9


def test_a_shard_that_was_given_up_is_free(tmp_path):
    shards = Shards(tmp_path, 4, 2, suffix=".txt")
    for _ in shards:
        break
    work(shards)
    assert rows_in(tmp_path) == [0, 1, 2, 3]


def test_a_folder_of_other_data_is_refused(tmp_path):
    Shards(tmp_path, 4, 2, about={"model": "a"})
    for other, shown in (({"rows": 5}, "rows=5"), ({"about": {"model": "b"}}, "model='b'")):
        with pytest.raises(ConfigError, match=f"begun with other data or settings[\\s\\S]*{shown}"):
            Shards(tmp_path, **{"rows": 4, "size": 2, "about": {"model": "a"}, **other})
    for wrong in ({"rows": 0}, {"size": 0}, {"stale_after": 0.0}):
        with pytest.raises(ConfigError, match="cannot be divided"):
            Shards(tmp_path / "new", **{"rows": 4, "size": 2, **wrong})
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        Shards(tmp_path / "file", 4, 2)


def test_a_shard_that_cannot_be_written_says_so__and_leaves_nothing(tmp_path):
    claimed = iter(Shards(tmp_path, 4, 2, suffix=".txt"))
    shard = next(claimed)

    def full(path):
        path.write_text("0")
        raise OSError("No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot be written[\s\S]*No space left"):
        shard.write(full)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["shards.json"]

"""Saving over a good folder: at every instant it loads as the old or the new state."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import covft
from covft.checkpoints.folder import read_folder, write_folder
from covft.errors import CheckpointError
from tests.helpers.checkpoints import WIDTH, clip_vit, wrapped
from tests.helpers.interrupted import DONE, REFUSED, end_of, fork, interrupted, needs_fork
from tests.helpers.towers import perturb

FILES = {"covft_config.json", "model.safetensors", "README.md"}


def save(path, number=1.0, size=64):
    tensors = {"weight": torch.full((size, 4), number), "bias": torch.full((2,), number)}
    settings = {"covft": {"experts": number}, "base": {"source": None}, "text": {"source": None}}
    write_folder(path, tensors, settings, "# card")


def number_in(path):
    """Return the number that a folder was saved with; weights and settings have to agree."""
    tensors, config = read_folder(path)
    numbers = {float(value) for tensor in tensors.values() for value in tensor.unique()}
    assert numbers == {config["covft"]["experts"]}
    return numbers.pop()


def names(path):
    return {entry.name for entry in path.iterdir()}


@needs_fork
@pytest.mark.parametrize(
    ("first", "kill"),
    [
        pytest.param(False, False, id="error over a good folder", marks=pytest.mark.long),
        pytest.param(False, True, id="kill over a good folder"),
        pytest.param(True, True, id="kill in a new folder", marks=pytest.mark.long),
        pytest.param(True, False, id="error in a new folder", marks=pytest.mark.slow),
    ],
)
def test_each_file_operation_that_fails_leaves_the_old_or_the_new_state(tmp_path, first, kill):
    steps, states = 0, set()
    while True:
        folder = tmp_path / str(steps)
        if not first:
            save(folder, 1.0)
        code = interrupted(lambda: save(folder, 2.0), folder, steps + 1, kill=kill)  # noqa: B023
        if code is None:
            break
        steps += 1
        assert code == -signal.SIGKILL if kill else code in (DONE, REFUSED)
        found = None if first and not (folder / "covft_config.json").exists() else number_in(folder)
        assert found in ((None, 2.0) if first else (1.0, 2.0))
        assert code != DONE or found == 2
        states.add(found)
        save(folder, 3.0)
        assert number_in(folder) == 3
        assert names(folder) == FILES
    assert steps >= 20
    assert states == ({None, 2.0} if first else {1.0, 2.0})


def killed_before_the_last_rename(folder, other):
    """Make what a save of 2 over 1 leaves that was killed after the switch."""
    save(folder, 1.0)
    save(other, 2.0)
    _, config = read_folder(other)
    (other / "model.safetensors").rename(folder / f"model-{config['weights']['sha256'][:16]}.safetensors")
    (other / "covft_config.json").replace(folder / "covft_config.json")


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("number", [2.0, 3.0])
def test_a_failing_save_after_a_killed_one_leaves_what_was_there(tmp_path, monkeypatch, number, call):
    """The same weights again have the name of those that were left."""
    folder = tmp_path / "run"
    killed_before_the_last_rename(folder, tmp_path / "other")
    assert number_in(folder) == 2
    calls = iter(range(1, 9))
    replace = os.replace

    def failing(*args, **kwargs):
        if next(calls) == call:
            raise OSError("Input/output error")
        replace(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(CheckpointError, match=r"run cannot be written to[^$]*Input/output error"):
            save(folder, number)
    assert number_in(folder) == (2 if call < 3 else number)
    save(folder, 4.0)
    assert number_in(folder) == 4
    assert names(folder) == FILES


def kills(path, times, save, state_of):
    """Kill a process that saves A and B in turn, and expect one of the two each time."""
    start = time.perf_counter()
    save(path, "A")
    seconds, seen = time.perf_counter() - start, []
    for count in range(times):

        def forever(letters="AB" if count % 2 else "BA"):
            while True:
                for letter in letters:
                    save(path, letter)

        child = fork(forever)
        time.sleep(random.uniform(0, 4 * seconds))  # a random moment is the point
        os.kill(child, signal.SIGKILL)
        assert end_of(child) == -signal.SIGKILL
        seen.append(state_of(path))
    return seen


@needs_fork
@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing(tmp_path, times):
    letters = {"A": 1.0, "B": 2.0}
    seen = kills(tmp_path, times, lambda path, letter: save(path, letters[letter]), number_in)
    assert set(seen) == {1.0, 2.0} or times == 10
    save(tmp_path, 3.0)
    assert number_in(tmp_path) == 3
    assert names(tmp_path) == FILES


@needs_fork
@pytest.mark.slow
def test_kills_of_encoders_that_are_saved_lose_nothing(tmp_path):
    base = clip_vit().eval()
    encoders = {"A": wrapped(copy.deepcopy(base)), "B": wrapped(copy.deepcopy(base))}
    for encoder in encoders.values():
        perturb(encoder)
    states = {letter: encoder.vit.state_dict() for letter, encoder in encoders.items()}

    def state_of(folder):
        found = covft.load(folder, vit=copy.deepcopy(base), text_encoder=WIDTH).vit.state_dict()
        (letter,) = (
            letter
            for letter, state in states.items()
            if state.keys() == found.keys() and all(torch.equal(state[name], found[name]) for name in found)
        )
        return letter

    seen = kills(tmp_path, 100, lambda path, letter: encoders[letter].save_pretrained(path), state_of)
    assert set(seen) == {"A", "B"}


@needs_fork
def test_processes_that_save_to_one_folder_while_another_reads(tmp_path):
    save(tmp_path, 0.0)

    def saves(number):
        for turn in range(15):
            save(tmp_path, float(10 * number + turn))

    writers = [fork(lambda number=number: saves(number)) for number in range(1, 4)]
    codes = []
    while writers:
        number_in(tmp_path)
        for pid in list(writers):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                writers.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
    assert codes == [DONE] * 3
    assert number_in(tmp_path) in (24.0, 34.0, 44.0)
    assert names(tmp_path) == FILES


def test_threads_that_save_to_one_folder_while_another_reads(tmp_path):
    save(tmp_path, 0.0)
    stop = threading.Event()

    def saves(number):
        for turn in range(15):
            save(tmp_path, float(10 * number + turn))

    def reads():
        count = 0
        while not stop.is_set() or not count:
            number_in(tmp_path)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        reader = pool.submit(reads)
        writers = [pool.submit(saves, number) for number in range(1, 4)]
        try:
            for writer in writers:
                writer.result()
        finally:
            stop.set()
        assert reader.result()
    assert number_in(tmp_path) in (24.0, 34.0, 44.0)
    assert names(tmp_path) == FILES


@needs_fork
@pytest.mark.parametrize("limit", [0, 100, 2000])
def test_files_that_may_not_grow_leave_the_old_state(tmp_path, limit):
    resource = pytest.importorskip("resource")
    save(tmp_path, 1.0)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(tmp_path, 2.0, size=1000)

    assert end_of(fork(limited)) == REFUSED
    assert number_in(tmp_path) == 1
    assert names(tmp_path) == FILES


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system can be mounted here: {error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_old_state(small_disk):
    folder = small_disk / "run"
    save(folder, 1.0, size=2000)  # 32 KiB
    refused = 0
    for left in range(0, 72, 8):
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            free = os.statvfs(small_disk)
            file.write(bytes(max(free.f_bavail * free.f_frsize - left * 1024, 0)))
        before = number_in(folder)
        try:
            save(folder, 2.0 + left, size=2000)
            assert number_in(folder) == 2 + left
        except CheckpointError:
            refused += 1
            assert number_in(folder) == before
        filler.unlink()
    assert 0 < refused < 9
    save(folder, 100.0, size=2000)
    assert number_in(folder) == 100
    assert names(folder) == FILES

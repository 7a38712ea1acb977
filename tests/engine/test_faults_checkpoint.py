"""Killing the writer, filling the disk and damaging files: no run is lost, and damage never goes unseen."""

import errno
import io
import logging
import os
import random
import resource
import signal
import time
import traceback

import pytest
import torch

from condgen import disk
from condgen.engine.checkpoint import FAULT_EXIT, CheckpointStore
from condgen.errors import CheckpointError

GROUPS = ("system", "ema", "optim-generator")


def tensors(step, size=64):
    return {group: {"weight": torch.full((size,), float(step)), "count": torch.tensor(step)} for group in GROUPS}


def in_child(work):
    """Runs work() in a forked child and returns its pid. The child leaves without any of pytest's clean-up."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # a child that hangs must not outlive the tests
        torch.set_num_threads(1)  # the parent's thread pool did not survive the fork
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assert_usable(folder, at_least):
    """What a new start does: it finds a good checkpoint, cleans up, and can save the next one."""
    store = CheckpointStore(folder)
    found = store.latest()
    assert found is not None and found.step >= at_least
    assert all(torch.equal(found.tensors(group)["weight"][:1], torch.tensor([float(found.step)])) for group in GROUPS)
    store.save(found.step + 1, tensors(found.step + 1), {})
    assert not list(folder.glob(".tmp-*")) and not list(folder.glob(".del-*"))
    return found.step


# kill -9


def kill_while_saving(folder, delay):
    """Saves without a pause in a child, kills it after `delay` seconds; returns the last step it reported."""
    read, write = os.pipe()

    def work():
        store = CheckpointStore(folder)
        for step in range(1, 100_000):
            store.save(step, tensors(step, size=200_000), {"step": step})
            os.write(write, b"%d\n" % step)

    pid = in_child(work)
    os.close(write)
    reported = os.read(read, 4096)  # the first save: from here on there is something to lose
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    while more := os.read(read, 65536):
        reported += more
    os.close(read)
    return int(reported.split()[-1])


def kill_trials(folder, count):
    delays = random.Random(count)
    for trial in range(count):
        place = folder / str(trial)
        last = kill_while_saving(place, delays.uniform(0.0, 0.25))
        assert last <= assert_usable(place, last) <= last + 1


@pytest.mark.faults
def test_kill_at_any_moment_loses_nothing(tmp_path):
    kill_trials(tmp_path, 5)


@pytest.mark.slow
@pytest.mark.faults
def test_kill_at_forty_moments_loses_nothing(tmp_path):
    kill_trials(tmp_path, 40)


@pytest.mark.parametrize(
    ("point", "newest"),
    [("first-file", 2), ("file", 2), ("manifest", 2), ("synced", 2), ("renamed", 3), ("retiring", 3)],
)
def test_kill_at_each_point_of_a_save(tmp_path, monkeypatch, point, newest):
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1), {})
    store.save(2, tensors(2), {})
    monkeypatch.setenv("CONDGEN_FAULT", point)
    assert exit_code(in_child(lambda: CheckpointStore(tmp_path).save(3, tensors(3), {}))) == FAULT_EXIT
    monkeypatch.delenv("CONDGEN_FAULT")
    assert store.latest().step == newest
    good = [step for step in store.steps() if store.load(step)]
    assert len(good) >= 2, "two checkpoints must be usable at every moment"
    assert_usable(tmp_path, newest)


def test_the_nth_hit_of_a_point_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDGEN_FAULT", "manifest:3")

    def work():
        store = CheckpointStore(tmp_path)
        for step in range(1, 9):
            store.save(step, tensors(step), {})

    assert exit_code(in_child(work)) == FAULT_EXIT
    monkeypatch.delenv("CONDGEN_FAULT")
    assert CheckpointStore(tmp_path).steps() == [1, 2]


# full disk


@pytest.mark.faults
def test_file_size_limit_in_mid_write_keeps_the_previous_checkpoint(tmp_path):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = CheckpointStore(tmp_path)
        store.save(1, tensors(1), {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(
            CheckpointError, match=r"step-00000002: the disk is full \([\d,]+ bytes needed, [\d,]+ free"
        ):
            store.save(2, tensors(2, size=100_000), {})
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert store.latest().step == 1
        store.save(3, tensors(3), {})

    assert exit_code(in_child(work)) == 0
    assert CheckpointStore(tmp_path).latest().step == 3


@pytest.mark.parametrize("allowed", [0, 1, 3, 5])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_half_way_keeps_the_previous_checkpoint(tmp_path, monkeypatch, allowed, number):
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1), {})
    made = []

    class Full(io.FileIO):
        def write(self, data):
            super().write(data[: len(data) // 2])
            raise OSError(number, os.strerror(number))

    def fake_open(path, mode):
        made.append(path)
        return (Full if len(made) > allowed else io.FileIO)(path, mode.replace("b", ""))

    if allowed == 5:  # every file fits, and the folder's own entry does not
        monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    else:
        monkeypatch.setattr(disk, "open", fake_open, raising=False)
    with pytest.raises(CheckpointError, match="the disk is full"):
        store.save(2, tensors(2), {})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert store.latest().step == 1


def test_an_interrupt_in_mid_save_leaves_nothing_behind(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1), {})
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.save(2, tensors(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# damaged files

FILES = (*(f"{group}.safetensors" for group in GROUPS), "state.json", "manifest.json")


@pytest.fixture
def two(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    store = CheckpointStore(tmp_path)
    store.save(5, tensors(5), {"seed": 1, "note": "x" * 40})
    store.save(10, tensors(10), {"seed": 1, "note": "x" * 40})
    return store


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_skipped(two, caplog, name, share):
    path = two.folder / "step-00000010" / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert two.latest().step == 5
    assert "step-00000010" in caplog.text
    with pytest.raises(CheckpointError, match=r"steps in .*: 5$"):
        two.load(10)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_seen(two, name):
    path = two.folder / "step-00000010" / name
    data = path.read_bytes()
    draw = random.Random(name)
    for _ in range(20):
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        assert two.latest().step == 5, f"bit {bit} of byte {place} went unseen"
    path.write_bytes(data)
    assert two.latest().step == 10


def test_every_single_bit_of_a_manifest_is_covered(two):
    path = two.folder / "step-00000010" / "manifest.json"
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(CheckpointError):
            two.load(10)


def test_an_unreadable_file_counts_as_damage(two, monkeypatch):
    real = open

    def failing(path, *args, **kwargs):
        if "step-00000010/ema" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("condgen.engine.manifest.open", failing, raising=False)
    assert two.latest().step == 5

"""Two runs in one folder, and owners that die without saying so."""

import os
import signal
import time

import pytest

from condgen.disk import replace_file
from condgen.engine.run import RunFolder
from condgen.errors import CondgenError, ConfigError


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path, "a")


def child_that(work):
    """Forks; the child runs work(ready), which must call ready(), and then waits to be killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        try:
            work(lambda: os.write(write, b"ready"))
            time.sleep(30)
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 5) == b"ready"
    os.close(read)
    return pid


def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_second_run_is_refused_with_the_owners_pid(run):
    def own(ready):
        run.lock()
        ready()

    pid = child_that(own)
    try:
        with pytest.raises(ConfigError, match=f"in use by process {pid} on "):
            run.lock()
    finally:
        end(pid)
    with run.lock():  # the kernel let go when the owner was killed
        pass


def test_a_data_worker_that_outlives_the_trainer_does_not_keep_the_lock(run):
    workers = []

    def own(ready):
        lock = run.lock()
        workers.append(lock)
        worker = os.fork()
        if worker == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            time.sleep(30)
            os._exit(0)
        (run.path / "worker").write_text(str(worker))
        ready()

    pid = child_that(own)
    worker = int((run.path / "worker").read_text())
    try:
        with pytest.raises(ConfigError, match="in use"):
            run.lock()
        end(pid)
        os.kill(worker, 0)  # still there
        time.sleep(0.2)
        run.lock().release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_released_locks_can_be_taken_again(run):
    lock = run.lock()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} "):
        run.lock()
    lock.release()
    lock.release()
    with run.lock():
        pass


def test_a_lock_in_a_folder_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot write to"):
        RunFolder(tmp_path / "gone").lock()


def test_a_file_is_not_replaced_through_a_link(tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "status.json").symlink_to(target)
    (tmp_path / "folder").mkdir()
    for name in ("status.json", "folder"):
        with pytest.raises(CondgenError, match="not a plain file"):
            replace_file(tmp_path / name, b"new")
    assert target.read_text() == "mine"


def test_a_replacement_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    replace_file(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["status.json"]

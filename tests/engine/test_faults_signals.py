"""Signals and closed streams in real processes."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from condgen.engine.log import read_metrics

pytestmark = pytest.mark.faults


def start(code, **options):
    return subprocess.Popen([sys.executable, "-u", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, **options)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_request_ends_the_process_at_once(second):
    child = start(
        """
        import time
        from condgen.engine import signals
        signals.GRACE_SECONDS = 0.2
        with signals.StopSignals() as stop:
            print("ready")
            while not stop.requested:
                time.sleep(0.01)
            print("asked")
            time.sleep(60)
        """
    )
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == b"asked\n"
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    child.send_signal(second)
    assert child.wait(10) == 128 + second


TRAINING = """
import sys, time
from pathlib import Path
from condgen.engine.log import Log
from condgen.engine.run import RunFolder
from condgen.engine.signals import StopSignals

run = RunFolder(Path(sys.argv[1]))
log = Log(run)
with StopSignals() as stop, log.progress(200, every_seconds=0) as progress:
    for step in range(1, 201):
        log.text(f"line {step}")
        if step > 5:
            print("from a library")  # after the log has met the closed stream
        log.scalars(step, {"loss": 1 / step})
        progress.advance(step, {"loss": 1 / step})
        if step == 5:
            input()
log.close()
run.status("done", 0, "", 200)
"""


@pytest.mark.parametrize("hang_up", [False, True])
def test_a_training_outlives_its_reader(tmp_path, hang_up):
    child = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"line 1\n"  # then the reader goes away
    child.stdout.close()
    if hang_up:
        child.send_signal(signal.SIGHUP)
    child.stdin.write(b"\n")
    child.stdin.close()
    complaint = child.stderr.read()
    assert child.wait(30) == 0, complaint.decode()
    assert complaint == b""
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 201))
    assert (tmp_path / "log.txt").read_text().count("line ") == 200


def test_a_training_outlives_its_terminal(tmp_path):
    master, slave = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path)], stdin=subprocess.PIPE, stdout=slave, stderr=subprocess.PIPE
    )
    os.close(slave)
    assert os.read(master, 10)
    os.close(master)
    child.stdin.write(b"\n")
    child.stdin.close()
    complaint = child.stderr.read()
    assert child.wait(30) == 0, complaint.decode()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 200

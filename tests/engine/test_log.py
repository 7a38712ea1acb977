"""metrics.jsonl, log.txt, samples, trackers and what appears on the screen."""

import io
import json
import logging
import sys
import types

import pytest
import torch
from PIL import Image

from condgen.engine.console import Console, Progress, duration
from condgen.engine.log import Log, read_metrics
from condgen.engine.run import RunFolder
from condgen.errors import ConfigError


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path, "a")


def steps(log, first, last):
    for step in range(first, last + 1):
        log.scalars(step, {"generator/loss": 1 / step, "critic/loss": float(step)})
        if step % 4 == 0:
            log.scalars(step, {"score/fid": 100.0 / step})


def test_scalars_are_lines_that_come_back_exactly(run):
    log = Log(run, quiet=True)
    log.scalars(3, {"a": 0.1 + 0.2, "b": torch.tensor(2.0), "c": float("nan"), "d": -float("inf"), "e": 4})
    log.scalars(4, {})
    log.close()
    text = run.metrics.read_text()
    assert json.loads(text) == {"step": 3, "a": 0.1 + 0.2, "b": 2.0, "c": "nan", "d": "-inf", "e": 4.0}
    (line,) = read_metrics(run.metrics)
    assert line["c"] != line["c"] and line["d"] == -float("inf") and line["step"] == 3


@pytest.mark.parametrize("stop", [0, 1, 8, 9, 20])
def test_resumed_run_gives_the_lines_of_the_uninterrupted_one(tmp_path, stop):
    whole, parts = RunFolder.create(tmp_path, "whole"), RunFolder.create(tmp_path, "parts")
    log = Log(whole, quiet=True, trackers=("csv",))
    steps(log, 1, 20)
    log.close()
    log = Log(parts, quiet=True, trackers=("csv",))
    steps(log, 1, min(stop + 3, 20))  # three steps that no checkpoint saw
    log.close()
    with open(parts.metrics, "ab") as file:
        file.write(b'{"step": 9, "gener')  # the line that the kill tore
    log = Log(parts, quiet=True, trackers=("csv",))
    log.rewind(stop)
    steps(log, stop + 1, 20)
    log.close()
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (whole.path / name).read_bytes() == (parts.path / name).read_bytes()


def test_a_torn_line_does_not_swallow_the_next(run):
    run.metrics.write_bytes(b'{"step": 1, "a": 1.0}\n{"step": 2, "a"')
    log = Log(run, quiet=True)
    log.scalars(3, {"a": 3.0})
    log.close()
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 3]


def test_other_processes_write_nothing(run):
    log = Log(run, main=False, trackers=("csv",))
    steps(log, 1, 4)
    log.text("hello")
    assert log.media(1, "grid", Image.new("RGB", (2, 2))) is None
    log.rewind(0)
    with log.progress(4) as progress:
        progress.advance(4)
    log.close()
    assert list(run.path.iterdir()) == []


def test_media_is_saved_plain_and_named_safely(run):
    log = Log(run, quiet=True)
    image = Image.new("RGB", (3, 2), "blue")
    image.info["comment"] = "secret"
    assert log.media(12, "grid", image) == run.samples / "step-00000012-grid.png"
    hostile = log.media(12, "../../x", image)
    log.close()
    assert hostile.parent == run.samples and hostile.name.startswith("step-00000012-x-")
    assert Image.open(run.samples / "step-00000012-grid.png", formats=("PNG",)).info == {}


def test_text_and_warnings_reach_screen_and_file(run):
    screen = io.StringIO()
    log = Log(run, stream=screen)
    log.text("started [bold]")
    logging.getLogger("condgen.engine.checkpoint").warning("skipped %d", 7)
    log.close()
    logging.getLogger("condgen.x").warning("after")
    assert screen.getvalue() == "started [bold]\nwarning: skipped 7\n"
    lines = (run.path / "log.txt").read_text().splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["started [bold]", "warning: skipped 7"]


# a full disk


def test_full_disk_in_the_metrics_warns_once_and_training_goes_on(run, monkeypatch, caplog):
    log = Log(run, quiet=True)
    steps(log, 1, 2)
    full = [True]

    class Full(io.FileIO):
        def write(self, data):
            if not full[0]:
                return super().write(data)
            super().write(data[:5])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("condgen.disk.open", lambda path, mode, buffering: Full(path, "a"), raising=False)
    with caplog.at_level(logging.WARNING):
        steps(log, 3, 10)
    full[0] = False
    steps(log, 11, 12)
    log.close()
    assert [r.message for r in caplog.records if "metrics.jsonl" in r.message] == [
        "cannot write metrics.jsonl (No space left on device); the run goes on without its new lines"
    ]
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 2, 11, 12, 12]


def test_full_disk_for_pictures_warns_once(run, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    log = Log(run, quiet=True)
    monkeypatch.setattr("condgen.engine.log.replace_file", full)
    for step in range(3):
        assert log.media(step, "grid", Image.new("RGB", (2, 2))) is None
    log.close()
    assert caplog.text.count("cannot write pictures") == 1


# trackers


def test_default_imports_no_tracker(run):
    before = set(sys.modules)
    log = Log(run, quiet=True)
    steps(log, 1, 2)
    log.close()
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in ("tensorboard", "wandb", "trackio")}


def test_an_unknown_tracker_is_refused_with_a_suggestion(run):
    with pytest.raises(ConfigError, match=r"Did you mean 'tensorboard'.*csv, tensorboard, trackio, wandb"):
        Log(run, trackers=("tensorbord",))


@pytest.mark.parametrize(
    ("name", "install"),
    [("wandb", "pip install wandb"), ("trackio", "pip install trackio"), ("tensorboard", r"condgen\[track\]")],
)
def test_a_missing_tracker_says_what_to_install(run, monkeypatch, name, install):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=install):
        Log(run, trackers=(name,))


def test_tensorboard_receives_scalars_and_pictures(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = Log(run, quiet=True, trackers=("tensorboard",))
    steps(log, 1, 6)
    log.rewind(4)
    steps(log, 5, 5)
    log.media(5, "grid", Image.new("L", (4, 4)))
    log.close()
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("generator/loss")] == [1, 2, 3, 4, 5]
    assert events.Tags()["images"] == ["grid"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_receive_scalars_and_pictures(run, monkeypatch, name):
    calls = []
    fake = types.ModuleType(name)
    fake.init = lambda **options: calls.append(("init", options)) or fake
    fake.log = lambda values, **options: calls.append(("log", values, options))
    fake.finish = lambda: calls.append(("finish",))
    fake.Image = lambda image: image.size
    monkeypatch.setitem(sys.modules, name, fake)
    log = Log(run, quiet=True, trackers=(name,))
    log.scalars(3, {"a": 1.0})
    log.media(3, "grid", Image.new("RGB", (4, 2)))
    log.close()
    assert calls[0][0] == "init" and calls[0][1]["name"] == "a" and calls[-1] == ("finish",)
    assert calls[1][1]["a"] == 1.0 and calls[2][1]["grid"] == (4, 2)


def test_a_tracker_that_fails_is_switched_off_and_the_run_goes_on(run, monkeypatch, caplog):
    log = Log(run, quiet=True, trackers=("csv",))
    monkeypatch.setattr(log._trackers[0], "scalars", lambda *_: 1 / 0)
    steps(log, 1, 3)
    log.close()
    assert caplog.text.count("the tracker csv failed and is off") == 1
    assert len(read_metrics(run.metrics)) == 3


# progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_plain_progress_is_periodic_lines_without_control_codes():
    screen, clock = io.StringIO(), Clock()
    with Progress(Console(screen), 1000, done=500, every_seconds=10, clock=clock) as progress:
        for step in range(501, 1001):
            clock.now += 0.1
            progress.advance(step, {"generator/loss": 1.0}, data_wait=0.04)
    lines = screen.getvalue().splitlines()
    assert 4 <= len(lines) <= 6 and "\x1b" not in screen.getvalue() and "\r" not in screen.getvalue()
    assert (
        lines[0].startswith("step 60") and "10 steps/s  left 40s  data 40% (loader-bound)  generator/loss 1" in lines[0]
    )
    assert lines[-1].startswith("step 1000/1000  100%  10 steps/s  left 0s")


def test_a_run_that_stops_early_shows_where():
    screen = io.StringIO()
    with Progress(Console(screen), 1000) as progress:
        progress.advance(7, {"loss": 2.0})
    assert screen.getvalue().startswith("step 7/1000")


def test_a_terminal_gets_a_bar_and_messages_above_it(run):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    log = Log(run, stream=screen)
    with log.progress(10) as progress:
        progress.advance(4, {"loss": 2.5}, data_wait=0.0)
        log.text("a message")
        progress.advance(10, {"loss": 1.25})
    log.text("after the bar")
    log.close()
    shown = screen.getvalue()
    assert "a message" in shown and "10/10" in shown and "1.25" in shown and shown.endswith("after the bar\n")


def test_quiet_shows_nothing(run, capsys):
    log = Log(run, quiet=True)
    log.text("x")
    with log.progress(2) as progress:
        progress.advance(2)
    log.close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (65, "1m05s"), (3725, "1h02m"), (59.7, "1m00s")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text

"""Stop signals: counted, restored, and harmless outside the main thread."""

import ast
import inspect
import os
import signal
import textwrap
import threading

import pytest

from condgen.engine import signals
from condgen.engine.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_only_sets_the_request(number):
    with StopSignals() as stop:
        assert not stop.requested and stop.reason == ""
        os.kill(os.getpid(), number)
        assert stop.requested and stop.count == 1 and stop.reason == signal.Signals(number).name
        assert not stop.note


def test_copies_from_a_launcher_are_one_request():
    with StopSignals() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == "SIGINT"


def test_previous_handlers_come_back_also_after_an_error():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    mine = lambda *_: None  # noqa: E731
    before_user = signal.signal(signal.SIGUSR1, mine)
    try:
        before = [signal.getsignal(number) for number in numbers]
        with pytest.raises(ZeroDivisionError), StopSignals():
            assert signal.getsignal(signal.SIGUSR1) is not mine
            1 / 0
        assert [signal.getsignal(number) for number in numbers] == before
    finally:
        signal.signal(signal.SIGUSR1, before_user)


def test_nested_use_restores_the_outer_handlers():
    with StopSignals() as outer:
        with StopSignals() as inner:
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert inner.count == 1 and outer.count == 1


def test_outside_the_main_thread_it_does_nothing_and_says_so():
    before = signal.getsignal(signal.SIGTERM)
    notes = []

    def work():
        with StopSignals() as stop:
            notes.append((stop.note, stop.requested, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((note, requested, untouched),) = notes
    assert "main thread" in note and not requested and untouched


def test_a_closed_terminal_does_not_end_a_training():
    before = signal.getsignal(signal.SIGHUP)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    assert signal.getsignal(signal.SIGHUP) == before


def test_the_handler_calls_nothing_but_the_clock_and_the_exit():
    tree = ast.parse(textwrap.dedent(inspect.getsource(StopSignals._count)))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert calls == {"time.monotonic", "os._exit"}
    assert not any(name in inspect.getsource(signals) for name in ("distributed", "accelerate", "all_reduce"))

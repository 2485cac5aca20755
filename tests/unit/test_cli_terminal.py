"""The escape key, and that what ends a run ends it once. The terminal itself: tests/host/test_cli_terminal.py."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.cli.terminal import Ended, Ending, EscapeKey


@pytest.mark.parametrize(
    ("keys", "to_guest", "commands"),
    [
        (b"hello\r\x03\x1a\x7f", b"hello\r\x03\x1a\x7f", []),
        (b"a\x01xb", b"ab", ["end"]),
        (b"\x01\x01", b"\x01", []),
        (b"\x01\x01x", b"\x01x", []),
        (b"\x01h\x01?x", b"x", ["help", "help"]),
        (b"\x01q", b"", []),
        (b"\x01", b"", []),
    ],
)
def test_escape_key(keys: bytes, to_guest: bytes, commands: list[str]) -> None:
    assert EscapeKey().feed(keys) == (to_guest, commands)


@given(st.lists(st.binary(max_size=6) | st.sampled_from([b"\x01", b"x", b"\x01x", b"\x01\x01", b"h"])))
def test_escape_key_does_not_depend_on_how_keys_arrive(chunks: list[bytes]) -> None:
    key = EscapeKey()
    parts = [key.feed(chunk) for chunk in chunks]
    to_guest, commands = EscapeKey().feed(b"".join(chunks))
    assert b"".join(part for part, _ in parts) == to_guest
    assert [command for _, found in parts for command in found] == commands


@given(st.binary())
def test_every_byte_can_be_sent(data: bytes) -> None:
    assert EscapeKey().feed(data.replace(b"\x01", b"\x01\x01")) == (data, [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_end_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Ending(), pytest.raises(Ended) as ended:
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert ended.value.reason == "interrupted"
    assert signal.getsignal(number) == before
    with Ending():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except Ended:
            os.kill(os.getpid(), number)  # while cleaning up: no effect
            time.sleep(0.01)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Ending():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_ends_the_main_thread_in_its_wait() -> None:
    with Ending() as ending:
        thread = threading.Timer(0.05, ending.end, ["broken-pipe"])
        thread.start()
        started = time.monotonic()
        with pytest.raises(Ended) as ended:
            threading.Event().wait(30)
        thread.join()
    assert ended.value.reason == "broken-pipe"
    assert time.monotonic() - started < 10
    ending.end()  # too late: no effect
    time.sleep(0.01)

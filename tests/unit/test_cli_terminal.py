"""The escape key, and signals. The terminal itself: tests/host/test_cli_terminal.py."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.cli import console, terminal
from pyhv.cli.terminal import CHUNK, MOST_TYPED, Console, EscapeKey, Signals


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


def test_signals_become_bytes() -> None:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCONT]
    before = [signal.getsignal(number) for number in numbers]
    with Signals() as signals:
        assert signals.take() == b""
        for number in numbers:
            os.kill(os.getpid(), number)
            assert select.select([signals.descriptor], [], [], 10)[0]
            assert signals.take() == bytes([number])
    assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(KeyboardInterrupt):  # as before: nothing is swallowed any more
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signals.take() == b""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_more_signals_than_a_pipe_holds_do_not_block() -> None:
    with Signals() as signals:
        for _ in range(70000):
            signal.raise_signal(signal.SIGTERM)
        assert set(signals.take()) == {signal.SIGTERM}


class _Keys(Console):
    """A console whose keys come from the test instead of a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.close()
        self.input, self._keys = os.pipe()
        os.set_blocking(self._keys, False)
        os.set_blocking(self.input, False)

    def paste(self, text: bytes) -> bool:
        return any(self._take_keys(text[at : at + CHUNK]) for at in range(0, len(text), CHUNK))

    def read(self) -> bytes:
        """What the guest gets, until there is no more."""
        got = b""
        while True:
            try:
                got += os.read(self.input, CHUNK)
            except BlockingIOError:
                return got
            self._pass_on()


def test_a_long_paste_waits_for_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is more than a pipe holds, and the escape key behind it is still seen."""
    told: list[str] = []
    monkeypatch.setattr(terminal, "tell", told.append)
    text = bytes(n % 251 + 4 for n in range(300_000))
    with _Keys() as console:
        assert not console.paste(text)
        assert console.paste(b"\x01x")
        assert console.read() == text
        assert not console.paste(b"and on")
        assert console.read() == b"and on"
    assert told == []


def test_what_is_lost_of_a_paste_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(terminal, "tell", told.append)
    text = bytes(n % 251 + 4 for n in range(MOST_TYPED + 300_000))
    with _Keys() as console:
        console.paste(text)
        assert len(told) == 1 and "1 MiB" in told[0]
        got = console.read()
        assert MOST_TYPED <= len(got) < len(text) and text.startswith(got)
        console.paste(b"again")
        assert console.read() == b"again"


class _Client:
    """A VM's process that takes nothing until take()."""

    name = "t"
    unsent = 0
    typed = b""

    def call(self, method: str, params: object) -> dict[str, bool]:
        return {"writer": True}

    def type(self, keys: bytes) -> None:
        self.typed += keys
        self.unsent += len(keys)


def test_a_long_paste_at_a_console_waits_for_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(terminal, "tell", told.append)
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    client = _Client()
    session = console._Session(client, True)  # type: ignore[arg-type]
    text = bytes(n % 251 + 4 for n in range(MOST_TYPED))
    for at in range(0, len(text), CHUNK):
        assert not session._type(text[at : at + CHUNK])
        session._pass_on()
    assert session._type(b"\x01x")  # the escape key is seen behind it
    assert len(client.typed) < len(text) and session._unsent
    while session._unsent:
        client.unsent = 0
        session._pass_on()
    assert client.typed == text and told == []

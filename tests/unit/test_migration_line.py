"""Waiting for a migration at a serial line, which connects nobody."""

from __future__ import annotations

import os
import pty
import select
from collections.abc import Iterator

import pytest

from pyhv.errors import HostError
from pyhv.migration import transport, waits
from pyhv.migration.destination import Destination


@pytest.fixture
def line() -> Iterator[tuple[int, str]]:
    """The far end of a line, and the path of this one."""
    far, near = pty.openpty()
    yield far, os.ttyname(near)
    os.close(far)
    os.close(near)


def test_somebody_is_there_when_a_byte_comes(line: tuple[int, str]) -> None:
    far, path = line
    with transport.Listener(transport.parse(f"tty:{path}")) as listener:
        assert listener.accept(0.05) is None
        assert listener.accept(0) is None  # and again
        os.write(far, b"x")
        channel = listener.accept(5)
        assert channel is not None
        with channel:
            assert os.read(channel.in_fd, 10) == b"x"


def test_nothing_is_said_before_the_source_has(line: tuple[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands on the line before the source opens it would be in front of the first answer."""
    far, path = line
    monkeypatch.setattr(waits, "HELLO", waits.HELLO._replace(least=0.5))
    channel = transport._open_tty(transport.parse(f"tty:{path}"))
    one = Destination(channel)
    with pytest.raises(HostError):
        one.greet()
    one.close()
    assert not select.select([far], [], [], 0)[0]

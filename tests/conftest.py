"""Signals as they are for a terminal's foreground, whoever starts the tests: a script's background job is started with
SIGINT and SIGQUIT ignored, and nohup with SIGHUP, and so would be all that the tests start.
"""

from __future__ import annotations

import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:
            # A handler is not inherited by other programs, and this one goes on when the terminal is closed.
            signal.signal(number, lambda number, frame: None)

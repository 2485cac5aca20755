"""What a command says to a person, on stderr."""

from __future__ import annotations

import os

from pyhv.arguments import as_options


def complain(text: str, *more: str) -> None:
    """Prints a line on stderr, and below it a line for each of `more`, whatever the texts contain; quietly not, where
    stderr is closed."""
    lines = [f"pyhv: {one_line(as_options(text))}\n", *(f"  {one_line(as_options(line))}\n" for line in more)]
    try:
        os.write(2, "".join(lines).encode())
    except OSError:
        pass


def one_line(text: str) -> str:
    """The text with what would break a line, or drive a terminal, made visible: file names may contain anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def die_of_broken_pipe() -> int:
    """Ends the process as SIGPIPE would have, had Python not turned it off: whoever was to read our output is gone.

    Returns a status only where the signal is blocked.
    """
    import signal

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    return 128 + signal.SIGPIPE

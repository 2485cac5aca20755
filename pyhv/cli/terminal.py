"""The user's end of the guest's console: the terminal in raw mode with an escape key, and every way to end a run.

Where stdin is no terminal it is handed to the guest as it is, and Ctrl-C ends the run as it ends any program.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import threading
from types import FrameType, TracebackType
from typing import Any

ESCAPE = 0x01  # Ctrl-A, as QEMU has it
_INTERRUPT = 0x03  # Ctrl-C
HELP = "Ctrl-A x: end the VM    Ctrl-A Ctrl-A: send Ctrl-A to the guest    Ctrl-A h: this help"
_INTERRUPT_HINT = "Ctrl-C went to the guest; Ctrl-A x ends the VM"

# What ends a run from outside. SIGKILL and SIGSTOP cannot be caught.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# Brings the main thread out of its wait; the kick of the vCPUs is SIGRTMIN (csrc/kvm/vcpu.c).
_WAKE = signal.SIGRTMIN + 1

_CHUNK = 4096


class Ended(KeyboardInterrupt):
    """Raised in the main thread where the run is to end: a signal, the escape key ("interrupted") or nobody there who
    reads the output ("broken-pipe"). It may come between any two instructions, as KeyboardInterrupt may."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Ending:
    """A context in whose body SIGINT, SIGTERM, SIGHUP, SIGQUIT and end() raise Ended, once, in the main thread.

    Signals that are ignored when it is entered (nohup) stay ignored.
    """

    def __init__(self) -> None:
        self._reason = "interrupted"
        self._armed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Ending:
        self._armed = True
        signal.signal(_WAKE, self._handle)
        for number in _ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._armed = False
        # _WAKE keeps its handler: a late one would kill the process otherwise.
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end(self, reason: str = "interrupted") -> None:
        """Raises Ended in the main thread. Any thread."""
        self._reason = reason
        signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Once only: the first one starts the cleaning up, which a second must not disturb.
        if self._armed:
            self._armed = False
            raise Ended(self._reason)


class EscapeKey:
    """Finds Ctrl-A and what follows it among the keys. Knows no terminal."""

    def __init__(self) -> None:
        self._pending = False

    def feed(self, keys: bytes) -> tuple[bytes, list[str]]:
        """What of `keys` goes to the guest, and the commands in it: "end", "help". Other keys after Ctrl-A are
        swallowed with it."""
        to_guest = bytearray()
        commands: list[str] = []
        for key in keys:
            if self._pending:
                self._pending = False
                if key == ESCAPE:
                    to_guest.append(key)
                elif key in b"xX":
                    commands.append("end")
                elif key in b"hH?":
                    commands.append("help")
            elif key == ESCAPE:
                self._pending = True
            else:
                to_guest.append(key)
        return bytes(to_guest), commands


class Console:
    """Descriptors for the guest's serial port, and in the body of its context the terminal behind them.

    ending: how the escape key and a closed stdout end the run. output: where the guest's output goes, a descriptor or
    None if the VM is to capture it.

    `input` is -1 (nothing to read), 0 (stdin is no terminal) or the end of a pipe that the terminal's keys come out of.
    Making one changes nothing yet. The context, in the main thread: needs the VM to be there; switches a terminal on
    stdin to raw mode (output processing stays on, so that a lone newline of the guest starts a line) and starts the
    one thread that reads it; when it is left, or the process exits with it entered, the terminal is as it was.
    """

    def __init__(self, ending: Ending, output: int | None = 1) -> None:
        self.output = output
        self.input = 0
        self._ending = ending
        self._keys = -1  # where the keys go: the other end of the pipe
        self._settings: list[Any] | None = None  # the terminal's, while it is in raw mode
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._hinted = False
        if os.isatty(0):
            self.input = -1
            # A terminal that others use at the moment (a background job) is left alone. Nobody can use the keys of a
            # guest whose output is captured.
            if output is not None and _in_foreground():
                self.input, self._keys = os.pipe()
                # A guest that reads nothing must not keep us from seeing the escape key.
                os.set_blocking(self._keys, False)

    def __enter__(self) -> Console:
        watch_stdout = _is_pipe(1)
        if self._keys < 0 and not watch_stdout:
            return self
        try:
            if self._keys >= 0:
                self._enter_raw_mode()
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._serve, args=(watch_stdout,), name="terminal", daemon=True)
            self._thread.start()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def close(self) -> None:
        """Closes the pipe, if there is one; after the VM."""
        for descriptor in (self._keys, self.input):
            if descriptor > 2:
                os.close(descriptor)
        self._keys = self.input = -1

    # ------------------------------------------------------------------------------------------ raw mode

    def _enter_raw_mode(self) -> None:
        import atexit
        import termios

        self._settings = termios.tcgetattr(0)
        atexit.register(self._restore)  # an Ended that comes while the context is being left
        self._set_raw()
        # Whoever stops a program (kill -STOP, then fg) gives it its terminal back as a shell likes it.
        signal.signal(signal.SIGCONT, lambda number, frame: self._set_raw())

    def _set_raw(self) -> None:
        import termios

        if self._settings is None or not _in_foreground():
            return
        iflag, oflag, cflag, lflag, ispeed, ospeed, control = self._settings
        iflag &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
        )  # fmt: skip
        lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        control = list(control)
        control[termios.VMIN], control[termios.VTIME] = 1, 0
        termios.tcsetattr(0, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, control])

    def _restore(self) -> None:
        """Gives the terminal its settings back; any number of times."""
        import termios

        if self._settings is None:
            return
        # A background process that does this is stopped by SIGTTOU unless it blocks it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        try:
            termios.tcsetattr(0, termios.TCSANOW, self._settings)
        except termios.error:  # the terminal has gone away
            pass
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._settings = None

    def _leave(self) -> None:
        try:
            self._restore()
        finally:
            if self._thread is not None:
                os.eventfd_write(self._wake, 1)
                self._thread.join()
                self._thread = None
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1

    # ----------------------------------------------------------------------------------------- the thread

    def _serve(self, watch_stdout: bool) -> None:
        """Moves keys and watches stdout until it is told to stop."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._keys >= 0:
            poll.register(0, select.POLLIN)
        if watch_stdout:
            poll.register(1, 0)  # errors are always reported: nobody reads the other end any more
        escape = EscapeKey()
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._wake:
                    return
                if descriptor == 1:
                    poll.unregister(descriptor)
                    self._ending.end("broken-pipe")
                elif not self._take_keys(escape):
                    poll.unregister(descriptor)

    def _take_keys(self, escape: EscapeKey) -> bool:
        """Reads what was typed. Returns whether there can be more."""
        try:
            keys = os.read(0, _CHUNK)
        except OSError:  # the terminal has gone away; SIGHUP says the same
            keys = b""
        if not keys:
            return False
        to_guest, commands = escape.feed(keys)
        if to_guest:
            # Once the guest has 64 KiB of keys to read, more are lost, as on a real serial line.
            with contextlib.suppress(OSError):
                os.write(self._keys, to_guest)
        for command in commands:
            if command == "end":
                self._ending.end()
            else:
                _tell(HELP)
        if _INTERRUPT in to_guest and not self._hinted:
            self._hinted = True
            _tell(_INTERRUPT_HINT)
        return True


def _tell(text: str) -> None:
    """Prints a line in the middle of the guest's output."""
    with contextlib.suppress(OSError):
        os.write(2, f"\r\npyhv: {text}\r\n".encode())


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # a terminal, but not the one that controls this process: nobody can send it to the background
        return True


def _is_pipe(descriptor: int) -> bool:
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)

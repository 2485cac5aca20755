"""The user's end of the guest's console: the terminal in raw mode with an escape key, and every way to end a run.

Where stdin is no terminal it is handed to the guest as it is, and Ctrl-C ends the run as it ends any program.

The main thread attends to the user while another runs the machine. Signals reach it as bytes in a pipe and never as
exceptions, which could come between any two instructions: between those of the machine's own threads, and between those
that give the terminal back.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Collection
    from types import FrameType, TracebackType
    from typing import Any, Self

    from pyhv.machine import Machine, RunResult
    from pyhv.vm.vm import Stopped
else:
    # The half of signal that is in C: the other one makes an enumeration of all that is in it, 5 ms at every start.
    import _signal as signal

ESCAPE = 0x01  # Ctrl-A, as QEMU has it
INTERRUPT = 0x03  # Ctrl-C
HELP = "Ctrl-A x: end the VM    Ctrl-A Ctrl-A: send Ctrl-A to the guest    Ctrl-A h: this help"
_INTERRUPT_HINT = "Ctrl-C went to the guest; Ctrl-A x ends the VM"

# What ends a run from outside. SIGKILL cannot be caught.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

CHUNK = 4096

# Keys that are kept for a guest that does not take them yet.
MOST_TYPED = 1 << 20


class Signals:
    """A context in whose body SIGINT, SIGTERM, SIGHUP and SIGQUIT, and SIGCONT, only write their numbers to a pipe.

    Signals that are ignored when it is entered (nohup) stay ignored. For the main thread, which must read the pipe:
    until the body is left these signals end nothing.
    """

    def __init__(self) -> None:
        self._pipe = (-1, -1)
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1

    @property
    def descriptor(self) -> int:
        """The end of the pipe to poll."""
        return self._pipe[0]

    def __enter__(self) -> Signals:
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in (*ENDING, signal.SIGCONT):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, _do_nothing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        for end in self._pipe:
            os.close(end)

    def take(self) -> bytes:
        """The numbers of the signals that came since the last call."""
        try:
            return os.read(self._pipe[0], CHUNK)
        except BlockingIOError:
            return b""


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass


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


class Typed:
    """Keys that wait until somebody takes them. The terminal is read on meanwhile, or the escape key would not be seen
    behind what a guest does not take; what goes beyond MOST_TYPED is lost, and that is said once."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self._told = False

    def add(self, keys: bytes) -> None:
        room = MOST_TYPED - len(self.waiting)
        self.waiting += keys[:room]
        if len(keys) > room and not self._told:
            self._told = True
            tell(f"the guest does not take its input: what goes beyond {MOST_TYPED >> 20} MiB of it is lost")

    def take(self, count: int) -> bytes:
        """The first of them, which wait no longer."""
        taken = bytes(self.waiting[:count])
        self.took(count)
        return taken

    def took(self, count: int) -> None:
        """So many of them wait no longer."""
        del self.waiting[:count]
        if not self.waiting:
            self._told = False


class RawMode:
    """Puts the terminal on stdin into raw mode, but for output processing (a lone newline starts a line), and gives it
    its settings back."""

    def __init__(self) -> None:
        self._settings: list[Any] | None = None  # the terminal's, while it is in raw mode

    def enter(self) -> None:
        import termios

        self._settings = termios.tcgetattr(0)
        self.enter_again()

    def enter_again(self) -> None:
        """Whoever stops a program (kill -STOP, then fg) gives it its terminal back as a shell likes it: makes it raw
        again. Nothing happens outside raw mode."""
        import termios

        if self._settings is None or not in_foreground():
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

    def leave(self) -> None:
        """Gives the terminal its settings back; nothing happens outside raw mode."""
        if self._settings is None:
            return
        import termios

        # A background process that does this is stopped by SIGTTOU unless it blocks it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        try:
            termios.tcsetattr(0, termios.TCSANOW, self._settings)
        except termios.error:
            pass  # the terminal has gone away
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._settings = None


class Console:
    """Descriptors for the guest's serial port, and the terminal behind them. output: where the guest's output goes, a
    descriptor or None if the VM is to capture it.

    `input` is -1 (nothing to read), 0 (stdin is no terminal) or the end of a pipe that the terminal's keys come out of.
    Making one changes nothing yet. Needs close(), or use as a context manager, that ends after the VM.
    """

    def __init__(self, output: int | None = 1) -> None:
        self.output = output
        self.input = 0
        self._keys = -1  # where the keys go: the other end of the pipe
        self._typed = Typed()  # keys for which the pipe has no room yet
        self._raw = RawMode()
        self._escape = EscapeKey()
        self._hinted = False
        self.fail_on: Collection[str] = ()
        """Causes that are failures (Machine.run)."""
        self._signal = int(signal.SIGINT)  # the one that interrupted the run; the escape key counts as Ctrl-C
        self.ended_by = ""
        """What ended the last run of a guest that did not end by itself: a cause."""
        if os.isatty(0):
            self.input = -1
            # A terminal that others use at the moment (a background job) is left alone. Nobody can use the keys of a
            # guest whose output is captured.
            if output is not None and in_foreground():
                self.input, self._keys = os.pipe()
                # A guest that reads nothing must not keep us from seeing the escape key.
                os.set_blocking(self._keys, False)

    def close(self) -> None:
        """Closes the pipe, if there is one."""
        for descriptor in (self._keys, self.input):
            if descriptor > 2:
                os.close(descriptor)
        self._keys = self.input = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, machine: Machine, timeout: float | None, signals: Signals) -> RunResult:
        """Runs the machine until it or the user ends; the machine is paused then.

        A terminal on stdin is in raw mode meanwhile, and has its settings back when this returns or raises. Raises
        BrokenPipeError when nobody reads stdout any more, and what Machine.run raises.
        """
        wait = _Wait(machine, timeout)
        try:
            if self._keys >= 0:
                self._raw.enter()
            self.begin(machine)
            wait.start()
            end = self._attend(wait.done, signals)
        finally:
            self._raw.leave()
        if end != "ended":
            machine.vm.interrupt()
        wait.finish()
        self.end(machine)
        if end == "broken-pipe" or machine.vm.devices.lost_output()[0] == errno.EPIPE:
            raise BrokenPipeError
        self.ended_by = "timeout" if end == "ended" else end
        return self._result(machine, machine.vm.stopped, self.ended_by)

    def _result(self, machine: Machine, stopped: Stopped | None, cause: str) -> RunResult:
        """As Machine.result(). Who is ended by a signal has the status that a shell gives to it."""
        result = machine.result(stopped, cause, self.fail_on)
        return result._replace(status=128 + self._signal) if result.cause == "interrupted" else result

    def begin(self, machine: Machine) -> None:
        """Lets the machine run, unless it came paused from elsewhere; a subclass may do more."""
        if machine.came_paused:
            machine.settle()
        else:
            machine.start()

    def end(self, machine: Machine) -> None:
        """Lets the machine stand for good; a subclass may do more."""
        machine.pause()

    # ------------------------------------------------------------------------------------- the main thread's work

    def _attend(self, done: int, signals: Signals) -> str:
        """Moves keys until descriptor `done` is readable ("ended"), the user ends the run ("interrupted") or stdout has
        lost its reader ("broken-pipe"); says which."""
        poll = select.poll()
        for descriptor in (done, signals.descriptor):
            poll.register(descriptor, select.POLLIN)
        if self._keys >= 0:
            poll.register(0, select.POLLIN)
        if is_pipe(1):
            poll.register(1, 0)  # errors are always reported
        while True:
            if self._keys >= 0:
                poll.register(self._keys, select.POLLOUT if self._typed.waiting else 0)
            ready = {descriptor for descriptor, _ in poll.poll()}
            if done in ready:
                return "ended"
            if 1 in ready:
                return "broken-pipe"
            if signals.descriptor in ready:
                numbers = signals.take()
                if ending := [number for number in numbers if number in ENDING]:
                    self._signal = ending[0]
                    return "interrupted"
                if signal.SIGCONT in numbers:
                    self._raw.enter_again()
            if self._keys in ready:
                self._pass_on()
            if 0 in ready:
                try:
                    keys = os.read(0, CHUNK)
                except OSError:
                    keys = b""
                if not keys:  # the terminal has gone away
                    poll.unregister(0)
                elif self._take_keys(keys):
                    return "interrupted"

    def _take_keys(self, keys: bytes) -> bool:
        """Passes on what was typed. Returns whether the run is to end."""
        to_guest, commands = self._escape.feed(keys)
        if to_guest:
            self._typed.add(to_guest)
            self._pass_on()
        if "help" in commands:
            tell(HELP)
        if INTERRUPT in to_guest and not self._hinted:
            self._hinted = True
            tell(_INTERRUPT_HINT)
        return "end" in commands

    def _pass_on(self) -> None:
        """Gives the guest's end of the pipe as much as it has room for."""
        try:
            while self._typed.waiting:
                self._typed.took(os.write(self._keys, self._typed.waiting))
        except BlockingIOError:
            pass


class _Wait:
    """Waits, on a thread of its own, for the machine's guest to end, or for Vm.interrupt()."""

    def __init__(self, machine: Machine, timeout: float | None) -> None:
        self.done = os.eventfd(0, os.EFD_CLOEXEC)
        """Readable when the guest has ended or the time is over."""
        self._machine = machine
        self._timeout = timeout
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="wait", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Once it is done or interrupted: raises what a vCPU's thread failed with, if one did."""
        self._thread.join()
        os.close(self.done)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._machine.vm.wait(self._timeout)
        except BaseException as failure:
            self._failure = failure
        finally:
            os.eventfd_write(self.done, 1)


def tell(text: str) -> None:
    """Prints a line in the middle of the guest's output."""
    try:
        os.write(2, f"\r\npyhv: {text}\r\n".encode())
    except OSError:
        pass


def in_foreground() -> bool:
    """Whether the terminal on stdin is this process's to use at the moment."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # a terminal, but not the one that controls this process: nobody can send it to the background
        return True


def is_pipe(descriptor: int) -> bool:
    """Whether it may lose its reader."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)

"""A run with a name: the VM has a control socket, and its console can be attached to from elsewhere.

The guest's output does not go to stdout by itself, as that of a run without a name does, but through this process: to
the server of the control socket, which keeps the last of it, and to stdout, unless the VM is in the background.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from pyhv.accel.data import Stop
from pyhv.cli import ending, guard, output
from pyhv.cli.say import complain
from pyhv.cli.terminal import CHUNK, ENDING, Console, Signals
from pyhv.control import names
from pyhv.control.operations import Operations
from pyhv.control.server import Server
from pyhv.errors import BadInput, HostError, PyhvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.machine import Machine, RunResult

# What is left of the output of a guest that was interrupted may take so long to be written; in milliseconds.
_IMPATIENCE = 200


def run(given: SimpleNamespace, make: Callable[..., Machine]) -> int:
    """Runs a machine under the name given.name, with given.detach, json and timeout. make: gets console_in and
    console_out. Returns the exit status; raises what making and running the machine raise."""
    if given.name is None:
        raise BadInput("--detach", "needs --name", "nobody could find the VM otherwise")
    names.check_name(given.name)
    if given.detach:
        return detach(lambda leave: run_as(given.name, given, make, leave), f"the VM {given.name}", given.json)
    return run_as(given.name, given, make)


def detach(
    start: Callable[[Callable[[str], None]], int],
    what: str,
    as_json: bool,
    keep: Sequence[int] = (),
    tell: bool = True,
) -> int:
    """Runs a machine in a process of its own, and returns once it runs; what goes wrong before that ends both processes
    as it would have ended one.

    start: runs the machine there and returns the exit status; it calls what it is given, with the VM's name, when the
    VM runs. what: what errors call that process. as_json: whether its errors, and what is told here, are JSON. keep:
    descriptors that it needs. tell: print a line about the VM, or its object.
    """
    ready, tell_ready = os.pipe()
    sys.stdout.flush()
    # Nothing has started a thread yet: the child is as good as its parent.
    child = os.fork()
    if child == 0:
        os._exit(guard(lambda: _in_background(start, keep, tell_ready), lambda: as_json))
    os.close(tell_ready)
    with open(ready, "rb", buffering=0) as pipe:
        name = pipe.read().decode()
    if name:
        if tell and as_json:
            output.print_json({"name": name, "pid": child})
        elif tell:
            print(f"{name} runs in the background, pid {child}")
        return 0
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        raise HostError(what, 0, f"its process was killed by signal {-status}")
    return status


def take_along(start: Callable[[Callable[[str], None]], int], keep: Sequence[int]) -> int:
    """As detach(), in a process that was forked for it already: nobody waits for the VM. Returns the exit status."""

    def run(leave: Callable[[str], None]) -> int:
        def tell(name: str) -> None:
            print(f"{name} runs in the background, pid {os.getpid()}")
            leave(name)

        return start(tell)

    nobody = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    return guard(lambda: _in_background(run, keep, nobody), lambda: False)


def _in_background(start: Callable[[Callable[[str], None]], int], keep: Sequence[int], tell_ready: int) -> int:
    # Whoever waits for the end of a pipe that we inherited shall not wait for the VM's.
    begin = 3
    for kept in sorted([*keep, tell_ready]):
        os.closerange(begin, kept)
        begin = kept + 1
    os.closerange(begin, os.sysconf("SC_OPEN_MAX"))
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, 0)

    def leave(name: str) -> None:
        # Until here Ctrl-C ends the start as it ends that of any run. A session of its own has no terminal.
        os.setsid()
        os.chdir("/")  # no file system is kept busy
        sys.stdout.flush()
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        os.write(tell_ready, name.encode())  # BrokenPipeError: who wanted it is gone, and so are we
        os.close(tell_ready)

    return start(leave)


def run_as(
    name: str,
    given: SimpleNamespace,
    make: Callable[..., Machine],
    on_started: Callable[[str], None] = lambda name: None,
    predecessor: int = 0,
) -> int:
    """Runs a machine under a name, with given.detach (whether it is in the background), timeout and json.

    make: gets console_in and console_out. on_started: is called with the name when the VM runs. predecessor: the
    process that has the name until then. Returns the exit status; raises what making and running the machine raise.
    """
    # Such a process may live for weeks.
    gc.enable()
    captures = given.json and not given.detach
    reboots = getattr(given, "reboot", False)  # pyhv run alone has the option
    deadline = None if given.timeout is None else time.monotonic() + given.timeout
    with (
        names.claim(name, predecessor) as claim,
        _NamedConsole(captures, given.detach, reboots) as console,
        Server(claim) as server,
        Operations(name) as operations,
    ):
        console.operations = operations
        console.fail_on = given.fail_on
        while True:
            with make(console_in=console.input, console_out=console.output) as machine:
                machine.pin(given.pin)
                if predecessor:
                    # Before the source hears that it is rid of the VM: at every moment one of the two has the name.
                    machine.on_arrival = functools.partial(_take, claim, predecessor)

                def begin(machine: Machine = machine) -> None:
                    if operations.control(machine):
                        for note in machine.notes if not given.quiet else ():
                            complain(note)
                        server.start(operations, console.take_copy(), console.keys)
                        on_started(name)

                console.on_begin = begin
                try:
                    with Signals() as signals:
                        left = None if deadline is None else max(0.0, deadline - time.monotonic())
                        result = console.run(machine, left, signals)
                        if operations.held:
                            complain(ending.REBOOTS)
                            continue
                        operations.ended(result)
                        console.drain(signals, patient=machine.vm.stopped is not None)
                except Exception as error:
                    if operations.controls:
                        operations.close(give_up=True)
                        operations.failed(error)
                        server.finish(operations.record())
                    raise
                server.finish(operations.record())
                if captures:
                    result = result._replace(console=console.captured())
                description = ending.describe(machine, result) if captures else {}
                break
    ending.tell(result)
    if captures:
        output.print_json(description)
    return result.status


def _take(claim: names.Claim, predecessor: int) -> None:
    """Takes the name over. The VM runs already: whatever is wrong with its name, it runs on."""
    try:
        claim.take(predecessor)
    except PyhvError as error:
        complain(f"{error}; the VM runs on without a name")


class _NamedConsole(Console):
    """A console whose bytes pass through this process.

    capture: keep the output instead of writing it to stdout. background: there is no stdin and no stdout. reboots: a
    machine that has reset itself is followed by another one.
    """

    def __init__(self, capture: bool, background: bool, reboots: bool) -> None:
        super().__init__(None if capture else 1)
        self._reboots = reboots
        self._began = False
        self.on_begin: Callable[[], None] = lambda: None
        """Called when the machine runs."""
        self.operations: Operations | None = None
        self.keys = self._keys
        """Where input for the guest goes; does not block."""
        self._stdin = _Stdin() if self.input == 0 and not background else None
        if self.keys < 0:
            self.input, self.keys = os.pipe()
            os.set_blocking(self.keys, False)
        copy, self.output = os.pipe()
        self._sink = os.memfd_create("pyhv-console", os.MFD_CLOEXEC) if capture else 1
        self._tee = None if background else _Tee(copy, self._sink)
        self._copy = copy if self._tee is None else self._tee.copy

    def take_copy(self) -> int:
        """A descriptor to read what the guest prints from; the caller's, who must read it to its end or close it."""
        copy, self._copy = self._copy, -1
        return copy

    def begin(self, machine: Machine) -> None:
        """Lets the machine run, and its input flow."""
        super().begin(machine)
        if not self._began:
            if self._tee is not None:
                self._tee.start()
            if self._stdin is not None:
                self._stdin.start(self.keys)
            self._began = True
        self.on_begin()

    def end(self, machine: Machine) -> None:
        """Lets the machine stand for good; nobody controls it any more."""
        assert self.operations is not None
        stopped = machine.vm.stopped
        if self._reboots and stopped is not None and stopped.exit.stop == Stop.RESET and not self.operations.ending:
            self.operations.hold()
        if not self.operations.held or self.operations.ending:
            # A guest that ended by itself may be half-way into a file, which is complete then. Who ends it does not
            # wait.
            self.operations.close(give_up=stopped is None)
        super().end(machine)

    def run(self, machine: Machine, timeout: float | None, signals: Signals) -> RunResult:
        """As Console.run, and the control socket may end it."""
        result = super().run(machine, timeout, signals)
        assert self.operations is not None
        ending = self.operations.ending
        if result.cause == "timeout" and self.operations.failure is not None:
            raise self.operations.failure
        if self._reboots and result.cause == "reset" and not self.operations.held:
            # It has reset itself in the moment in which it was ended: that is not why it is not started again.
            return self._result(machine, None, ending or self.ended_by)
        # Who interrupts a VM that is just leaving does not end it: it runs on elsewhere.
        if ending == "migrated" or (ending and result.cause == "timeout"):
            return self._result(machine, None, ending)
        return result

    def drain(self, signals: Signals, patient: bool) -> None:
        """Once the guest has ended: waits until all that it printed is written to stdout, at most until a signal comes,
        and not long if it was ended; then it says how much is lost. Then the copy has come to its end too. Raises
        HostError, or BrokenPipeError, where stdout did not take all."""
        assert self.output is not None
        self._close_output()
        if self._tee is None:
            return
        poll = select.poll()
        poll.register(self._tee.done, select.POLLIN)
        poll.register(signals.descriptor, select.POLLIN)
        while self._tee.done not in dict(poll.poll(None if patient else _IMPATIENCE)):
            if not patient or any(number in ENDING for number in signals.take()):
                if left := self._tee.left():
                    complain(f"console: stdout takes no more: up to {left} bytes of the guest's output are lost")
                return
        if isinstance(self._tee.failure, BrokenPipeError):
            raise self._tee.failure
        if self._tee.failure is not None:
            lost = f"{self._tee.lost} bytes of the guest's output are lost"
            raise HostError("console", self._tee.failure.errno or 0, lost)

    def captured(self) -> bytes:
        """What the guest printed, where it was captured."""
        return os.pread(self._sink, os.fstat(self._sink).st_size, 0)

    def close(self) -> None:
        """After the VM: closes everything."""
        if self.output is None:
            return
        self._close_output()
        os.close(self.output)
        self.output = None
        if self._stdin is not None:
            self._stdin.stop()
        if self._copy >= 0:
            os.close(self._copy)
        if self._tee is not None:
            self._tee.stop()
        if self._sink > 2:
            os.close(self._sink)
        if self.keys != self._keys:
            os.close(self.keys)
        super().close()

    def _close_output(self) -> None:
        # The VM still has the number: it must not become another file's.
        assert self.output is not None
        nothing = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nothing, self.output, inheritable=False)
        os.close(nothing)


class _Tee:
    """A thread that writes what comes out of a pipe to a descriptor, and to a second pipe.

    Where the descriptor takes no more, a terminal that was stopped, say, it waits, and so does then the guest: as if it
    wrote there by itself. An error of the descriptor ends only what goes there.
    """

    def __init__(self, source: int, sink: int) -> None:
        self.done = os.eventfd(0, os.EFD_CLOEXEC)
        """Readable when the source has come to its end and all is written."""
        self.failure: OSError | None = None
        """What writing to the descriptor failed with."""
        self.lost = 0
        """Bytes that did not get there."""
        self._source = source
        self._sink = sink
        self._writing = 0
        self.copy, self._copy_end = os.pipe()
        self._thread = threading.Thread(target=self._run, name="console-tee", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After the source has come to its end, if the thread was started at all. Does not wait for a descriptor that
        takes no more."""
        if self._thread.ident is None:
            os.close(self._source)
            os.close(self._copy_end)
        else:
            self._thread.join(0.05)
            if self._thread.is_alive():
                return  # it still uses them; the process is about to end
        os.close(self.done)

    def left(self) -> int:
        """How many bytes have come, at most, that are not written yet."""
        import fcntl
        import termios

        waiting = bytes(4)
        with contextlib.suppress(OSError):  # it has just come to its end
            waiting = fcntl.ioctl(self._source, termios.FIONREAD, waiting)
        return self._writing + int.from_bytes(waiting, "little")

    def _run(self) -> None:
        copies = True
        while data := os.read(self._source, CHUNK):
            self._writing = len(data)
            if copies:
                try:
                    _write(self._copy_end, data)
                except OSError:
                    copies = False
            if self.failure is None:
                try:
                    _write(self._sink, data)
                    self._writing = 0
                    continue
                except OSError as error:
                    self.failure = error
            self.lost += len(data)
            self._writing = 0
        os.close(self._copy_end)
        os.close(self._source)
        os.eventfd_write(self.done, 1)


class _Stdin:
    """A thread that copies stdin, which is no terminal, to the guest, for which others may have input too."""

    def __init__(self) -> None:
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None

    def start(self, keys: int) -> None:
        self._thread = threading.Thread(target=self._run, args=(keys,), name="console-stdin", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        os.eventfd_write(self._stop, 1)
        if self._thread is not None:
            self._thread.join()
        os.close(self._stop)

    def _run(self, keys: int) -> None:
        waiting = b""
        while True:
            # Nothing is read before there is room for it: nothing is lost.
            poll = select.poll()
            poll.register(self._stop, select.POLLIN)
            poll.register(keys if waiting else 0, select.POLLOUT if waiting else select.POLLIN)
            if self._stop in dict(poll.poll()):
                return
            try:
                if waiting:
                    waiting = waiting[os.write(keys, waiting) :]
                else:
                    waiting = os.read(0, CHUNK)
                    if not waiting:
                        return
            except BlockingIOError:
                pass
            except OSError:
                return


def _write(descriptor: int, data: bytes) -> None:
    """Writes all of it, however long that takes. Raises OSError."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # somebody has made it so
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()

"""Two processes that migrate a ticker from one to the other, with a proxy in between that knows the protocol.

Both sides are forked from the test, and write to one console. A ticker prints its rounds one after the other, so what
stands on that console says whether exactly one copy ran: a second one would repeat rounds, a lost one leave some out.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyhv
from pyhv.accel import choose
from pyhv.migration import protocol, source, waits
from pyhv.migration.destination import Destination
from pyhv.migration.protocol import Answer, Synced, Type
from pyhv.migration.source import Limits
from pyhv.migration.transport import Channel

from .frames import Frame, Speaker, Splitter, content_of

PAGES = 64
APPEND = f"pages={PAGES} every=1"
MEMORY = "3M"

# What makes waiting cheap, and one round of pre-copy, which always suffices. A processor that is taken away for so long
# would be taken for a broken link.
HEARTBEAT, SILENCE, PATIENCE = 0.1, 0.6, 3
LIMITS = Limits(heartbeat=HEARTBEAT, silence=SILENCE, downtime=SILENCE * PATIENCE, rounds=1, overrun=1.0)



def waits_of_tests() -> None:
    """Makes every wait as short as these limits; for good."""
    for name, wait in vars(waits).items():
        if isinstance(wait, waits.Wait):
            setattr(waits, name, wait._replace(least=min(wait.least, SILENCE * PATIENCE), silences=PATIENCE))
    waits.SLOWEST = 100e6


TIMEOUT = 30.0  # everything here takes a second or so

Report = dict[str, Any]


def stamp(machine: pyhv.Machine, page: int = PAGES - 1, pages_before: int = 0x200) -> int:
    """The round that the ticker has stamped a page with (guest_images/ticker.c)."""
    address = (pages_before + page) * 4096 + 8 * ((pages_before + page) % 16)
    return int(struct.unpack("<Q", machine.vm.memory.read(address, 8))[0]) >> 32


def wait_for_rounds(machine: pyhv.Machine, count: int = 2) -> None:
    """Until the guest has done so many rounds more."""
    begin, deadline = stamp(machine), time.monotonic() + TIMEOUT
    while stamp(machine) < begin + count:
        assert machine.vm.stopped is None, machine.console()
        assert time.monotonic() < deadline, "the guest does not count"
        time.sleep(0.001)


def check_console(console: bytes) -> int:
    """How many rounds stand there, one after the other, and nothing else."""
    numbers = []
    for line in console.decode("ascii").split("\n")[:-1]:
        word, _, number = line.partition("round ")
        if "pages from" in line:
            continue
        assert word == "ticker: " and number.isdigit(), f"more than one copy ran, or a broken one: {line}"
        numbers.append(int(number))
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), f"more than one copy, or none, ran: {numbers}"
    return len(numbers)


def greet(speaker: Speaker) -> None:
    """Begins as a destination that takes the guest."""
    assert speaker.hear().kind == Type.HELLO
    speaker.say(*protocol.encode(Answer((), False)))


def take_all(speaker: Speaker) -> None:
    """Goes on as one, to the end of what the source has to send."""
    while (kind := speaker.hear().kind) != Type.END:
        if kind == Type.SYNC:
            speaker.say(*protocol.encode(Synced()))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Side:
    """A process of its own that runs `body(side)`, and talks to the test: report() there, read() here, tell() here."""

    def __init__(self, body: Callable[[Side], None], close: list[int]) -> None:
        """close: what the process must not keep open."""
        reader, writer = os.pipe()
        orders, self._orders = os.pipe()
        self._buffer = b""
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                for fd in [reader, self._orders, *close]:
                    os.close(fd)
                self._reports, self._orders = writer, orders
                # KVM's VMs are those of the process that made them.
                vars(choose.open_accelerator()).get("_spares", []).clear()
                body(self)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writer)
        os.close(orders)
        self.reports = reader
        self.said: list[Report] = []

    # in the process

    def report(self, what: str, **facts: object) -> None:
        os.write(self._reports, json.dumps({"what": what, **facts}).encode() + b"\n")

    def orders(self) -> Iterator[str]:
        """What the test tells; each is answered by a report."""
        while line := os.read(self._orders, 64):
            yield from line.decode().split()

    # in the test

    def read(self, timeout: float = TIMEOUT) -> Report | None:
        """The next report; None when the process has ended. Fails when none comes."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            assert select.select([self.reports], [], [], max(deadline - time.monotonic(), 0))[0], "it says nothing"
            data = os.read(self.reports, 65536)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        report: Report = json.loads(line)
        self.said.append(report)
        return report

    def tell(self, order: str) -> Report:
        os.write(self._orders, order.encode() + b"\n")
        found = self.read()
        assert found is not None, f"{order}: the process has ended"
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        """Ends the process, as it likes; its exit status."""
        if self._orders >= 0:
            os.close(self._orders)
            os.close(self.reports)
            self._orders = -1
            deadline = time.monotonic() + TIMEOUT
            done = 0
            while not done and time.monotonic() < deadline:
                done, status = os.waitpid(self.pid, os.WNOHANG)
                time.sleep(0 if done else 0.001)
            if not done:
                self.kill()
                _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        return self.status


class Wishes(NamedTuple):
    """How the two sides are to be."""

    limits: Limits = LIMITS
    source_gives_up: bool = False
    """The source says cancel while its guest stands."""
    destination_gives_up: bool = False
    machine: dict[str, Any] = {"append": APPEND, "memory": MEMORY}  # noqa: RUF012
    second_copy: bool = False
    """The source lets its guest run on, whatever became of it."""


def run_source(side: Side, sock: socket.socket, console: int, wishes: Wishes) -> None:
    """The process that has the guest and gives it away."""
    waits_of_tests()
    with pyhv.Machine("ticker", console_out=console, **wishes.machine) as machine:
        machine.start()
        wait_for_rounds(machine)
        before = descriptors() - 1  # the socket
        side.report("ready")

        def progress(progress: source.Progress) -> None:
            if progress.round:
                wait_for_rounds(machine, 1)  # so that there are pages left to send
            if wishes.source_gives_up and progress.round == 0:
                raise pyhv.BadInput("the test", "gives up here")

        for order in side.orders():
            if order == "go":
                try:
                    with Channel(sock.fileno(), sock.fileno(), "the other side", sock.close) as channel:
                        machine.depart(channel, limits=wishes.limits, progress=progress)
                    outcome, text = "migrated", ""
                except pyhv.PyhvError as error:
                    outcome, text = type(error).__name__, str(error)
                at = time.monotonic()
                side.report(outcome, text=text, runs=machine.vm.running, leaked=descriptors() - before, at=at)
                if wishes.second_copy:
                    machine.start(force=True)
                    wait_for_rounds(machine)
                    machine.pause()
            else:
                _obey(side, machine, order)


def run_destination(side: Side, sock: socket.socket, console: int, wishes: Wishes) -> None:
    """The process that takes the guest."""
    waits_of_tests()
    choose.open_accelerator()  # is kept open
    before = descriptors() - 1

    def while_waiting() -> None:
        if wishes.destination_gives_up:
            raise pyhv.BadInput("the test", "gives up there")

    try:
        channel = Channel(sock.fileno(), sock.fileno(), "the other side", sock.close)
        machine = pyhv.Machine.arrive(Destination(channel), console_out=console, while_waiting=while_waiting)
    except pyhv.PyhvError as error:
        side.report(type(error).__name__, text=str(error), runs=False, leaked=descriptors() - before)
        for _ in side.orders():
            raise AssertionError("it has no guest") from None
        return
    with machine:
        machine.start()
        side.report("arrived", text="", runs=machine.vm.running, leaked=0)
        for order in side.orders():
            _obey(side, machine, order)


def _obey(side: Side, machine: pyhv.Machine, order: str) -> None:
    if order == "force":
        machine.start(force=True)
    if order in ("force", "count"):
        wait_for_rounds(machine)
    side.report("done", runs=machine.vm.running)


# ------------------------------------------------------------------------------------------------------- the proxy

CUTS = ("cut before", "cut within", "cut after")
CHANGES = ("drop", "repeat", "alter")
KILLS = ("kill source before", "kill source after", "kill destination before", "kill destination after")
FAULTS = (*CUTS, *CHANGES, "stall", *KILLS)


class Fault(NamedTuple):
    """What happens at which message."""

    sender: str
    """ "source" or "destination"."""
    kind: Type
    what: str
    number: int = 1
    """The how manieth of its kind."""


class Hold(NamedTuple):
    """A message that is held back until the other side has said something."""

    sender: str
    kind: Type
    until: Type


class _Direction:
    def __init__(self, sender: str, into: socket.socket, out: socket.socket) -> None:
        self.sender = sender
        self.into = into
        self.out = out
        self.split = Splitter()
        self.waiting: list[Frame] = []
        self.outgoing = b""
        self.bad = False  # what comes now is not taken for good
        self.ended = False


class Proxy:
    """Stands between the two sides; passes on what they say, until the fault."""

    def __init__(self, ends: dict[str, socket.socket], sides: dict[str, Side], fault: Fault | None, hold: Hold | None):
        self._sides = sides
        self._ends = ends
        self._fault = fault
        self._hold = hold
        self._held = False
        self._stalled = False
        self._count = 0
        self.fired = False
        self.seen: list[tuple[str, int]] = []
        self.delivered: set[tuple[str, int]] = set()
        """What arrived as it was sent."""
        self.killed = ""
        self.stopped_at = 0.0
        self.bytes: dict[str, bytes] = {"source": b"", "destination": b""}
        self._directions = {
            "source": _Direction("source", ends["source"], ends["destination"]),
            "destination": _Direction("destination", ends["destination"], ends["source"]),
        }
        for end in ends.values():
            end.setblocking(False)

    def run(self, done: Callable[[], bool]) -> None:
        """Until both ends are closed or done() says that it is over."""
        deadline = time.monotonic() + TIMEOUT
        while not done():
            assert time.monotonic() < deadline, "it does not come to its end"
            poll = select.poll()
            for direction in self._directions.values():
                if direction.into.fileno() >= 0 and not direction.ended and not self._stalled:
                    poll.register(direction.into, select.POLLIN)
            for side in self._sides.values():
                poll.register(side.reports, select.POLLIN)
            poll.poll(5)
            for direction in self._directions.values():
                self._read(direction)
                for frame in self._due(direction):
                    self._pass(direction, frame)
                self._write(direction)
                if direction.ended and not direction.waiting and not direction.outgoing:
                    self._hang_up(direction)

    def _read(self, direction: _Direction) -> None:
        if direction.into.fileno() < 0 or direction.ended or self._stalled:
            return
        try:
            data = direction.into.recv(1 << 20)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        direction.ended = not data
        self.bytes[direction.sender] += data
        direction.waiting += direction.split(data)

    def _due(self, direction: _Direction) -> Iterator[Frame]:
        hold = self._hold
        while direction.waiting and not self._stalled:
            first = direction.waiting[0]
            if hold and hold.sender == direction.sender and first.kind == hold.kind:
                self._held = True
                return
            yield direction.waiting.pop(0)

    def _pass(self, direction: _Direction, frame: Frame) -> None:
        fault, me = self._fault, (direction.sender, frame.kind)
        self.seen.append(me)
        hit = False
        if fault and not self.fired and me == (fault.sender, fault.kind):
            # A heartbeat that comes by chance, before the one that is waited for, is not the one.
            self._count += self._held or not self._hold
            hit = self._count == fault.number
        if self._hold and self._held and me[0] != self._hold.sender and frame.kind == self._hold.until:
            self._hold = None
        if not hit or fault is None:
            self._deliver(direction, frame)
            return
        self.fired = True
        match fault.what.split():
            case ["cut", "before"]:
                self._cut()
            case ["cut", "within"]:
                direction.outgoing += frame.raw[: len(frame.raw) // 2]
                self._write(direction)
                self._cut()
            case ["cut", "after"]:
                self._deliver(direction, frame)
                self._cut()
            case ["drop"]:
                direction.bad = True
            case ["repeat"]:
                self._deliver(direction, frame)
                direction.outgoing += frame.raw
                direction.bad = True
            case ["alter"]:
                # Not content, which may come again (test_migration_lies.py changes that).
                middle = (len(frame.raw) - content_of(frame.kind, frame.payload)) // 2
                changed = bytes([frame.raw[middle] ^ 0x10])
                direction.outgoing += frame.raw[:middle] + changed + frame.raw[middle + 1 :]
                direction.bad = True
            case ["stall"]:
                self._stalled = True
            case ["stop", who]:
                self._sides[who].kill(signal.SIGSTOP)
                self.stopped_at = time.monotonic()
                self._deliver(direction, frame)
            case ["kill", who, "before"]:
                self._kill(who)
                self._cut()
            case ["kill", who, "after"]:
                self._deliver(direction, frame)
                self._kill(who)
            case _:
                raise AssertionError(fault.what)

    def _deliver(self, direction: _Direction, frame: Frame) -> None:
        direction.outgoing += frame.raw
        self._write(direction)
        if not direction.bad:
            self.delivered.add((direction.sender, frame.kind))

    def _write(self, direction: _Direction) -> None:
        while direction.outgoing and direction.out.fileno() >= 0 and not self._stalled:
            try:
                sent = direction.out.send(direction.outgoing)
            except BlockingIOError:
                return
            except ConnectionError:  # nobody is there any more
                direction.outgoing = b""
                direction.bad = True
                return
            direction.outgoing = direction.outgoing[sent:]

    def _kill(self, who: str) -> None:
        self.killed = who
        self._sides[who].kill()
        while os.waitid(os.P_PID, self._sides[who].pid, os.WEXITED | os.WNOWAIT) is None:
            pass

    def _hang_up(self, direction: _Direction) -> None:
        """The sender has closed its end: so do we. Its other direction has nowhere to go to any more."""
        if direction.out.fileno() >= 0:
            with contextlib.suppress(OSError):
                direction.out.shutdown(socket.SHUT_WR)

    def _cut(self) -> None:
        self._stalled = True
        for end in self._ends.values():
            end.close()

    def close(self) -> None:
        for end in self._ends.values():
            end.close()


class Migration:
    """One migration with one fault, or none. A context manager: in the end no process and no descriptor is left."""

    def __init__(self, wishes: Wishes = Wishes(), fault: Fault | None = None, hold: Hold | None = None) -> None:  # noqa: B008
        self._before = descriptors()
        self._console = os.memfd_create("console")
        here, there = {}, {}
        for name in ("source", "destination"):
            here[name], there[name] = socket.socketpair()
        everything = [sock.fileno() for sock in (*here.values(), *there.values())]
        self.sides: dict[str, Side] = {}
        bodies = {"source": run_source, "destination": run_destination}
        for name, body in bodies.items():
            sock = there[name]
            close = [fd for fd in everything if fd != sock.fileno()]
            close += [fd for side in self.sides.values() for fd in (side.reports, side._orders)]
            self.sides[name] = Side(
                lambda side, body=body, sock=sock: body(side, sock, self._console, wishes), close  # type: ignore[misc]
            )
        for sock in there.values():
            sock.close()
        self.source, self.destination = self.sides["source"], self.sides["destination"]
        self.proxy = Proxy(here, self.sides, fault, hold)
        self.outcome: dict[str, Report | None] = {}

    def run(self, names: tuple[str, ...] = ("source", "destination")) -> None:
        """Until these sides have said how it went for them, or are dead."""
        if not self.source.said:
            assert self.source.read() == {"what": "ready"}
            os.write(self.source._orders, b"go\n")

        def done() -> bool:
            for name, side in self.sides.items():
                if name not in self.outcome and select.select([side.reports], [], [], 0)[0]:
                    self.outcome[name] = side.read()
            return all(name in self.outcome for name in names)

        self.proxy.run(done)

    def console(self) -> bytes:
        return os.pread(self._console, os.fstat(self._console).st_size, 0)

    def __enter__(self) -> Migration:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        statuses = {}
        for name, side in self.sides.items():
            with contextlib.suppress(ProcessLookupError):
                side.kill(signal.SIGCONT)
            statuses[name] = side.end()
        self.proxy.close()
        os.close(self._console)
        if kind is None:
            for name, status in statuses.items():
                assert status == (-signal.SIGKILL if name == self.proxy.killed else 0), statuses
            assert descriptors() == self._before


def occurrences(kind: protocol.Kind) -> range:
    """Of what comes more than once also the second: pages, while the guest stands."""
    return range(1, 3 if kind.number in (Type.PAGES, Type.PAGES_ZSTD) else 2)

"""A ring of processes that hand one guest on and on, and check each time that nothing was lost.

The guest is `ticker` (guest_images/ticker.c), which checks itself: every page of its memory, what CPUID says, that the
TSC does not go back. It prints a line a round; all nodes' consoles are one pipe, so that what comes out of it says
whether exactly one copy was alive all the time: a second one, or one that fell back, would repeat rounds, and a lost
one would leave some out.

Nodes are forked from the driver and talk to it by one line of JSON an event over a pipe each.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from pyhv.accel import choose
from pyhv.cpu import features, msrs
from pyhv.errors import BadInput, HostError, PyhvError
from pyhv.machine import Machine
from pyhv.migration import transport
from pyhv.migration.destination import Destination
from pyhv.migration.source import Limits, Progress

# Where ticker's stamped pages begin, and the distance of their stamps within a block of 16 (guest_images/ticker.c).
_FIRST_BYTE, _PAGE, _BLOCK = 0x200000, 4096, 16

# What stands in front of the number in its line.
_LINE = "ticker: round "

# What a hop may take before the ring is taken for stuck; in seconds.
HOP_LIMIT = 60.0

# So long the two sides of a hop may hear nothing of each other, in seconds: on a busy host a node waits for a
# processor.
_SILENCE = 10.0

# When one node has failed, the other side of the hop may know more about it, and says so within so many seconds.
_SECOND_OPINION = 1.0

# A node tells what it uses every so many of its departures; the first are for warming up.
_CENSUS, _WARM_UP = 50, 100

# Each is a process that has all the others' sockets for a moment.
_MOST_NODES = 64

# Of hops and of pages: more than anybody can wait for.
_MOST = 10**12

# Growth that is no leak: the allocator's; in bytes.
_SLACK = 8 << 20

FAULTS = ("stale-page", "dropped-page", "cpuid-bit", "tsc-back", "second-copy")


class Plan(NamedTuple):
    """What a ring does."""

    hops: int
    nodes: int = 4
    pages: int = 1024
    """Pages that the guest stamps in each round: 4 MiB."""
    compat: bool = True
    downtime: float = 0.05
    fault: str = ""
    """One of FAULTS, brought about on purpose in the middle, to see that it is noticed."""
    start: str = ""
    """A snapshot of the guest to go on with."""
    save: str = ""
    """Where to save the guest at the end; "" for nowhere."""
    accel: str = "auto"
    """What runs it on every node."""


class Hop(NamedTuple):
    """One migration, as the source reports it."""

    number: int
    node: int
    total_time: float
    downtime: float
    dirty_rounds: int
    """Rounds of pre-copy, after the first, that had pages to send: the guest had written them meanwhile."""
    guest_rounds: int
    """Complete rounds over all its pages that the guest began and ended on the node."""


class Failure(PyhvError):
    """A check that failed; the text says which, on which hop."""


class Ring:
    """The driver. A context manager, which begins with its nodes; close() ends every one, whatever it does.

    Raises BadInput for a plan that cannot be, HostError.
    """

    def __init__(self, plan: Plan, directory: str) -> None:
        """directory: for the nodes' sockets; the caller's to remove."""
        if not 2 <= plan.nodes <= _MOST_NODES:
            raise BadInput(f"{plan.nodes} nodes", "are no ring", f"take 2 to {_MOST_NODES}")
        for what, count in (("hops", plan.hops), ("pages", plan.pages)):
            if not 1 <= count <= _MOST:
                problem = "are none" if count < 1 else "are too many"
                raise BadInput(f"{count} {what}", problem, f"take 1 to {_MOST}")
        self.plan = plan
        self.lines = 0
        """Rounds that the guest has printed."""
        self._console, console_in = os.pipe()
        os.set_blocking(self._console, False)
        self._rest = b""
        self._expected: int | None = None
        self._may_be_cut = bool(plan.start)
        self._events: dict[int, int] = {}  # descriptor -> node
        self._buffers: dict[int, bytes] = {}
        self._children: list[int] = []
        self._census: dict[int, dict[str, int]] = {}
        self._console_in = console_in
        self._directory = directory

    def _begin(self) -> None:
        listeners = []
        try:
            for index in range(self.plan.nodes):
                listeners.append(transport.Listener(transport.parse(f"unix:{self._directory}/{index}")))
            for index in range(self.plan.nodes):
                self._fork(index, listeners, self._console_in)
        finally:
            for listener in listeners:
                listener.forget()
            os.close(self._console_in)
            self._console_in = -1

    def _fork(self, index: int, listeners: list[transport.Listener], console: int) -> None:
        reader, writer = os.pipe()
        # A signal that ends the driver comes when it knows of the child, and can end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver's to decide
                for number in (signal.SIGTERM, signal.SIGHUP):
                    if signal.getsignal(number) != signal.SIG_IGN:
                        signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                for fd in [self._console, reader, *self._events]:
                    os.close(fd)
                for other, listener in enumerate(listeners):
                    if other != index:
                        listener.forget()
                status = _Node(self.plan, index, listeners, console, writer).run()
            finally:
                os._exit(status)
        self._children.append(child)
        self._events[reader] = index
        self._buffers[reader] = b""
        os.close(writer)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def hops(self) -> Iterator[Hop]:
        """Each hop when it is done. Raises Failure when a check fails, HostError when a node breaks."""
        done = 0
        while done < self.plan.hops:
            for event in self._wait(f"hop {done + 1}"):
                if event["event"] == "hop":
                    done += 1
                    hop = Hop(done, *(event[name] for name in Hop._fields[1:]))
                    self._check(hop)
                    yield hop
                else:
                    self._take(event, done)

    def finish(self) -> None:
        """After the last hop: ends the nodes, and makes sure that nothing is left of them."""
        deadline = time.monotonic() + HOP_LIMIT
        while self._events and time.monotonic() < deadline:
            for event in self._wait("the end"):
                self._take(event, self.plan.hops)
        if self._events:
            raise Failure(f"the nodes did not end within {HOP_LIMIT:g} seconds")
        self._read_console()
        for child in self._children:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status:
                raise Failure(f"a node ended with status {status}")
        self._children = []
        if self.lines < self.plan.hops:
            raise Failure(f"{self.plan.hops} hops, and the guest printed only {self.lines} rounds")

    def _check(self, hop: Hop) -> None:
        self._read_console()
        if hop.guest_rounds < 1:
            raise Failure(f"hop {hop.number}: the guest completed no round on node {hop.node}")
        if hop.dirty_rounds < 1:
            raise Failure(f"hop {hop.number}: no round of pre-copy had dirty pages")

    def _take(self, event: dict[str, Any], done: int) -> None:
        match event["event"]:
            case "refused":
                raise BadInput(event["subject"], event["problem"], event["advice"])
            case "failed":
                self._read_console()
                failures = [event, *self._other_failures()]
                words = "; ".join(f"node {failed['node']}: {failed['error']}" for failed in failures)
                raise Failure(f"hop {done + 1}, {words}")
            case "census":
                self._compare(event)

    def _other_failures(self) -> list[dict[str, Any]]:
        deadline = time.monotonic() + _SECOND_OPINION
        while (left := deadline - time.monotonic()) > 0 and self._events:
            with contextlib.suppress(Failure):  # which this is already
                found = [event for event in self._wait("the end", left) if event["event"] == "failed"]
                if found:
                    return found
        return []

    def _compare(self, event: dict[str, Any]) -> None:
        """Whether a node uses more than it did."""
        node, now = event["node"], {key: event[key] for key in ("descriptors", "threads", "memory")}
        before = self._census.setdefault(node, now)
        for what in ("descriptors", "threads"):
            if now[what] > before[what]:
                raise Failure(f"node {node} had {before[what]} {what} and has {now[what]}: they leak")
        then, memory = before["memory"] >> 10, now["memory"] >> 10
        if memory > then + (_SLACK >> 10):
            raise Failure(f"node {node} had {then} KiB of memory and has {memory}: it leaks")

    def _wait(self, what: str, limit: float = HOP_LIMIT) -> list[dict[str, Any]]:
        """The next events; [] when only the console had something. limit: seconds."""
        poll = select.poll()
        for fd in [self._console, *self._events]:
            poll.register(fd, select.POLLIN)
        ready = dict(poll.poll(limit * 1000))
        if not ready:
            raise Failure(f"{what} did not come within {limit:g} seconds")
        if self._console in ready:
            self._read_console()
        events = []
        for fd in [fd for fd in self._events if fd in ready]:
            data = os.read(fd, 65536)
            if not data:
                os.close(fd)
                node = self._events.pop(fd)
                if self._buffers.pop(fd) != b"end\n":
                    raise Failure(f"the process of node {node} ended in the middle of {what}")
                continue
            *lines, rest = (self._buffers[fd] + data).split(b"\n")
            if lines and lines[-1] == b"end":
                lines.pop()
                rest = b"end\n"
            self._buffers[fd] = rest
            events += [json.loads(line) for line in lines]
        return events

    def _read_console(self) -> None:
        """Takes what the guest has printed: round after round, and nothing else."""
        while True:
            try:
                data = os.read(self._console, 65536)
            except BlockingIOError:
                return
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take_line(line.decode("ascii", "replace"))

    def _take_line(self, line: str) -> None:
        begin, self._may_be_cut = self._may_be_cut, False
        if begin and _LINE.endswith(line.rstrip("0123456789")):
            return  # the rest of a line that the guest was saved in
        number = line.removeprefix(_LINE)
        if number == line or not number.isdigit():
            if "pages from" in line:
                return
            raise Failure(f"the guest: {line}")
        if self._expected is not None and int(number) != self._expected:
            raise Failure(
                f"the guest printed round {number} where {self._expected} was due: more than one copy, or none, ran"
            )
        self._expected = int(number) + 1
        self.lines += 1

    def close(self) -> None:
        """Ends every node; closing twice is allowed."""
        for child in self._children:
            os.kill(child, signal.SIGKILL)
        for child in self._children:
            os.waitpid(child, 0)
        self._children = []
        for fd in self._events:
            os.close(fd)
        self._events = {}
        for fd in (self._console, self._console_in):
            if fd >= 0:
                os.close(fd)
        self._console = self._console_in = -1

    def __enter__(self) -> Ring:
        try:
            self._begin()  # here, and not before: whatever comes in between, Ctrl-C too, the nodes are ended
            return self
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Node:
    """One process of the ring: takes the guest, lets it work, gives it to the next one."""

    def __init__(
        self, plan: Plan, index: int, listeners: list[transport.Listener], console: int, events: int
    ) -> None:
        self._plan = plan
        self._index = index
        self._listener = listeners[index]
        self._next = listeners[(index + 1) % plan.nodes].address
        self._console = console
        self._events = events
        self._departures = 0
        # Every node's share of the hops: the guest starts on node 0, and hop n leaves node (n - 1) % nodes.
        self._hops = range(index, plan.hops, plan.nodes)  # and no list: they may be very many

    def run(self) -> int:
        """All hops of this node. Returns the process's exit status."""
        try:
            machine = self._start() if self._index == 0 else None
            for hop in self._hops:
                if machine is None:
                    machine = self._receive()
                self._depart(machine, hop)
                machine.close()
                machine = None
            if self._plan.hops % self._plan.nodes == self._index:
                self._receive_last(machine)
            os.write(self._events, b"end\n")
            return 0
        except Exception as error:
            if os.environ.get("PYHV_DEBUG"):
                import traceback

                traceback.print_exc()
            self._tell("failed", error=str(error) if isinstance(error, PyhvError) else repr(error))
            os.write(self._events, b"end\n")
            return 0

    def _tell(self, event: str, **facts: object) -> None:
        os.write(self._events, json.dumps({"event": event, "node": self._index, **facts}).encode() + b"\n")

    def _start(self) -> Machine:
        try:
            machine = self._make()
        except BadInput as error:  # there is no ring to be had: nothing has failed
            self._tell("refused", subject=error.subject, problem=error.problem, advice=error.advice)
            raise
        machine.start()
        return machine

    def _make(self) -> Machine:
        plan = self._plan
        if plan.start:
            return Machine.restore(plan.start, accel=plan.accel, console_out=self._console)
        return Machine(
            "ticker",
            compat=plan.compat,
            memory=-(-(_FIRST_BYTE + plan.pages * _PAGE) // (1 << 20)) << 20,
            append=f"pages={plan.pages} every=1",
            accel=plan.accel,
            console_out=self._console,
        )

    def _receive(self) -> Machine:
        choose.open_accelerator(self._plan.accel).prepare()  # while nobody has come yet
        channel = self._listener.accept(HOP_LIMIT)
        if channel is None:
            raise HostError(f"node {self._index}", 0, f"nobody came within {HOP_LIMIT:g} seconds")
        machine = Machine.arrive(Destination(channel), accel=self._plan.accel, console_out=self._console)
        self._plant_at_arrival(machine)
        machine.start()
        return machine

    def _receive_last(self, machine: Machine | None) -> None:
        if machine is None:
            machine = self._receive()
        self._wait_for_round(machine, self._stamp(machine, 0))
        machine.pause()
        if self._plan.save:
            machine.save(self._plan.save)
        machine.close()

    def _depart(self, machine: Machine, hop: int) -> None:
        arrived = begun = self._stamp(machine, 0)
        last = self._plan.pages - 1
        dirty_rounds: set[int] = set()
        again = False

        def note(progress: Progress) -> None:
            if progress.round > 1:  # it is 0 in one that has nothing to send
                dirty_rounds.add(progress.round)

        def may_stop() -> bool:
            nonlocal begun, again
            if self._stamp(machine, last) <= begun:
                return False
            if dirty_rounds or again:
                return True
            # It has written nothing since its writes are noted: once all it has, which pre-copy sends.
            begun, again = self._stamp(machine, 0), True
            return False

        self._plant_at_departure(machine, hop)
        with transport.connect(self._next) as channel:
            # Its round here and the copying go on at the same time.
            summary = machine.depart(
                channel,
                # In the second round there is what the guest has written during the first. A busy host makes a hop
                # late, and is no failure.
                limits=Limits(downtime=self._plan.downtime, least_rounds=2, on_timeout="stop", silence=_SILENCE),
                progress=note,
                may_stop=may_stop,
            )
        if self._plan.fault == "second-copy" and hop == self._plan.hops // 2:
            machine.start(force=True)
            time.sleep(0.1)
            machine.pause()
        self._tell(
            "hop",
            total_time=summary.total_time,
            downtime=summary.downtime,
            dirty_rounds=len(dirty_rounds),
            guest_rounds=self._stamp(machine, last) - arrived,
        )
        self._departures += 1
        if self._departures >= _WARM_UP and self._departures % _CENSUS == 0:
            self._take_census()

    def _stamp(self, machine: Machine, page: int) -> int:
        """The round of a page's stamp."""
        place = (_FIRST_BYTE // _PAGE + page) % _BLOCK
        data = machine.vm.memory.read(_FIRST_BYTE + page * _PAGE + 8 * place, 8)
        return int(struct.unpack("<Q", data)[0]) >> 32

    def _wait_for_round(self, machine: Machine, begun: int) -> None:
        """Until the guest has begun and ended a round here. begun: the last that it had begun before."""
        deadline = time.monotonic() + HOP_LIMIT
        while self._stamp(machine, self._plan.pages - 1) <= begun:
            if machine.vm.stopped is not None:
                raise HostError("the guest", 0, "came to its end")
            if time.monotonic() > deadline:
                raise HostError("the guest", 0, f"completed no round within {HOP_LIMIT:g} seconds")
            time.sleep(0.0002)

    def _take_census(self) -> None:
        gc.collect()
        with open("/proc/self/status", encoding="ascii") as status:
            facts = dict(line.split(":", 1) for line in status)
        self._tell(
            "census",
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=int(facts["Threads"]),
            memory=int(facts["VmRSS"].split()[0]) << 10,
        )

    # ------------------------------------------------------------------------------------ faults on purpose

    def _plant_at_arrival(self, machine: Machine) -> None:
        if self._departures != len(self._hops) // 2 or self._index != 1:
            return
        place = _FIRST_BYTE + 8 * ((_FIRST_BYTE // _PAGE) % _BLOCK)
        stamp = struct.unpack("<Q", machine.vm.memory.read(place, 8))[0]
        if self._plan.fault == "stale-page":
            machine.vm.memory.write(place, struct.pack("<Q", stamp - (1 << 32)))
        elif self._plan.fault == "dropped-page":
            machine.vm.memory.write(place, bytes(8))
        elif self._plan.fault == "tsc-back":
            # To its beginning: by less than the guest has just stood it would not go back.
            state = machine.vm.capture()
            for vcpu in state.vcpus:
                vcpu.msrs[msrs.IA32_TSC] = 0
            machine.vm.apply(state)

    def _plant_at_departure(self, machine: Machine, hop: int) -> None:
        if self._plan.fault == "cpuid-bit" and hop == self._plan.hops // 2:
            table = machine.vm.tables[0]
            ecx = table.get(1).ecx & ~features.find("cx16").mask
            machine.vm.tables = (table.replace({(1, 0): table.get(1)._replace(ecx=ecx)}), *machine.vm.tables[1:])


def directory_for_sockets() -> str:
    """A new directory with a short name: a socket's path has at most 107 bytes."""
    import tempfile

    return tempfile.mkdtemp(prefix="pyhv-soak-", dir="/tmp" if len(tempfile.gettempdir()) > 60 else None)


def quantile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed. values: sorted, not empty."""
    return values[min(int(share * len(values)), len(values) - 1)]



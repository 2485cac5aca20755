"""The side of a migration that has the VM, and gives it away."""

from __future__ import annotations

import contextlib
import enum
import errno
import time
from collections.abc import Callable
from typing import NamedTuple

from pyhv import arguments
from pyhv._native.link import PAGE_SIZE, Link, PageSet
from pyhv.errors import BadInput, Cancelled, GaveUp, HandoverUnknown, HostError, Incompatible
from pyhv.migration import protocol, waits
from pyhv.migration.protocol import Answer, Cancel, Commit, Hello, Ready, Running, Sync, Synced, Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyhv.migration.transport import Channel
    from pyhv.state.records import RawMachine
    from pyhv.vm.vm import Departure, Vm

# A piece of work between two looks at the clock, at what the other side says, and at who waits for progress; seconds.
_SLICE_MS = 100

# The same while it waits for something; in seconds.
_LOOK = 0.1

# How often to ask whether the guest may be stopped; seconds.
_LEAVE_CHECK = 0.001

# A message of pages, of which the link may still have a part when all are said to be sent; bytes.
_MESSAGE = 256 << 10

# The rate is not known before something was sent; bytes a second, that of a slow network.
_FIRST_RATE = 100e6

# What a hand-over takes besides sending pages: stopping the vCPUs, their state, one message there and two back.
_FIXED_DOWNTIME = 0.002

# With less, the destination would wait for the next message of 256 KiB for longer than it does (waits.MEMORY).
_LEAST_BANDWIDTH = 1000

ON_TIMEOUT = ("cancel", "stop")


class Limits(NamedTuple):
    """How a migration is to be done. Times in seconds."""

    downtime: float = 0.05
    """The guest stands for about so long at most: pre-copy goes on until what is left can be sent in this time, and
    then as long as each round leaves less than half."""
    bandwidth: float = 0.0
    """Bytes a second while the guest runs; 0: no limit."""
    timeout: float = 0.0
    """After so long pre-copy has not come to its end; 0: no limit."""
    rounds: int = 30
    """After so many rounds neither."""
    on_timeout: str = "cancel"
    """What happens then: "cancel", or "stop": the guest stands however long the rest takes."""
    least_rounds: int = 1
    """At least so many rounds of pre-copy, even if what is left is little."""
    compress: bool = False
    """Whether pages are compressed by zstd."""
    heartbeat: float = 0.2
    """Both sides give a sign of life after so long."""
    silence: float = 1.0
    """After so long without one the link is broken."""
    overrun: float = 10.0
    """The paused guest goes on here once it has been paused for so many times the downtime, unless it is handed over by
    then: the link, or the other side, has become slower than it was. Not before two silences have passed; and where the
    rest is expected to take longer than the downtime (on_timeout), so many times that."""

    def check(self) -> None:
        """Raises BadInput for limits that make no sense."""
        for name in ("downtime", "bandwidth", "timeout", "rounds", "least_rounds", "heartbeat", "silence", "overrun"):
            value = getattr(self, name)
            if not arguments.is_number(value):
                raise BadInput(f"{name} {value!r}", "is no number")
        arguments.flag("compress", self.compress)
        for name in ("downtime", "bandwidth", "timeout"):
            value = getattr(self, name)
            if not 0 <= value < 1e18:  # bytes are counted in 64 bits
                raise BadInput(f"{name} {value}", "is no limit", "give a number from 0 to 1e18")
        if 0 < self.bandwidth < _LEAST_BANDWIDTH:
            problem = f"is too little: the other side would give up; the least is {_LEAST_BANDWIDTH:g} bytes a second"
            raise BadInput(f"bandwidth {self.bandwidth:g}", problem)
        if not 1 <= self.overrun < 1e9:
            raise BadInput(f"overrun {self.overrun}", "is no factor", "give a number from 1 on")
        for name in ("rounds", "least_rounds"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} {getattr(self, name)}", "are none", "take one at least")
        if self.on_timeout not in ON_TIMEOUT:
            raise BadInput(f"on_timeout {self.on_timeout}", "is unknown", f"choose one of {', '.join(ON_TIMEOUT)}")
        if not 0.01 <= self.heartbeat <= self.silence / 2 or self.silence > 3600:
            problem = f"do not fit: heartbeat {self.heartbeat:g}, silence {self.silence:g}"
            raise BadInput("time limits", problem, "0.01 is the least, an hour the most, a silence has two heartbeats")


# zstd's quickest level that is no negative one: what takes longer costs more time than the link does.
_ZSTD_LEVEL = 1


class Progress(NamedTuple):
    """How far pre-copy is."""

    round: int
    """From 1 on; 0 before the first, in one that has nothing to send, and in the hand-over."""
    left: int
    """Bytes of memory left in this round."""
    total: int
    """Bytes that the round began with."""
    sent: int
    """Bytes on the wire so far."""
    rate: float
    """Bytes of memory a second."""
    dirty_rate: float
    """Bytes of memory that the guest writes a second, in pages; 0 before it is known."""
    downtime: float
    """How long the guest would stand if pre-copy ended with what is left, in seconds."""


class Summary(NamedTuple):
    """How a migration went. Times in seconds."""

    total_time: float
    downtime: float
    """From the last instruction here to the first there; 0 of a guest that is paused on both sides. Where these have no
    clock in common, to when the news of it came, which is longer."""
    one_clock: bool
    rounds: int
    pages: int
    """How often a page was sent."""
    zero_pages: int
    """How often a page was sent that has only zeros, as such."""
    bytes: int
    """All that was sent."""
    rate: float
    """Bytes of memory a second, while they were sent."""


class Outgoing(NamedTuple):
    """What a source needs to know of a machine."""

    vm: Vm
    hello: Hello
    capture: Callable[[], RawMachine]
    """Takes the state of the paused VM."""
    departure: Departure
    """Stops the VM, gives it away, or lets it go on here."""


class Stage(enum.Enum):
    """How far a migration is, in the order in which it goes; it can be cancelled in all but the last."""

    ASKING = "the other side is asked whether it can run the guest"
    COPYING = "memory is sent while the guest runs"
    SETTLING = "all that was sent is to be taken"
    LEAVING = "the guest may not stop yet"
    STOPPING = "the guest is stopped, and the rest of its memory sent"
    HANDING_OVER = "its state is sent, and is to be put in place"
    COMMITTED = "it is the other side's"


class Source:
    """One migration of a running or paused VM, over an open channel.

    progress: is called now and then, and may raise to give the migration up. may_stop: pre-copy does not end before it
    says so; after it has said no there is another round.
    """

    def __init__(
        self,
        outgoing: Outgoing,
        channel: Channel,
        limits: Limits,
        progress: Callable[[Progress], None] | None = None,
        may_stop: Callable[[], bool] = lambda: True,
    ) -> None:
        self.stage = Stage.ASKING
        self._may_stop = may_stop
        self._out = outgoing
        self._vm = outgoing.vm
        self._channel = channel
        self._peer = channel.peer
        self._limits = limits
        self._progress = progress or (lambda progress: None)
        # The handshake takes the other side longer than a silence: it makes a VM. Until then nothing stands still.
        self._link = Link(channel.in_fd, channel.out_fd, limits.heartbeat, waits.ANSWER.seconds(limits.silence))
        self._due = ""  # what the other side is to do before the link's limit
        self._within = 0.0  # seconds that it has for that
        self._round = 0
        self._rate = _FIRST_RATE
        self._dirty_rate = 0.0
        self._sent_bytes = 0  # of memory
        self._began = 0.0  # pre-copy
        self._since = 0.0  # this round
        self._sent_for = 0.0  # seconds, in the rounds before
        self._asked = False  # a synced is due
        self._settled = 0  # bytes that the other side has taken for certain
        self._committed = False

    def run(self) -> Summary:
        """Does it all; afterwards the VM is paused and belongs to the other side.

        Raises Incompatible or BadInput where the other side does not take the VM, GaveUp where it gave up, HostError
        where something broke,
        BadInput if pre-copy did not come to its end: then the VM goes on running here. Raises HandoverUnknown where
        nobody knows whether the VM runs there: then it is paused here.
        """
        begin = time.monotonic()
        self._out.departure.watch(self._link.cancel)
        try:
            try:
                self._handshake()
                self._copy()
                # Whoever else wants something of the VM waits until it is decided which side has it.
                with protocol.no_collection(), self._out.departure.turn:
                    try:
                        stopped = self._stop()
                        running = self._hand_over()
                    except BaseException:
                        if not self._committed:
                            self._out.departure.resume()
                        raise
            except BaseException as error:
                if self._committed:
                    raise
                if isinstance(error, HostError) and error.errnum == errno.ECANCELED:
                    error = Cancelled(self._peer)
                self._resume(error)
                if isinstance(error, Cancelled | GaveUp):
                    raise error from None
                if isinstance(error, HostError):
                    raise (self._last_words(error) or self._about(error)) from None
                raise
            one_clock = running.host == self._out.hello.host
            end = running.since if one_clock else time.monotonic_ns()
            counts = self._sending
            return Summary(
                total_time=time.monotonic() - begin,
                downtime=0.0 if self._out.hello.paused else (end - stopped) / 1e9,
                one_clock=one_clock,
                rounds=self._round,
                pages=counts.pages,
                zero_pages=counts.zero_pages,
                bytes=self._link.counters()[0],
                rate=self._rate,
            )
        finally:
            self._out.departure.watch(None)
            self._link.close()

    def _enter(self, stage: Stage) -> None:
        self.stage = stage

    def _resume(self, error: BaseException) -> None:
        """Lets the VM run on, first of all; then tells the other side."""
        self._out.departure.resume()
        self._vm.log_dirty(False)
        broken = isinstance(error, HostError) and error.errnum in (errno.EPIPE, errno.ETIMEDOUT, errno.EBADMSG)
        if not broken and not isinstance(error, _Refused | GaveUp):
            reason = protocol.reason_of(self._about(error) if isinstance(error, HostError) else error)
            self._out.departure.watch(None)
            self._link.revive()
            self._link.set_limit(None)
            self._link.send_last(*protocol.encode(Cancel(reason)), waits.LAST_WORD.seconds())

    # -------------------------------------------------------------------------------------------- conversation

    def _limit(self, due: str, seconds: float) -> None:
        """From now on the other side has so long for what is due; the link sees to it."""
        self._due, self._within = due, seconds
        self._link.set_limit(seconds)

    def _about(self, error: HostError) -> HostError:
        """The same of this migration."""
        what, advice = f"migration to {self._peer}", "the VM runs on here"
        if error.errnum == errno.ETIME:
            return HostError(what, errno.ETIMEDOUT, f"no {self._due} within {self._within:g} seconds", advice)
        return protocol.about(error, what, advice)

    def _handshake(self) -> None:
        self._enter(Stage.ASKING)
        self._limit("answer", waits.ANSWER.seconds(self._limits.silence))
        self._send(self._out.hello)
        answer = self._expect(Answer)
        if answer.reasons:
            raise _Refused(self._peer, "does not take this guest", answer.reasons)
        if self._limits.compress and not answer.zstd:
            raise BadInput(self._peer, "has no zstd library", "install libzstd there, or migrate without compression")
        self._link.set_times(self._limits.heartbeat, self._limits.silence)
        protocol.warm_up()
        self._vm.warm_up()

    def _send(self, message: tuple[Any, ...], more: bool = False) -> None:
        self._link.send(*protocol.encode(message), more)

    def _expect(self, cls: type[protocol.R]) -> protocol.R:
        """The next message, which must be this one. Raises what a cancel, silence or the limit means."""
        while True:
            found = self._hear(_LOOK)
            if found is not None:
                return self._take(cls, *found)
            if not self._committed:
                self._check_guest()
                self._tell(0, 0)

    def _hear(self, timeout: float) -> tuple[int, bytes] | None:
        """What the other side says within so many seconds, but for a synced that is due: that may come when nobody
        waits for it any more."""
        found = self._link.receive(timeout)
        if found is None or not self._asked or found[0] != Type.SYNCED:
            return found
        protocol.decode(Synced, found[1])
        self._asked = False
        return None

    def _listen(self, timeout: float) -> None:
        """Takes what the other side says where nothing is due: that it gives up, at the most."""
        found = self._hear(timeout)
        if found is not None:
            self._take(None, *found)

    def _last_words(self, broken: HostError) -> GaveUp | None:
        """Why the other side has closed the link, if that is what broke it and it has said so before."""
        if broken.errnum == errno.EPIPE:
            self._link.set_limit(None)
            with contextlib.suppress(HostError, BadInput):
                try:
                    while (found := self._link.receive(0)) is not None:
                        if found[0] == Type.CANCEL:
                            self._take(None, *found)
                except GaveUp as last_words:
                    return last_words
        return None

    def _take(self, cls: type[protocol.R] | None, kind: int, payload: bytes) -> protocol.R:
        wanted = protocol.name_of(cls) if cls else "nothing"
        if kind == Type.CANCEL:
            cancel = protocol.decode(Cancel, payload)
            raise GaveUp(self._peer, protocol.shown(cancel.reason))
        if cls is None or kind != protocol.type_of(cls):
            problem = f"a message {protocol.title(kind)} came where {wanted} was due"
            raise HostError(f"migration to {self._peer}", errno.EBADMSG, problem)
        return protocol.decode(cls, payload)

    def _check_guest(self) -> None:
        if self._vm.stopped is not None:
            raise BadInput("the guest", "came to its end during the migration")

    # ---------------------------------------------------------------------------------------------- pre-copy

    def _copy(self) -> None:
        """Sends the memory in rounds until the rest fits into the downtime."""
        vm, limits = self._vm, self._limits
        ram = vm.memory.ram
        pages = self._pages = PageSet(vm.memory.size)
        # First the log, then the look at what is there: a page that is written in between is in both.
        vm.log_dirty(True)
        pages.add_content(ram)
        self._sending = self._link.sending(ram, pages, _ZSTD_LEVEL if limits.compress else 0)
        self._began = time.monotonic()
        extra = False  # whether this round is done though what it sends would fit
        while True:
            self._round += 1
            total = len(pages) * PAGE_SIZE
            # The time may pass in an extra round: that is no reason to give up, for what is on its way would fit.
            settled = self._send_round(pages, total) or extra
            left = self._look(pages)
            over = self._is_late() or self._round >= max(limits.rounds, limits.least_rounds)
            fits = settled and self._downtime(left) <= limits.downtime and self._round >= limits.least_rounds
            extra = fits and not over and left < total / 2 and left / self._rate > _FIXED_DOWNTIME
            if extra:
                continue
            if fits:
                if self._may_stop():
                    return
                self._wait_for_leave()
                self._look(pages)
                continue  # with what it has written meanwhile
            if over:
                if limits.on_timeout == "stop":
                    return
                raise self._no_end(left)

    def _stop(self) -> int:
        """Stops the VM and sends the rest of its memory. Returns the CLOCK_MONOTONIC in ns of its last instruction."""
        self._enter(Stage.STOPPING)
        began = time.monotonic()
        self._out.departure.stop()
        self._check_guest()
        self._vm.take_dirty(self._pages)
        left = len(self._pages) * PAGE_SIZE
        limits = self._limits
        enough = limits.overrun * max(limits.downtime, self._downtime(left))
        if limits.on_timeout == "stop":  # however long the rest takes: no longer than all before it did
            enough = max(enough, began - self._began)
        self._limit("ready", max(enough, 2 * limits.silence))
        if left:
            self._tell(0, left)
            self._send_all(self._pages)
        return self._vm.left

    def _wait_for_leave(self) -> None:
        self._enter(Stage.LEAVING)
        while not self._may_stop():
            self._rest(time.monotonic() + _LEAVE_CHECK)
            self._check_guest()

    def _look(self, pages: PageSet) -> int:
        """Adds what the guest has written since this round began; how many bytes are to be sent now."""
        self._vm.take_dirty(pages)
        self._check_guest()
        left = len(pages) * PAGE_SIZE
        self._dirty_rate = left / max(time.monotonic() - self._since, 1e-6)
        return left

    def _no_end(self, left: int) -> BadInput:
        rates = f"it writes {self._dirty_rate / 1e6:.0f} MB/s, and {self._rate / 1e6:.0f} MB/s can be sent"
        rest = f"{left >> 20} MiB are left, which would take {self._downtime(left) * 1e3:.0f} ms"
        return BadInput(
            "the guest",
            f"writes its memory too fast to be migrated: after {self._round} rounds {rest}; {rates}",
            'allow a longer downtime, or choose "stop" as on_timeout',
        )

    def _downtime(self, left: int) -> float:
        return left / self._rate + _FIXED_DOWNTIME

    def _measure(self) -> None:
        took = self._sent_for + time.monotonic() - self._since
        if took > 0.001:
            self._rate = max(self._sent_bytes / took, 1.0)

    def _is_late(self) -> bool:
        return self._limits.timeout > 0 and time.monotonic() - self._began > self._limits.timeout

    def _send_round(self, pages: PageSet, total: int) -> bool:
        """Sends the pages, of so many bytes, until the time for all of pre-copy is over; whether the other side has
        taken all."""
        self._enter(Stage.COPYING)
        limits, sending = self._limits, self._sending
        self._since = time.monotonic()
        patience = waits.ROUND.seconds(limits.silence)
        sending.next = 0
        sending.max_ms = _SLICE_MS
        sending.max_bytes = max(int(limits.bandwidth * _SLICE_MS / 1000), 1) if limits.bandwidth else 0
        done, taken = False, -1
        while not done and not self._is_late():
            since, sent = time.monotonic(), sending.bytes
            if sent != taken:  # a message more than the last time has found its way
                taken = sent
                self._limit("further progress", patience)
            done = self._send_some()
            self._check_guest()
            self._tell(total, len(pages) * PAGE_SIZE)
            until = since + (sending.bytes - sent) / limits.bandwidth if limits.bandwidth else 0.0
            if time.monotonic() < until:
                self._link.set_limit(None)
                taken = -1
            while time.monotonic() < until and not self._is_late():
                self._rest(min(until, time.monotonic() + _LOOK))
                self._check_guest()
                self._tell(total, len(pages) * PAGE_SIZE)
        settled = done and self._settle(total)
        self._sent_for += time.monotonic() - self._since
        return settled

    def _settle(self, total: int) -> bool:
        """Waits until the other side has taken all that was sent: then it is known how quickly it does, and nothing
        lies between the two when the guest has to stand."""
        self._enter(Stage.SETTLING)
        self._asked = True
        on_the_way = _MESSAGE + min(self._link.counters()[0] - self._settled, self._channel.on_the_way())
        self._limit("synced", waits.SYNCED.seconds(self._limits.silence) + on_the_way / waits.SLOWEST)
        self._send(Sync(self._round >= self._limits.least_rounds))
        there = False  # all that was sent is: the other side has it, or it will not
        while self._asked and not self._is_late():
            self._listen(_LOOK)
            if self._asked and not there and self._channel.on_the_way() == 0:
                there = True
                self._limit("synced", waits.SYNCED.seconds(self._limits.silence))
            self._check_guest()
            self._tell(total, 0)
        self._measure()
        self._link.set_limit(None)  # it may have to wait for its guest
        if not self._asked:
            self._settled = self._link.counters()[0]
        return not self._asked

    def _send_all(self, pages: PageSet) -> None:
        """The rest, with the guest standing and without a limit."""
        sending = self._sending
        sending.next = sending.max_bytes = 0
        sending.max_ms = _SLICE_MS
        self._since = time.monotonic()
        while not self._send_some():
            self._tell(0, len(pages) * PAGE_SIZE)

    def _send_some(self) -> bool:
        """Sends pages up to a limit; whether all are sent. Takes what the other side says meanwhile."""
        sending = self._sending
        before = sending.pages + sending.zero_pages
        done = self._link.send_pages(sending)
        self._sent_bytes += (sending.pages + sending.zero_pages - before) * PAGE_SIZE
        self._measure()
        self._listen(0)
        return done

    def _rest(self, until: float) -> None:
        """Waits for the bandwidth limit, and listens."""
        while (left := until - time.monotonic()) > 0:
            self._listen(min(left, _LOOK))

    def _tell(self, total: int, left: int) -> None:
        counters = self._link.counters()
        round = 0 if total == 0 else self._round
        self._progress(
            Progress(round, left, total, counters[0], self._rate, self._dirty_rate, self._downtime(left))
        )

    # ---------------------------------------------------------------------------------------------- hand-over

    def _hand_over(self) -> Running:
        """Sends the state of the VM, which stands, and gives it away."""
        self._enter(Stage.HANDING_OVER)
        taken = time.time_ns()
        counts = self._sending
        vcpus, end = protocol.parts(self._out.capture(), counts.pages, counts.zero_pages, taken)
        for vcpu in vcpus:
            self._send(vcpu, more=True)
        self._send(end)
        self._expect(Ready)
        self._out.departure.commit(self._peer)
        self._committed = True
        self._out.departure.watch(None)
        try:
            self._enter(Stage.COMMITTED)
            self._limit("running", waits.RUNNING.seconds(self._limits.silence))
            with contextlib.suppress(HostError):  # what it has said before the link broke counts
                self._send(Commit())
            running = self._expect(Running)
        except GaveUp:
            # It says that it has forgotten the guest, which it can only before it has run it.
            self._committed = False
            raise
        except (HostError, BadInput) as error:
            reason = self._about(error).detail if isinstance(error, HostError) else protocol.reason_of(error)
            raise HandoverUnknown(self._peer, reason) from None
        self._out.departure.finish()
        return running


class _Refused(Incompatible):
    """The other side said no; it need not be told that it is over."""

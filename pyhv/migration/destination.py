"""The side of a migration that takes a VM.

What comes in is taken for hostile: a message is looked at only where it is due, its size is bounded by the engine and
its content by the records' annotations, and nothing that the other side says makes this side take more memory than the
guest's, the size of which is known, and was refused where the host cannot map it, before a page comes.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from typing import NamedTuple

from pyhv._native.link import Link, open_zstd
from pyhv.errors import BadInput, GaveUp, HostError
from pyhv.migration import protocol, waits
from pyhv.migration.protocol import Answer, Cancel, Commit, End, Hello, Ready, Running, Sync, Synced, Type, Vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyhv._native.memory import Memory
    from pyhv.migration.transport import Channel
    from pyhv.state.records import RawMachine

# The limits that a source may set for both sides, in ms.
_LEAST_MS, _MOST_MS = 10, 3_600_000


class Received(NamedTuple):
    """A guest that has come as a whole."""

    state: RawMachine
    taken: int
    """This host's CLOCK_MONOTONIC in ns when its clock was read there, as far as the two hosts' clocks agree."""

    @property
    def elapsed(self) -> int:
        """Nanoseconds of real time since then."""
        return time.monotonic_ns() - self.taken


class Destination:
    """One migration to here, over an open channel: greet(), then accept() or refuse(), receive(), confirm(), begin()
    right before the VM runs, and announce() when it does. Close it in any case.

    Every call raises HostError where the link breaks or what comes is no message, GaveUp where the source gives up,
    BadInput for what makes no sense. The VM must then be forgotten, except after confirm().
    """

    def __init__(self, channel: Channel) -> None:
        self._peer = channel.peer
        self._channel = channel
        # No sign of life before the source has said something: what stands on a serial line before it listens is lost,
        # or damaged.
        self._link = Link(channel.in_fd, channel.out_fd, 0, waits.HELLO.seconds())
        self._over = False  # the source knows
        self._answered = False
        self._silence = waits.HELLO.seconds()
        self._due = waits.HELLO
        self._confirmed = False  # the VM is this side's
        self._hello: Hello | None = None
        self._greeted = time.monotonic_ns()
        self._boot_id = protocol.boot_id()  # now, and not when a guest stands
        self._at_the_end = contextlib.ExitStack()

    def greet(self) -> Hello:
        """What is to come; may be asked again."""
        if self._hello is not None:
            return self._hello
        hello = self._expect(Hello, waits.HELLO)
        if not (_LEAST_MS <= hello.heartbeat <= _MOST_MS and _LEAST_MS <= hello.silence <= _MOST_MS):
            raise BadInput("message hello", f"has the time limits {hello.heartbeat} and {hello.silence} ms")
        self._hello = hello
        return hello

    def refuse(self, reasons: list[str]) -> None:
        """Tells why this host cannot run the guest."""
        self._over = self._answered = True
        self._link.set_limit(waits.LAST_WORD.seconds())
        self._send(Answer(tuple(reasons), False))

    def accept(self, hello: Hello, memory: Memory) -> None:
        """The guest can run here: its pages go to `memory`, which is all zeros. Until close() no garbage is collected:
        the guest is to run before that."""
        self._at_the_end.enter_context(protocol.no_collection())
        self._link.expect_pages(memory)
        self._silence = min(hello.silence / 1000, waits.MOST_SILENCE)
        self._link.set_times(hello.heartbeat / 1000, self._silence)
        self._link.set_limit(waits.MEMORY.seconds(self._silence))
        zstd = False
        if hello.zstd:
            try:
                open_zstd()
                zstd = True
            except HostError:
                pass
        self._answered = True
        self._send(Answer((), zstd))

    def receive(
        self,
        hello: Hello,
        while_waiting: Callable[[], None] = lambda: None,
        rehearse: Callable[[], None] = lambda: None,
    ) -> Received:
        """All of the guest. while_waiting: is called now and then, and may raise to give up. rehearse: is called
        when the state may be about to come."""
        vcpus: list[Vcpu] = []
        # The rest of the memory takes as long as the link needs: what must not end is that it comes.
        due, come = waits.MEMORY, -1
        while True:
            if come != (landed := self._link.landed):
                come = landed
                self._limit(due)
            message = self._receive(0.1)
            while_waiting()
            if message is None:
                continue
            kind, payload = message
            if kind == Type.SYNC and not vcpus:
                sync = self._take(Sync, kind, payload)
                self._limit(due)
                self._send(Synced())
                if sync.may_stand:
                    rehearse()
                continue
            if kind == Type.VCPU:
                if not vcpus:
                    due = waits.END
                    self._limit(due)
                if len(vcpus) == len(hello.tables):
                    problem = f"comes once more than the {len(vcpus)} times that message hello announced"
                    raise BadInput("message vcpu", problem)
                vcpus.append(self._take(Vcpu, kind, payload))
                continue
            end = self._take(End, kind, payload)
            landing = self._link.landing
            if (end.pages, end.zero_pages, end.vcpus) != (landing.pages, landing.zero_pages, len(vcpus)):
                sent = f"{end.pages} pages, {end.zero_pages} pages of zeros and {end.vcpus} vCPUs were sent"
                came = f"{landing.pages}, {landing.zero_pages} and {len(vcpus)} came"
                raise BadInput("message end", f"{sent}, {came}")
            if len(vcpus) != len(hello.tables):
                raise BadInput("message end", f"came after {len(vcpus)} vCPUs of {len(hello.tables)}")
            try:
                self._link.check_pages()
            except HostError as error:
                raise self._about(error) from None
            # Hosts' clocks differ: the guest has not stood for longer than we have talked.
            now = time.monotonic_ns()
            elapsed = min(max(time.time_ns() - end.taken, 0), now - self._greeted)
            return Received(end.with_vcpus(vcpus), now - elapsed)

    def confirm(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """All is in place: says so, and waits for the word. After it the VM is this side's."""
        self._limit(waits.COMMIT)
        self._send(Ready())
        self._expect(Commit, waits.COMMIT, while_waiting)
        self._link.set_limit(None)
        self._confirmed = True

    def begin(self) -> None:
        """From here on the VM may have run. Until then close() tells the source that it has not, and the source goes on
        with it; also after confirm()."""
        self._over = True

    def announce(self, since: int) -> None:
        """The VM runs, since that CLOCK_MONOTONIC in ns. Where that cannot be told any more it runs nevertheless."""
        try:
            self._send(Running(self._boot_id, since))
        except HostError:
            pass

    def close(self, error: BaseException | None = None) -> None:
        """Ends the conversation, with a word about the error that made this side give up, which is its answer if it has
        given none. Closing twice is allowed."""
        broken = isinstance(error, HostError) and error.errnum in (errno.EPIPE, errno.ETIMEDOUT)
        broken = broken and not isinstance(error, _Late)
        try:
            if (error is not None or self._confirmed) and not self._over and not broken:
                answers = isinstance(error, BadInput) and self._hello is not None and not self._answered
                self._over = True
                self._link.set_limit(None)
                reason = "it was ended before it ran" if error is None else protocol.reason_of(error)
                last = Answer((reason,), False) if answers else Cancel(reason)
                self._link.send_last(*protocol.encode(last), waits.LAST_WORD.seconds())
        finally:
            self._at_the_end.close()
            self._link.close()
            self._channel.close()

    # ------------------------------------------------------------------------------------------------ messages

    def _send(self, message: tuple[Any, ...]) -> None:
        try:
            self._link.send(*protocol.encode(message))
        except HostError as error:
            raise (self._last_words(error) or self._about(error)) from None

    def _last_words(self, broken: HostError) -> GaveUp | None:
        """Why the source has closed the link, if that is what broke it and it has said so before."""
        if broken.errnum == errno.EPIPE:
            self._link.set_limit(None)
            with contextlib.suppress(HostError, BadInput):
                while (found := self._link.receive(0)) is not None:
                    if found[0] == Type.CANCEL:
                        return self._given_up(found[1])
        return None

    def _receive(self, timeout: float) -> tuple[int, bytes] | None:
        try:
            return self._link.receive(timeout)
        except HostError as error:
            raise self._about(error) from None

    def _limit(self, wait: waits.Wait) -> None:
        """From now on the source has so long for this; the link sees to it."""
        self._due = wait
        self._link.set_limit(wait.seconds(self._silence))

    def _about(self, error: HostError) -> HostError:
        what = f"migration from {self._peer}"
        if error.errnum == errno.ETIME:
            within = self._due.seconds(self._silence)
            return _Late(what, errno.ETIMEDOUT, f"{self._due.what} did not come within {within:g} seconds")
        return protocol.about(error, what, "the VM does not run here")

    def _expect(
        self, cls: type[protocol.R], wait: waits.Wait, while_waiting: Callable[[], None] = lambda: None
    ) -> protocol.R:
        self._limit(wait)
        while True:
            found = self._receive(0.1)
            if found is not None:
                return self._take(cls, *found)
            while_waiting()

    def _take(self, cls: type[protocol.R], kind: int, payload: bytes) -> protocol.R:
        if kind == Type.CANCEL:
            raise self._given_up(payload)
        if kind != protocol.type_of(cls):
            problem = f"a message {protocol.title(kind)} came where {protocol.name_of(cls)} was due"
            raise HostError(f"migration from {self._peer}", errno.EBADMSG, problem)
        return protocol.decode(cls, payload)

    def _given_up(self, cancel: bytes) -> GaveUp:
        self._over = True
        reason = protocol.shown(protocol.decode(Cancel, cancel).reason)
        return GaveUp(f"migration from {self._peer}: the source", reason)


class _Late(HostError):
    """The source is alive and did not do what was due in time."""

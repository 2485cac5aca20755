"""Receivers and sources that lie: the other side is unharmed, and says what was wrong."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import re
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import pyhv
from pyhv._native.link import MAX_MESSAGE
from pyhv.accel import choose
from pyhv.errors import PyhvError
from pyhv.migration import protocol, waits
from pyhv.migration.destination import Destination
from pyhv.migration.protocol import Answer, Cancel, End, Ready, Running, Sync, Synced, Type, Vcpu
from pyhv.migration.source import Progress
from pyhv.migration.transport import Channel
from pyhv.state import codec

from .cli import IN_THE_LAB, LAB_REASON
from .frames import Frame, Sealer, Speaker, Splitter, pages, sum_of
from .migration import (
    LIMITS,
    PATIENCE,
    TIMEOUT,
    Migration,
    Side,
    Wishes,
    check_console,
    descriptors,
    greet,
    take_all,
    wait_for_rounds,
    waits_of_tests,
)
from .test_migration import running

if IN_THE_LAB:  # which has no hypothesis
    pytest.skip(LAB_REASON, allow_module_level=True)

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Lie = Callable[[Speaker], None]


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in vars(waits).items():  # so that each is set back
        if name.isupper():
            monkeypatch.setattr(waits, name, value)
    waits_of_tests()
    choose.open_accelerator().prepare()
    gc.collect()  # what the test before has left in errors that it caught is closed
    before, threads = descriptors(), threading.active_count()
    yield
    choose.open_accelerator().prepare()
    assert (descriptors(), threading.active_count()) == (before, threads)


def in_background(sock: socket.socket, lie: Lie) -> threading.Thread:
    def tell() -> None:
        # Until the other side has had enough of it.
        with sock, contextlib.suppress(OSError, EOFError):
            sock.settimeout(TIMEOUT)
            lie(Speaker(sock))

    thread = threading.Thread(target=tell)
    thread.start()
    return thread


# ------------------------------------------------------------------------------------------------------ receivers


def raw(data: bytes) -> Lie:
    def lie(speaker: Speaker) -> None:
        speaker.sock.sendall(data)
        wait(speaker)

    return lie


def message(kind: int, payload: bytes = b"") -> Lie:
    def lie(speaker: Speaker) -> None:
        speaker.say(kind, payload)
        wait(speaker)

    return lie


def wait(speaker: Speaker) -> None:
    """Says nothing more, until the other side closes."""
    with contextlib.suppress(EOFError, OSError):
        while speaker.hear(skip=()):
            pass


def stay_alive(speaker: Speaker) -> None:
    """Gives signs of life and nothing else."""
    while True:
        speaker.say(Type.HEARTBEAT)
        time.sleep(0.05)


def chatter(speaker: Speaker) -> None:
    """Signs of life as fast as it can."""
    while True:
        speaker.say(Type.HEARTBEAT)


def greeted(then: Lie) -> Lie:
    def lie(speaker: Speaker) -> None:
        greet(speaker)
        then(speaker)

    return lie


def all_taken(then: Lie) -> Lie:
    def lie(speaker: Speaker) -> None:
        take_all(speaker)
        then(speaker)

    return greeted(lie)


def say(*messages: tuple[Any, ...], then: Lie = wait) -> Lie:
    def lie(speaker: Speaker) -> None:
        for message in messages:
            speaker.say(*protocol.encode(message))
        then(speaker)

    return lie


def version_2(record: tuple[Any, ...]) -> Lie:
    kind, payload = protocol.encode(record)
    return message(kind, payload.replace(b'"version":1', b'"version":2'))


def endlessly(message: tuple[Any, ...]) -> Lie:
    def lie(speaker: Speaker) -> None:
        while True:
            speaker.say(*protocol.encode(message))

    return lie


def damaged(speaker: Speaker) -> None:
    data = bytearray(speaker.seal(*protocol.encode(Answer((), False))))
    data[20] ^= 1
    speaker.sock.sendall(data)
    wait(speaker)


RUNNING = Running("somewhere", 1)

RECEIVERS: dict[str, tuple[Lie, str]] = {
    "damaged answer": (damaged, "was changed on the way"),
    "answer of another version": (version_2(Answer((), False)), "version 2 of this record is newer"),
    "answer without a record": (message(Type.ANSWER), "message answer: is not JSON"),
    "garbage": (raw(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n" * 100), "too long for a message of type"),
    "random garbage": (raw(os.urandom(4096)), "link: "),
    "zeros": (raw(bytes(4096)), "is none"),
    "absurd length": (raw(struct.pack("<IIQ", Type.ANSWER, 0xFFFFFFFF, 0)), "4294967295 bytes are too long"),
    "a length just too long": (raw(struct.pack("<IIQ", Type.ANSWER, MAX_MESSAGE + 1, 0)), "1048577 bytes are too long"),
    "no answer, but alive": (stay_alive, "no answer within"),
    "silence": (wait, "no answer within|nothing came from the other side"),
    "hang-up": (lambda speaker: None, "the other side has closed the link"),
    "endless answers": (endlessly(Answer((), False)), "a message answer came where nothing was due"),
    "heartbeats without end": (chatter, "no answer within"),
    "ready at once": (say(Ready()), "a message ready came where answer was due"),
    "ready before the end": (greeted(say(Ready())), "a message ready came where nothing was due"),
    "synced too often": (greeted(say(Synced(), Synced())), "a message synced came where nothing was due"),
    "ready twice": (all_taken(say(Ready(), Ready())), "HandoverUnknown"),
    "never ready, but alive": (all_taken(stay_alive), "no ready within"),
    "never synced, but alive": (greeted(stay_alive), "no synced within"),
    "never ready": (all_taken(wait), "nothing came from the other side for"),
    "running without a commit": (all_taken(say(RUNNING)), "a message running came where ready was due"),
    "running at once": (greeted(say(RUNNING)), "a message running came where nothing was due"),
    "pages from the wrong side": (
        greeted(message(Type.PAGES, pages([(0, 1, True)]))),
        "pages were not expected",
    ),
    "unknown message": (greeted(message(99)), "of the unknown type 99 came"),
    "a cancel that drives terminals": (
        greeted(say(Cancel("\x1b[2J\r\n" + "x" * 1000))), r"gave the migration up: +\[2J  x{400,}\.\.\.$",
    ),
    "reasons without end": (say(Answer(("no",) * 50000, False)), "does not take this guest: no; no"),
    "commit comes, running does not, but alive": (
        all_taken(say(Ready(), then=stay_alive)), r"HandoverUnknown.*no running within",
    ),
    "running of nobody": (
        all_taken(say(Ready(), then=message(Type.RUNNING))), r"HandoverUnknown.*message running\.host: is cut short",
    ),
    "cancel after the commit": (
        all_taken(say(Ready(), Cancel("oh"))), r"GaveUp: the other side: gave the migration up: oh$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECEIVERS)
def test_a_receiver_that_lies(name: str) -> None:
    lie, words = RECEIVERS[name]
    ours, theirs = socket.socketpair()
    with running() as machine:
        thread = in_background(theirs, lie)
        with (
            Channel(ours.fileno(), ours.fileno(), "the other side", ours.close) as channel,
            pytest.raises(PyhvError) as caught,
        ):
            # What comes too early is found before the end of pre-copy, however quick that is.
            machine.depart(channel, limits=LIMITS, may_stop=lambda: name != "synced too often")
        thread.join(TIMEOUT)
        said = f"{type(caught.value).__name__}: {caught.value}"
        assert re.search(words, said), said
        assert said.isprintable() and len(said) < 300_000
        if isinstance(caught.value, pyhv.HandoverUnknown):
            assert not machine.vm.running and machine.handed_over
            machine.start(force=True)
        assert machine.vm.running
        wait_for_rounds(machine)
        machine.pause()
        check_console(machine.console())


def test_a_receiver_that_is_slow() -> None:
    """100 kB a second, but alive: pre-copy does not converge, and is given up in time."""

    def lie(speaker: Speaker) -> None:
        while True:
            time.sleep(0.1)
            if not speaker.sock.recv(10_000):
                return
            speaker.say(Type.HEARTBEAT)

    def greet(speaker: Speaker) -> None:
        greeted(lie)(speaker)

    ours, theirs = socket.socketpair()
    with running(memory="8M") as machine:
        machine.vm.memory.write(4 << 20, os.urandom(4 << 20))
        thread = in_background(theirs, greet)
        begin = time.monotonic()
        with (
            Channel(ours.fileno(), ours.fileno(), "the other side", ours.close) as channel,
            pytest.raises(pyhv.BadInput, match="writes its memory too fast to be migrated"),
        ):
            machine.depart(channel, limits=LIMITS._replace(downtime=0.05, timeout=0.5))
        assert time.monotonic() - begin < 10
        assert machine.vm.running
        wait_for_rounds(machine)
        thread.join(TIMEOUT)


@pytest.mark.parametrize(
    ("on_timeout", "words"), [("cancel", "writes its memory too fast to be migrated"), ("stop", "no ready within")]
)
def test_a_receiver_that_never_says_what_it_has_taken(on_timeout: str, words: str) -> None:
    ours, theirs = socket.socketpair()
    with running() as machine:
        thread = in_background(theirs, greeted(stay_alive))
        with (
            Channel(ours.fileno(), ours.fileno(), "the other side", ours.close) as channel,
            pytest.raises(PyhvError, match=words),
        ):
            machine.depart(channel, limits=LIMITS._replace(timeout=0.5, on_timeout=on_timeout))
        thread.join(TIMEOUT)
        assert machine.vm.running
        wait_for_rounds(machine)


def sip(speaker: Speaker) -> None:
    """Takes a byte now and then, and gives signs of life."""
    while speaker.sock.recv(1):
        speaker.say(Type.HEARTBEAT)
        time.sleep(0.01)


@pytest.mark.parametrize("kind", [Type.PAGES, Type.END], ids=lambda kind: kind.name.lower())
def test_a_receiver_that_trickles_while_the_guest_is_paused(kind: Type) -> None:
    """It has been quick until then. The guest goes on once it was paused for `overrun` times the downtime."""
    paused = threading.Event()

    def lie(speaker: Speaker) -> None:
        while (heard := speaker.hear().kind) != kind or not (kind == Type.END or paused.is_set()):
            if heard == Type.SYNC:
                paused.wait(TIMEOUT) if kind == Type.PAGES else None
                speaker.say(*protocol.encode(Synced()))
        (sip if kind == Type.PAGES else stay_alive)(speaker)

    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    with running(memory="8M") as machine:
        thread = in_background(theirs, greeted(lie))

        def progress(progress: Progress) -> None:
            if progress.round == 1 and not progress.left and not paused.is_set():
                machine.vm.memory.write(4 << 20, os.urandom(2 << 20))  # what is sent once it is paused
                paused.set()

        begin = time.monotonic()
        with (
            Channel(ours.fileno(), ours.fileno(), "the other side", ours.close) as channel,
            pytest.raises(pyhv.HostError, match="no ready within"),
        ):
            limits = LIMITS._replace(downtime=0.1, overrun=2.0, rounds=1, on_timeout="stop")
            machine.depart(channel, limits=limits, progress=progress)
        assert time.monotonic() - begin < TIMEOUT
        assert machine.vm.running and not machine.handed_over
        wait_for_rounds(machine)
        thread.join(TIMEOUT)


def test_a_receiver_that_trickles_in_pre_copy() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    with running(memory="8M") as machine:
        machine.vm.memory.write(4 << 20, os.urandom(4 << 20))
        thread = in_background(theirs, greeted(sip))
        with (
            Channel(ours.fileno(), ours.fileno(), "the other side", ours.close) as channel,
            pytest.raises(pyhv.HostError, match="no further progress within"),
        ):
            machine.depart(channel, limits=LIMITS)
        thread.join(TIMEOUT)
        wait_for_rounds(machine)


def test_a_receiver_that_says_too_late_what_it_has_taken() -> None:
    """When the guest stands already, for pre-copy's time was over: it is taken nevertheless."""

    def lie(speaker: Speaker) -> None:
        late = False
        while (kind := speaker.hear().kind) != Type.END:
            late |= kind == Type.SYNC
        assert late
        for message in (Synced(), Ready()):
            speaker.say(*protocol.encode(message))
        assert speaker.hear().kind == Type.COMMIT
        speaker.say(*protocol.encode(RUNNING))
        wait(speaker)

    ours, theirs = socket.socketpair()
    with running() as machine:
        thread = in_background(theirs, greeted(lie))
        with Channel(ours.fileno(), ours.fileno(), "the other side", ours.close) as channel:
            machine.depart(channel, limits=LIMITS._replace(timeout=0.3, on_timeout="stop"))
        thread.join(TIMEOUT)
        assert not machine.vm.running and machine.handed_over


def test_a_receiver_without_memory() -> None:
    with Migration(Wishes(machine={"append": "pages=64 every=1", "memory": "8G"})) as migration:
        soft, hard = resource.prlimit(migration.destination.pid, resource.RLIMIT_AS)
        resource.prlimit(migration.destination.pid, resource.RLIMIT_AS, (4 << 30, hard))
        migration.run()
        there, here = migration.outcome["destination"], migration.outcome["source"]
        assert there is not None and "Cannot allocate memory" in there["text"], there
        assert here is not None and here["runs"] and "Cannot allocate memory" in here["text"], here
        assert here["leaked"] == there["leaked"] == 0
        migration.source.tell("count")
        check_console(migration.console())
        assert isinstance(migration.source, Side) and soft


# -------------------------------------------------------------------------------------------------------- sources


@pytest.fixture(scope="module")
def recorded() -> list[Frame]:
    """What a source says in a migration that goes through."""
    with Migration() as migration:
        migration.run()
        frames = Splitter()(migration.proxy.bytes["source"])
    return [frame for frame in frames if frame.kind != Type.HEARTBEAT]


Messages = list[tuple[int, bytes]]


def arrive(sock: socket.socket, **options: Any) -> pyhv.Machine:
    channel = Channel(sock.fileno(), sock.fileno(), "the other side", sock.close)
    return pyhv.Machine.arrive(Destination(channel), **options)


def take(messages: Messages, then: Lie | None = None, **options: Any) -> PyhvError | None:
    """Says all this to a destination; what it made of it. None: it took the guest."""
    ours, theirs = socket.socketpair()

    def lie(speaker: Speaker) -> None:
        drain = threading.Thread(target=lambda: wait(speaker))
        drain.start()
        try:
            for kind, payload in messages:
                speaker.say(kind, payload)
            if then is not None:
                then(speaker)
        finally:
            with contextlib.suppress(OSError):
                speaker.sock.shutdown(socket.SHUT_WR)
            drain.join()

    thread = in_background(theirs, lie)
    try:
        arrive(ours, **options).close()
        return None
    except PyhvError as error:
        return error
    finally:
        thread.join(TIMEOUT)


def hello_with(**fields: Any) -> Callable[[Messages], Messages]:
    """Changes the hello's fields; machine_memory and the like those of its machine."""

    def change(messages: Messages) -> Messages:
        value = json.loads(messages[0][1])
        for name, content in fields.items():
            part = value["fields"]
            if name.startswith("machine_"):
                part, name = part["machine"], name.removeprefix("machine_")
            part[name] = content(part[name]) if callable(content) else content
        return [(messages[0][0], json.dumps(value).encode()), *messages[1:]]

    return change


def other_vendor(tables: Any) -> Any:
    """Leaf 0's EBX, ECX, EDX of a processor of somebody else's."""
    ebx, edx, ecx = struct.unpack("<3I", b"CyrixInstead")
    return [[[*e[:4], ebx, ecx, edx] if e[0] in (0, 0x80000000) and e[4] else e for e in table] for table in tables]


def vcpu_with(**fields: Any) -> Callable[[Messages], Messages]:
    """These fields of the vCPU's state, or what a function makes of them."""

    def change(messages: Messages) -> Messages:
        changed = []
        for kind, payload in messages:
            if kind == Type.VCPU:
                state = protocol.decode(Vcpu, payload).state
                for name, value in fields.items():
                    now = value(getattr(state, name)) if callable(value) else value
                    state = state._replace(**{name: now})
                kind, payload = protocol.encode(Vcpu(state))
            changed.append((kind, payload))
        return changed

    return change


def insert(before: Type, *extra: tuple[int, bytes]) -> Callable[[Messages], Messages]:
    def change(messages: Messages) -> Messages:
        place = next(i for i, (kind, _) in enumerate(messages) if kind == before)
        return [*messages[:place], *extra, *messages[place:]]

    return change


def without(what: Type) -> Callable[[Messages], Messages]:
    return lambda messages: [message for message in messages if message[0] != what]


def repeat(what: Type, times: int) -> Callable[[Messages], Messages]:
    """The first of these messages comes so often."""

    def change(messages: Messages) -> Messages:
        place = next(i for i, (kind, _) in enumerate(messages) if kind == what)
        return [*messages[:place], *[messages[place]] * (times - 1), *messages[place:]]

    return change


def end_with(**fields: Callable[[Any], Any]) -> Callable[[Messages], Messages]:
    def change(messages: Messages) -> Messages:
        changed = []
        for kind, payload in messages:
            if kind == Type.END:
                end = protocol.decode(End, payload)
                end = end._replace(**{name: field(getattr(end, name)) for name, field in fields.items()})
                kind, payload = protocol.encode(end)
            changed.append((kind, payload))
        return changed

    return change


PAGE = pages([(0, 1, False)], bytes(4096))
CHANGED = (Type.PAGES, PAGE[:-1] + b"x")  # after it was summed


def changed_page(*then: tuple[int, bytes], zeros: int = 0) -> Callable[[Messages], Messages]:
    """A page whose content is not what was summed comes, and after it these messages with it, so many as zeros."""
    counted = end_with(pages=lambda n: n + 1 + len(then) - zeros, zero_pages=lambda n: n + zeros)
    return lambda messages: counted(insert(Type.VCPU, CHANGED, *then)(messages))


SOURCES: dict[str, tuple[Callable[[Messages], Messages], str]] = {
    "hello of another version": (
        lambda m: [(m[0][0], m[0][1].replace(b'"version":5}', b'"version":9}')), *m[1:]], "version 9 of this record",
    ),
    "hello of another vendor": (hello_with(tables=other_vendor), "vendor"),
    "tables that make no sense": (hello_with(tables=lambda t: [[[1, 0, 0, 0, 0, 0, 0]]]), ""),
    "no tables": (hello_with(tables=[]), "must be 1 to 254 long"),
    "more vCPUs than there may be": (hello_with(tables=lambda t: t * 255), "must be 1 to 254 long"),
    "16 TiB": (hello_with(machine_memory=16 << 40), ""),
    "more than that": (hello_with(machine_memory=1 << 63), "is too much; the most is 16T"),
    "1 byte": (hello_with(machine_memory=1), "is too small"),
    "half a page": (hello_with(machine_memory=(4 << 20) + 2048), "is not a multiple of 4096"),
    "negative": (hello_with(machine_memory=-1), "must be a number of 64 bits"),
    "devices that do not exist": (hello_with(devices=lambda d: [*d, "gpu"]), "gpu"),
    "devices that are missing": (hello_with(devices=[]), ""),
    "no heartbeat": (hello_with(heartbeat=0), "has the time limits"),
    "an endless silence": (hello_with(silence=4_000_000_000), "has the time limits"),
    "MSRs that nobody has": (hello_with(msrs=[1, 2, 0x12345678]), "MSR"),
    "pages at once": (lambda m: [(Type.PAGES, PAGE), *m], "pages were not expected"),
    "hello twice": (lambda m: [m[0], *m], "a message hello came where end was due"),
    "no hello": (lambda m: without(Type.PAGES)(m[1:]), "came where hello was due"),
    "pages beyond the RAM": (insert(Type.VCPU, (Type.PAGES, pages([(1 << 39, 1, True)]))), "of 768"),
    "one page beyond the RAM": (insert(Type.VCPU, (Type.PAGES, pages([(767, 2, True)]))), "of 768"),
    "no runs": (insert(Type.VCPU, (Type.PAGES, pages([]))), "with 0 runs"),
    "runs that do not ascend": (insert(Type.VCPU, (Type.PAGES, pages([(5, 1, True), (5, 1, True)]))), "after page 6"),
    "fewer sums than pages": (insert(Type.VCPU, (Type.PAGES, pages([(5, 2, False)], bytes(4096)))), "of 2 pages"),
    "more sums than pages": (insert(Type.VCPU, (Type.PAGES, pages([(5, 1, False)], bytes(8192)))), "of 1 pages"),
    "other content than was summed": (changed_page(), "page 0 was changed on the way, and did not come again"),
    "other content twice": (changed_page(CHANGED), "page 0 was changed on the way, and did not come again"),
    "other content after the right one": (changed_page((Type.PAGES, PAGE), CHANGED), "page 0 was changed on the way"),
    "messages instead of content": (  # and then the middle of one instead of a message
        insert(Type.VCPU, (Type.PAGES, PAGE[:-4096]), (Type.VCPU, b"[" * 100000)), "too long for a message of type",
    ),
    "no content": (lambda m: [m[0], (Type.PAGES, PAGE[:-4096])], "has closed the link within a message"),
    "pages that are no zstd": (insert(Type.VCPU, (Type.PAGES_ZSTD, os.urandom(500))), "zstd|compressed"),
    "a page more than was counted": (insert(Type.END, (Type.PAGES, PAGE)), "pages, .* were sent, .* came"),
    "pages of zeros that did not come": (end_with(zero_pages=lambda n: n + 1), "were sent, .* came"),
    "vCPUs that did not come": (end_with(vcpus=lambda n: n + 1), "were sent, .* came"),
    "a sync after the guest's memory": (insert(Type.END, protocol.encode(Sync(True))), "sync came where end was due"),
    "a sync with a payload": (insert(Type.VCPU, (Type.SYNC, b"\1x")), "message sync: has 1 bytes too many"),
    "no vCPUs": (lambda m: end_with(vcpus=lambda n: 0)(without(Type.VCPU)(m)), "came after 0 vCPUs of 1"),
    "a vCPU more than announced": (
        lambda m: end_with(vcpus=lambda n: n + 1)(repeat(Type.VCPU, 2)(m)), "once more than the 1 times that message",
    ),
    "300 vCPUs": (repeat(Type.VCPU, 300), "comes once more than the 1 times that message hello announced"),
    "30 of one device": (end_with(devices=lambda d: d[:1] * 30), "has two states of one device"),
    "a device that is not announced": (
        end_with(devices=lambda d: (d[0]._replace(name="gpu"), *d[1:])), "the state has .*gpu",
    ),
    "a vCPU of nothing": (insert(Type.VCPU, (Type.VCPU, b"")), "message vcpu.state.regs: is cut short"),
    "a vCPU of garbage": (insert(Type.VCPU, (Type.VCPU, b"[" * 100000)), "message vcpu.state.regs: is cut short"),
    "registers cut short": (vcpu_with(regs=lambda b: b[:-1]), "no VM can have: struct pyhv_regs has not 143 bytes"),
    "segments too long": (vcpu_with(sregs=lambda b: b + b"x"), "no VM can have: struct pyhv_sregs has not"),
    "no events": (vcpu_with(events=b""), "no VM can have: struct pyhv_events has not 0 bytes"),
    "half of DR7": (vcpu_with(debugregs=bytes(44)), "no VM can have: struct pyhv_debugregs has not 44 bytes"),
    "half an MSR": (vcpu_with(msr_indices=lambda b: b[:-2]), "no VM can have: .* are no MSRs"),
    "an MSR without value": (vcpu_with(msr_values=lambda b: b[:-8]), "no VM can have: .* are no MSRs"),
    "80000 MSRs": (vcpu_with(msr_indices=b"x" * 320000, msr_values=b"x" * 640000), "80000 MSRs, at most 512"),
    "an MSR that is none": (vcpu_with(msr_indices=lambda b: b"\x78\x56\x34\x12" + b[4:]), "0x12345678"),
    "half a LAPIC": (vcpu_with(lapic=bytes(512)), "a LAPIC of 512 bytes, not 1024"),
    "an endless XSAVE area": (vcpu_with(xsave=bytes(100000)), "100000 bytes"),
    "no XSAVE area but a tail": (vcpu_with(xsave=bytes(5000) + b"x"), ""),
    "XCR0 of nothing": (vcpu_with(xcr0=0), ""),
    "a vCPU that is in no state": (vcpu_with(mp_state=77), ""),
    "one beyond 32 bits": (vcpu_with(mp_state=1 << 33), "no VM can have"),
    "half an irqchip": (end_with(irqchip=lambda b: b[:-1]), "no VM can have: struct pyhv_irqchip has not"),
    "no irqchip": (end_with(irqchip=lambda b: b""), "other interrupt controllers"),
    "a PIT that is not announced": (end_with(pit=lambda b: not b), "it has other .* timers than the VM"),
    "commit before the end": (insert(Type.VCPU, protocol.encode(protocol.Commit())), "commit came where end was due"),
    "end twice": (insert(Type.COMMIT, (Type.END, b"")), "a message end came where commit was due"),
    "running from the source": (insert(Type.COMMIT, protocol.encode(RUNNING)), "a message running came where commit"),
    "an unknown message": (insert(Type.VCPU, (99, b"")), "a message of the unknown type 99 came where end was due"),
    "a heartbeat with a payload": (insert(Type.VCPU, (Type.HEARTBEAT, b"x")), "too long for a message of type 1"),
    "no commit": (without(Type.COMMIT), "the other side has closed the link"),
    "nothing": (lambda m: [], "the other side has closed the link"),
    "a cancel that drives terminals": (
        insert(Type.COMMIT, protocol.encode(Cancel("\x1b[2J" + "x" * 1000))),
        r"gave the migration up:  \[2Jx{400,}\.\.\.$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_lies(recorded: list[Frame], name: str) -> None:
    change, words = SOURCES[name]
    error = take(change([(frame.kind, frame.payload) for frame in recorded]))
    if words:
        assert error is not None and re.search(words, str(error)), error
    assert error is None or (str(error).isprintable() and len(str(error)) < 5000)


def test_what_was_recorded_is_taken(recorded: list[Frame]) -> None:
    """The lies above are lies only because of what they change."""
    assert take([(frame.kind, frame.payload) for frame in recorded]) is None


@pytest.mark.parametrize("zeros", [False, True], ids=["right", "as zeros"])
def test_a_page_that_was_changed_and_comes_again(recorded: list[Frame], zeros: bool) -> None:
    again = (Type.PAGES, pages([(0, 1, True)]) if zeros else PAGE)
    messages = [(frame.kind, frame.payload) for frame in recorded]
    assert take(changed_page(again, zeros=zeros)(messages)) is None


def test_last_words_of_a_source_that_is_gone(recorded: list[Frame]) -> None:
    """They lie there unread when the next word to it fails."""
    ours, theirs = socket.socketpair()
    with theirs:
        speaker = Speaker(theirs)
        speaker.say(recorded[0].kind, recorded[0].payload)
        speaker.say(*protocol.encode(Cancel("the user: has changed his mind")))
    with pytest.raises(pyhv.GaveUp, match="the source: gave the migration up: the user: has changed his mind"):
        arrive(ours)


def test_a_guest_that_comes_where_its_owner_fails(recorded: list[Frame]) -> None:
    """It runs here nevertheless; the link is closed and garbage is collected again."""
    ours, theirs = socket.socketpair()

    def lie(speaker: Speaker) -> None:
        for frame in recorded:
            speaker.say(frame.kind, frame.payload)
        wait(speaker)

    def fail() -> None:
        raise ZeroDivisionError

    thread = in_background(theirs, lie)
    with arrive(ours) as machine:
        assert not gc.isenabled()
        machine.on_arrival = fail
        with pytest.raises(ZeroDivisionError):
            machine.start()
        assert gc.isenabled() and ours.fileno() < 0 and machine.vm.running
    thread.join(TIMEOUT)


STOPS = {
    "hello": "hello did not come",
    "answer": "the next message did not come",
    "pages": "the next message did not come",
    "vcpu": "the rest of the state did not come",
    "end": "commit did not come",
}


@pytest.mark.parametrize("after", STOPS)
def test_a_source_that_says_nothing_but_is_alive(recorded: list[Frame], after: str) -> None:
    messages = [(frame.kind, frame.payload) for frame in recorded]
    first = next(i for i, (kind, _) in enumerate(messages) if kind == Type.VCPU)
    end = {"hello": 0, "answer": 1, "pages": 2, "vcpu": first + 1, "end": len(messages) - 1}[after]
    error = take(messages[:end], then=stay_alive)
    assert error is not None and STOPS[after] in str(error), error


def test_a_source_that_asks_for_endless_patience(recorded: list[Frame], monkeypatch: pytest.MonkeyPatch) -> None:
    """The silence that it names is for both sides, within what the destination has of it."""
    monkeypatch.setattr(waits, "MOST_SILENCE", 0.3)
    messages = hello_with(silence=3_600_000)([(frame.kind, frame.payload) for frame in recorded])
    assert "the next message did not come within" in str(take(messages[:1], then=stay_alive))
    error = take(messages[:1], then=lambda speaker: time.sleep(1.5))
    assert "nothing came from the other side for" in str(error)


def test_a_vm_that_came_and_is_ended_before_it_ran_goes_on_at_its_source() -> None:
    with running() as machine:
        ours, theirs = socket.socketpair()

        def take() -> None:
            channel = Channel(theirs.fileno(), theirs.fileno(), "the source", theirs.close)
            pyhv.Machine.arrive(Destination(channel)).close()  # without a start()

        thread = threading.Thread(target=take)
        thread.start()
        with (
            Channel(ours.fileno(), ours.fileno(), "the other side", ours.close) as channel,
            pytest.raises(pyhv.GaveUp, match="gave the migration up: it was ended before it ran"),
        ):
            machine.depart(channel, limits=LIMITS)
        thread.join(TIMEOUT)
        assert machine.vm.running and not machine.handed_over
        wait_for_rounds(machine)


def test_the_rest_of_the_memory_may_take_long(recorded: list[Frame], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does with --on-timeout stop: longer than a source that has the guest's state to send may take."""
    monkeypatch.setattr(waits, "MEMORY", waits.MEMORY._replace(least=TIMEOUT))
    messages = [(frame.kind, frame.payload) for frame in recorded]
    paused = next(i for i, (kind, _) in enumerate(messages) if kind == Type.SYNC) + 1

    def more(speaker: Speaker) -> None:
        end = time.monotonic() + LIMITS.silence * (PATIENCE + 1)
        while time.monotonic() < end:
            speaker.say(Type.HEARTBEAT)
            time.sleep(0.05)
        for kind, payload in messages[paused:]:
            speaker.say(kind, payload)

    assert take(messages[:paused], then=more) is None


def test_pages_without_end(recorded: list[Frame]) -> None:
    """Whoever waits may give up, and no memory is taken beyond the guest's."""
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def more(speaker: Speaker) -> None:
        for number in itertools.count():
            speaker.say(Type.PAGES, pages([(number % 768, 1, False)], bytes(4096)))

    def while_waiting() -> None:
        if time.monotonic() > begin + 0.5:
            raise pyhv.BadInput("the user", "has enough")

    error = take([(recorded[0].kind, recorded[0].payload)], then=more, while_waiting=while_waiting)
    assert str(error) == "the user: has enough"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (64 << 10)


def test_a_damaged_byte_is_noticed_wherever_it_is(recorded: list[Frame]) -> None:
    ours, theirs = socket.socketpair()
    stream = bytearray(b"".join(frame.raw for frame in recorded))
    stream[len(stream) * 2 // 3] ^= 1
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    thread = in_background(theirs, raw(bytes(stream)))
    with pytest.raises(PyhvError, match=r"was changed on the way|too long|is none"):
        arrive(ours)
    thread.join(TIMEOUT)


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, float, float, int]]:
    kinds = st.sampled_from(["byte", "bytes", "cut", "grow", "drop", "twice", "swap", "kind", "number"])
    part = st.floats(0, 1, exclude_max=True)
    return draw(st.lists(st.tuples(kinds, part, part, st.integers(0, 2**64 - 1)), min_size=1, max_size=4))


def mutate(messages: Messages, changes: list[tuple[str, float, float, int]]) -> Messages:
    messages = list(messages)
    for what, where, place, value in changes:
        if not messages:
            break
        index = int(where * len(messages))
        kind, payload = messages[index]
        at = int(place * len(payload))
        match what:
            case "byte":
                payload = payload[:at] + bytes([value & 0xFF]) + payload[at + 1 :]
            case "bytes":
                payload = payload[:at] + struct.pack("<Q", value) + payload[at + 8 :]
            case "cut":
                payload = payload[:at]
            case "grow":
                payload = payload[:at] + payload[: value % 5000] + payload[at:]
            case "kind":
                kind = 1 + value % 25
            case "number":  # where it is JSON: what is checked is not only how it is written
                numbers = [m.span() for m in re.finditer(rb"-?\d+", payload)]
                if numbers:
                    begin, end = numbers[int(place * len(numbers))]
                    payload = payload[:begin] + str(value >> value % 64).encode() + payload[end:]
        messages[index] = (kind, payload)
        if what == "drop":
            messages.pop(index)
        elif what == "twice":
            messages.insert(index, messages[index])
        elif what == "swap":
            other = int(place * len(messages))
            messages[index], messages[other] = messages[other], messages[index]
    return messages


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=mutations())
def test_mutated_streams(recorded: list[Frame], changes: list[tuple[str, float, float, int]]) -> None:
    """With the right sums, so that they get past these: refused with a word, or a guest like any other."""
    error = take(mutate([(frame.kind, frame.payload) for frame in recorded], changes))
    assert error is None or str(error)
    assert len(codec.encode(Cancel(protocol.reason_of(error or pyhv.BadInput("a", "b"))))) < 2000


def test_the_fuzzer_gets_past_the_sums(recorded: list[Frame]) -> None:
    seal, before = Sealer(), 0
    for frame in recorded:
        data = seal(frame.kind, frame.payload)
        own = frame.payload[: struct.unpack_from("<I", data, 4)[0]]
        assert data[8:16] == struct.pack("<Q", before := sum_of(data[:8], own, before))


@pytest.mark.parametrize("taken", [0, 2**63], ids=["1970", "2262"])
def test_the_clock_of_a_source_that_lives_in_another_time(recorded: list[Frame], taken: int) -> None:
    """The guest's clock goes on by no more than the time that the two sides have talked."""
    messages = end_with(taken=lambda t: taken)([(frame.kind, frame.payload) for frame in recorded])
    before = protocol.decode(End, next(data for kind, data in messages if kind == Type.END)).clock
    ours, theirs = socket.socketpair()

    def lie(speaker: Speaker) -> None:
        for kind, payload in messages:
            speaker.say(kind, payload)
        wait(speaker)

    thread = in_background(theirs, lie)
    with arrive(ours) as machine:
        assert before <= machine.vm.capture().clock < before + int(TIMEOUT * 1e9)
    thread.join(TIMEOUT)

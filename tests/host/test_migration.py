"""Live migration on this machine's KVM: a guest that was moved goes on as if it had not been."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import pyhv
from pyhv._native.link import PAGE_SIZE, PageSet, open_zstd
from pyhv.accel import choose
from pyhv.accel.kvm import Kvm
from pyhv.cpu.host import HostDescription, Verdict
from pyhv.errors import PyhvError
from pyhv.migration.destination import Destination
from pyhv.migration.source import Limits, Progress, Source, Stage, Summary
from pyhv.migration.transport import Channel
from pyhv.vm import memory

from .migration import APPEND, MEMORY, TIMEOUT, check_console, descriptors, stamp, wait_for_rounds
from .test_snapshot_state import TSC, differences

TICKER: dict[str, Any] = {"append": APPEND, "memory": MEMORY}
# One that always suffices. In the lab's slow hosts a look at both sides takes longer than a silence usually is.
LIMITS = Limits(downtime=10.0, rounds=1, silence=10.0)
Look = Callable[[pyhv.Machine, pyhv.Machine], None]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    choose.open_accelerator().prepare()  # what is kept open is open now
    gc.collect()  # what the test before has left in errors that it caught is closed
    before, threads = descriptors(), threading.active_count()
    yield
    choose.open_accelerator().prepare()
    deadline = time.monotonic() + TIMEOUT
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.001)  # those of a slow link end after it
    assert (descriptors(), threading.active_count()) == (before, threads)


class Failed(NamedTuple):
    """A migration that did not go through."""

    there: PyhvError
    here: PyhvError


class Hop(NamedTuple):
    """One that did."""

    machine: pyhv.Machine
    summary: Summary


def try_hop(
    machine: pyhv.Machine,
    limits: Limits = LIMITS,
    look: Look | None = None,
    arrive: Any = None,
    link: Callable[[], tuple[socket.socket, socket.socket]] | None = None,
    **depart: Any,
) -> Hop | Failed:
    """Migrates a running machine to another one in this process. look: is called when the guest stands on both sides,
    the one before it runs."""
    ours, theirs = socket.socketpair() if link is None else link()
    found: list[pyhv.Machine | BaseException] = []

    def take() -> None:
        try:
            channel = Channel(theirs.fileno(), theirs.fileno(), "the source", theirs.close)
            there = pyhv.Machine.arrive(Destination(channel), **(arrive or {}))
            found.append(there)
            if look is not None:
                look(machine, there)
            there.start()
        except BaseException as error:
            found.append(error)
            if len(found) == 2:  # an assertion of look(), say: it has no guest
                found.pop(0).close()  # type: ignore[union-attr]

    thread = threading.Thread(target=take, name="arrive")
    thread.start()
    outcome: Summary | PyhvError
    try:
        with Channel(ours.fileno(), ours.fileno(), "the destination", ours.close) as channel:
            outcome = machine.depart(channel, limits=limits, **depart)
    except PyhvError as error:
        outcome = error
    thread.join(TIMEOUT)
    there = found[0]
    if isinstance(there, AssertionError):
        raise there
    if isinstance(outcome, Summary):
        assert isinstance(there, pyhv.Machine)
        return Hop(there, outcome)
    assert isinstance(there, PyhvError), (there, outcome)
    return Failed(there, outcome)


def hop(machine: pyhv.Machine, **options: Any) -> Hop:
    done = try_hop(machine, **options)
    assert isinstance(done, Hop), done
    return done


@contextlib.contextmanager
def running(image: str = "ticker", **options: Any) -> Iterator[pyhv.Machine]:
    options = {**(TICKER if image == "ticker" else {}), **options}
    with pyhv.Machine(image, **options) as machine:
        machine.start()
        if image == "ticker":
            wait_for_rounds(machine)
        yield machine


def check_equal(here: pyhv.Machine, there: pyhv.Machine) -> None:
    """All of the memory, and all of the state but the clocks, which run on."""
    assert there.vm.memory.size == here.vm.memory.size and not here.vm.running and not there.vm.running
    touched = PageSet(here.vm.memory.size)  # the guest stands meanwhile, for no longer than a silence
    touched.add_content(here.vm.memory.ram)
    touched.add_content(there.vm.memory.ram)
    for page in range(touched.pages):
        if touched.words[page // 64] >> page % 64 & 1:
            place = page * PAGE_SIZE
            assert here.vm.memory.ram.read(place, PAGE_SIZE) == there.vm.memory.ram.read(place, PAGE_SIZE), hex(place)
    assert list(differences(here.vm.capture(), there.vm.capture())) == []
    devices, devices_there = here.vm.devices.save(), there.vm.devices.save()
    assert devices.pop("cmos")[:1] == devices_there.pop("cmos")[:1]
    assert devices == devices_there
    assert (here.uuid, here.command_line, here.guest.profile) == (there.uuid, there.command_line, there.guest.profile)


def wait_for(machine: pyhv.Machine, text: bytes) -> None:
    deadline = time.monotonic() + TIMEOUT
    while text not in machine.console():
        assert time.monotonic() < deadline, machine.console()
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------- it goes on


@pytest.mark.parametrize("options", [{}, {"compat": True}, {"cpus": 4}, {"memory": "40M"}], ids=str)
def test_a_migrated_guest_goes_on(options: dict[str, Any]) -> None:
    with running(**options) as machine:
        there, summary = hop(machine, look=check_equal)
        with there:
            wait_for_rounds(there, 3)
            assert not machine.vm.running and machine.handed_over == "the destination"
            there.pause()
            assert there.vm.stopped is None
            assert check_console(machine.console() + there.console()) >= 5
        assert summary.rounds >= 1 and summary.one_clock
        assert 0 < summary.downtime < summary.total_time < TIMEOUT
        assert summary.pages >= 64 and summary.bytes > summary.pages * 4096


def test_a_difference_would_be_seen() -> None:
    """The comparison above."""

    def look(here: pyhv.Machine, there: pyhv.Machine) -> None:
        there.vm.memory.write(0x1000, bytes([there.vm.memory.read(0x1000, 1)[0] ^ 1]))
        check_equal(here, there)

    with running() as machine, pytest.raises(AssertionError, match="0x1000"):
        hop(machine, look=look)


def test_the_guest_itself_notices_a_stale_page() -> None:
    def look(here: pyhv.Machine, there: pyhv.Machine) -> None:
        there.vm.memory.write(0x200000, bytes(4096))

    with running() as machine, hop(machine, look=look).machine as there:
        assert there.vm.wait(TIMEOUT) is not None
        assert b"ticker: page 0x0000000000200000 holds 0, expected" in there.console()


def test_memory_on_both_sides_of_the_hole_below_4_gib() -> None:
    places = {place: os.urandom(4096) for place in (0x300000, (3 << 30) - 4096, 4 << 30, (5 << 30) - 4096)}

    def look(here: pyhv.Machine, there: pyhv.Machine) -> None:
        for place, content in places.items():
            assert there.vm.memory.read(place, 4096) == content

    with running(memory="4G", overcommit=True) as machine:
        for place, content in places.items():
            machine.vm.memory.write(place, content)
        there, summary = hop(machine, look=look, arrive={"overcommit": True})
        there.close()
        assert summary.bytes < 64 << 20  # memory that was never touched is not sent


def test_a_page_that_becomes_zeros_again_is_zeros_there() -> None:
    with running() as machine:
        machine.vm.memory.write(0x1F0000, b"x" * 4096)
        cleared = []

        def progress(progress: Progress) -> None:
            if progress.round == 1 and not progress.left and not cleared:
                cleared.append(True)
                machine.vm.memory.write(0x1F0000, bytes(4096))

        there, summary = hop(machine, look=check_equal, progress=progress)
        there.close()
        assert cleared and summary.zero_pages >= 1


def test_a_restored_vm_is_migrated(tmp_path: Path) -> None:
    """Its memory is a private mapping of the file; that of the other side is not."""
    path = str(tmp_path / "s.pyhv")
    with running() as machine:
        machine.pause()
        machine.save(path)
        before = machine.console()
    with pyhv.Machine.restore(path) as machine:
        machine.start()
        wait_for_rounds(machine)
        with hop(machine, look=check_equal).machine as there:
            os.unlink(path)
            wait_for_rounds(there)
            there.pause()
            check_console(before + machine.console() + there.console())


def test_there_and_back_again() -> None:
    """A to B to C to A, a few times: what has come goes again, and can be saved on the way."""
    with contextlib.ExitStack() as machines:
        here = machines.enter_context(running())
        console = b""
        for _ in range(9):
            there = machines.enter_context(hop(here, look=check_equal).machine)
            wait_for_rounds(there)
            console += here.console()
            here.close()
            here = there
        here.pause()
        assert check_console(console + here.console()) > 18


@pytest.mark.parametrize("mode", ["", "deadline"])
def test_an_armed_timer_fires_there(mode: str) -> None:
    with running("timer", append=f"ms=700 {mode}", memory="2M") as machine:
        deadline = time.monotonic() + TIMEOUT
        while machine.vm.stopped is None and b"armed" not in machine.console():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if machine.vm.stopped is not None:
            pytest.skip(machine.console().decode().strip())
        with hop(machine).machine as there:
            assert there.vm.wait(TIMEOUT) is not None
            there.pause()
            assert machine.console() + there.console() == b"timer: armed\ntimer: fired\n"


def test_what_is_typed_goes_to_where_the_guest_is() -> None:
    here, keys_here = os.pipe()
    there_in, keys_there = os.pipe()
    try:
        with running("faults", append="echo", memory="2M", console_in=here) as machine:
            os.write(keys_here, b"one")
            wait_for(machine, b"one")
            with hop(machine, arrive={"console_in": there_in}).machine as there:
                os.write(keys_here, b"lost")
                os.write(keys_there, b"two")
                wait_for(there, b"two")
                assert b"lost" not in machine.console() + there.console()
    finally:
        for fd in (here, keys_here, there_in, keys_there):
            os.close(fd)


def test_the_clocks_are_where_they_would_have_been(verdict: Verdict) -> None:
    """Both are read while the guest stands on both sides; the source's clocks have run on meanwhile."""
    behind: list[tuple[float, float]] = []

    def look(here: pyhv.Machine, there: pyhv.Machine) -> None:
        time.sleep(0.05)
        first, second, again = here.vm.capture(), there.vm.capture(), here.vm.capture()
        clock = (first.clock + again.clock) / 2 - second.clock
        tsc = (first.vcpus[0].msrs[TSC] + again.vcpus[0].msrs[TSC]) / 2 - second.vcpus[0].msrs[TSC]
        behind.append((clock / 1e6, tsc / first.tsc_khz))

    with contextlib.ExitStack() as machines:
        here = machines.enter_context(running())
        for _ in range(5):
            here = machines.enter_context(hop(here, look=look).machine)
            wait_for_rounds(here)  # who ends when the TSC has gone back
    print("behind by ms (kvmclock, TSC):", behind)
    # Both sides are the same host here. What is allowed is what the machine's other work may take.
    assert all(abs(clock) < 200 and abs(tsc) < 200 for clock, tsc in behind), behind
    assert min(abs(clock) for clock, _ in behind) < 20, behind


# ---------------------------------------------------------------------------------------------------- the limits


def test_compressed(tmp_path: Path) -> None:
    with contextlib.suppress(PyhvError), running() as machine:
        open_zstd()
        there, plain = hop(machine)
        with there:
            compressed = hop(there, limits=LIMITS._replace(compress=True), look=check_equal)
            with compressed.machine as last:
                wait_for_rounds(last)
            assert compressed.summary.bytes < plain.bytes / 4
        return
    pytest.skip("there is no libzstd here")


def test_a_side_without_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pyhv.HostError("libzstd", 0, "cannot open it")

    monkeypatch.setattr("pyhv.migration.destination.open_zstd", missing)
    with running() as machine:
        failed = try_hop(machine, limits=LIMITS._replace(compress=True))
        assert isinstance(failed, Failed)
        assert "has no zstd library; install libzstd there, or migrate without compression" in str(failed.here)
        assert "the source: gave the migration up: the destination: has no zstd library" in str(failed.there)
        assert machine.vm.running
        wait_for_rounds(machine)


def test_the_bandwidth_is_kept() -> None:
    content = os.urandom(4 << 20)
    with running(memory="8M") as machine:
        machine.vm.memory.write(4 << 20, content)
        there, summary = hop(machine, limits=LIMITS._replace(bandwidth=8e6))
        there.close()
        assert summary.total_time > len(content) / 8e6 * 0.9
        there.close()


def test_what_was_written_while_the_guest_may_not_stop_comes_in_a_round() -> None:
    """may_stop is asked where its answer counts, and nowhere else: "not yet" has another round after it."""
    answers = iter([False, True, True])
    with running() as machine:
        there, summary = hop(machine, limits=LIMITS._replace(downtime=10.0), may_stop=lambda: next(answers))
        there.close()
        assert summary.rounds == 2


def slow_link(rate: float = 8e6) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection that carries `rate` bytes a second, in small pieces, and ends when both ends do."""
    ours, near = socket.socketpair()
    far, theirs = socket.socketpair()
    for sock in (ours, near, far, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)

    def carry(into: socket.socket, out: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := into.recv(int(rate / 100)):
                out.sendall(data)
                time.sleep(len(data) / rate)
        with contextlib.suppress(OSError):
            out.shutdown(socket.SHUT_WR)

    def run() -> None:
        back = threading.Thread(target=carry, args=(far, near))
        back.start()
        carry(near, far)
        back.join()
        near.close()
        far.close()

    threading.Thread(target=run).start()
    return ours, theirs


def test_the_downtime_that_is_expected_is_not_shorter_than_the_bandwidth_allows() -> None:
    """What is sent in small portions is swallowed by the link's buffers at a rate that is none."""
    with running(append="pages=512 every=1", memory="5M") as machine:
        failed = try_hop(machine, limits=LIMITS._replace(downtime=0.05, bandwidth=4e6, rounds=2))
        assert isinstance(failed, Failed) and "writes its memory too fast" in str(failed.here)


@pytest.mark.parametrize("limit", [{"rounds": 3}, {"timeout": 0.3}], ids=str)
def test_a_guest_that_writes_faster_than_the_link(limit: dict[str, Any]) -> None:
    heavy = {"append": "pages=512 every=1", "memory": "5M"}
    slow = LIMITS._replace(downtime=0.005, **{"rounds": 30, **limit})
    with running(**heavy) as machine:
        failed = try_hop(machine, limits=slow, link=slow_link)
        assert isinstance(failed, Failed)
        assert "writes its memory too fast to be migrated" in str(failed.here)
        assert 'allow a longer downtime, or choose "stop" as on_timeout' in str(failed.here)
        assert "the source: gave the migration up: the guest: writes its memory too fast" in str(failed.there)
        assert machine.vm.running
        wait_for_rounds(machine)
        there, summary = hop(machine, limits=slow._replace(on_timeout="stop"), look=check_equal, link=slow_link)
        with there:
            wait_for_rounds(there)
            there.pause()
            check_console(machine.console() + there.console())
        if "rounds" in limit:
            assert summary.rounds == 3


def test_what_the_guest_writes_until_all_is_taken_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(append="pages=512 every=1", memory="5M") as machine:
        take, begin = machine.vm.take_dirty, time.monotonic()
        # As if the guest had not had a processor while the buffers swallowed the first round, which take 0.25 s for it.
        monkeypatch.setattr(machine.vm, "take_dirty", lambda pages: time.monotonic() > begin + 0.2 and take(pages))
        failed = try_hop(machine, limits=LIMITS._replace(downtime=0.005, rounds=30, timeout=0.5), link=slow_link)
        assert isinstance(failed, Failed) and "writes its memory too fast" in str(failed.here)


def seem_to_write(machine: pyhv.Machine, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the guest wrote so many pages more in round 1, which has 6 MiB."""
    machine.vm.memory.write(4 << 20, os.urandom(6 << 20))
    written, take = [range(1024, 1024 + pages)], machine.vm.take_dirty

    def take_dirty(found: PageSet) -> None:
        take(found)
        if written:
            found.update(written.pop())

    monkeypatch.setattr(machine.vm, "take_dirty", take_dirty)


@pytest.mark.parametrize(("pages", "halved"), [(256, True), (1400, False)])
def test_after_a_round_that_halved_what_is_left_comes_another(
    monkeypatch: pytest.MonkeyPatch, pages: int, halved: bool
) -> None:
    with running(memory="10M") as machine:
        seem_to_write(machine, pages, monkeypatch)
        there, summary = hop(machine, limits=LIMITS._replace(rounds=30), look=check_equal, link=slow_link)
        there.close()
        assert (summary.rounds > 1) == halved


def test_a_round_that_need_not_be_does_not_make_it_late(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(memory="10M") as machine:
        seem_to_write(machine, 256, monkeypatch)
        monkeypatch.setattr(Source, "_is_late", lambda source: source._round > 1)
        there, summary = hop(machine, limits=LIMITS._replace(rounds=30), look=check_equal, link=slow_link)
        there.close()
        assert summary.rounds == 2


def test_whoever_waits_for_progress_may_give_up() -> None:
    seen: list[Progress] = []

    def progress(progress: Progress) -> None:
        if progress.round:
            seen.append(progress)
        if len(seen) == 12:
            raise pyhv.BadInput("the user", "has enough")

    with running(memory="8M") as machine:
        machine.vm.memory.write(4 << 20, os.urandom(4 << 20))
        failed = try_hop(machine, limits=LIMITS._replace(bandwidth=2e6), progress=progress)
        assert isinstance(failed, Failed)
        assert str(failed.here) == "the user: has enough"
        assert "the source: gave the migration up: the user: has enough" in str(failed.there)
        assert machine.vm.running and machine.handed_over == ""
        wait_for_rounds(machine)
        first, last = seen[0], seen[-1]
        assert {p.round for p in seen} == {1} and first.left > last.left > 0
        assert last.total == first.total >= 4 << 20 and last.sent > first.sent
        assert last.rate > 0 and last.downtime > 0
        hop(machine).machine.close()  # and later it goes


# ------------------------------------------------------------------------------------------------- what is refused


def test_a_guest_that_ends_meanwhile() -> None:
    with running(append="pages=64 every=1 rounds=120", memory="8M") as machine:
        machine.vm.memory.write(4 << 20, os.urandom(4 << 20))
        failed = try_hop(machine, limits=LIMITS._replace(bandwidth=1e6))
        assert isinstance(failed, Failed)
        assert "the guest: came to its end during the migration" in str(failed.here)
        assert "the source: gave the migration up: the guest: came to its end" in str(failed.there)
        result = machine.result(machine.vm.wait(TIMEOUT))
        assert (result.cause, result.status) == ("guest-exit", 0)


@pytest.fixture
def lesser(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the host that is asked at the arrival one that lacks something."""
    describe = Kvm.describe

    def lack(change: Callable[[HostDescription], HostDescription]) -> None:
        def changed(self: Kvm, *rest: Any, **options: Any) -> HostDescription:
            host = describe(self, *rest, **options)
            return change(host) if threading.current_thread().name == "arrive" else host

        monkeypatch.setattr(Kvm, "describe", changed)

    return lack


def test_a_refusal_has_every_reason(lesser: Callable[..., None]) -> None:
    def lacks(host: HostDescription) -> HostDescription:
        one = host.table.get(1)
        table = host.table.replace({(1, 0): one._replace(ecx=one.ecx & ~(1 << 13), edx=one.edx & ~(1 << 4))})
        return host._replace(table=table)

    lesser(lacks)
    with running() as machine:
        failed = try_hop(machine)
        assert isinstance(failed, Failed)
        assert isinstance(failed.here, pyhv.Incompatible) and isinstance(failed.there, pyhv.Incompatible)
        assert len(failed.here.reasons) == len(failed.there.reasons) >= 2
        assert {"cx16", "tsc"} <= {getattr(reason, "name", "") for reason in failed.there.reasons}
        for error in failed:
            assert "cx16" in str(error) and "tsc" in str(error) and "\n" not in str(error)
        assert str(failed.here).startswith("the destination: does not take this guest: ")
        assert machine.vm.running
        wait_for_rounds(machine)


def test_a_host_without_the_memory_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it maps any: the source may claim what it likes."""
    available = memory._available
    monkeypatch.setattr(
        memory, "_available", lambda: 20 << 20 if threading.current_thread().name == "arrive" else available()
    )
    with running(memory="40M") as machine:
        failed = try_hop(machine)
        assert isinstance(failed, Failed)
        for error in failed:
            assert "needs 40M for the guest and 1M for the kernel's tables of it" in str(error)
        wait_for_rounds(machine)
        hop(machine, arrive={"overcommit": True}).machine.close()


def test_strict_tsc(lesser: Callable[..., None]) -> None:
    lesser(lambda host: host._replace(tsc_khz=host.tsc_khz // 2, tsc_scaling=False))
    with running(compat=True, accel="kvm") as machine:
        failed = try_hop(machine, strict_tsc=True)
        assert isinstance(failed, Failed) and "TSC" in str(failed.here)
        wait_for_rounds(machine)
        with hop(machine).machine as there:
            assert any("TSC will run at" in note for note in there.notes)


def test_only_a_vm_that_has_run_and_is_here_is_migrated(tmp_path: Path) -> None:
    with (
        pyhv.Machine("ticker", **TICKER) as built,
        pytest.raises(pyhv.BadInput, match="does not run: it cannot be migrated; let it run first"),
    ):
        built.migrate(f"unix:{tmp_path}/nobody")
    with running() as machine:
        with pytest.raises(pyhv.BadInput, match="cannot be reached: No such file"):
            machine.migrate(f"unix:{tmp_path}/nobody")
        assert machine.vm.running
        hop(machine).machine.close()
        words = r"was handed over to the destination: it cannot be \w+; it belongs to that side now"
        for call in (machine.start, lambda: machine.save("x"), lambda: machine.migrate("unix:x")):
            with pytest.raises(pyhv.WrongState, match=words):
                call()


def test_a_vm_that_was_forced_to_go_on_can_be_migrated() -> None:
    with running() as machine:
        with hop(machine).machine as there:
            there.pause()
        counted = stamp(machine)
        machine.start(force=True)
        wait_for_rounds(machine)
        assert stamp(machine) > counted and machine.handed_over == ""
        with hop(machine, look=check_equal).machine as there:
            wait_for_rounds(there)


def test_from_python(tmp_path: Path) -> None:
    """As the README has it."""
    uri = f"unix:{tmp_path}/m"
    found: list[pyhv.Machine] = []
    thread = threading.Thread(target=lambda: found.append(pyhv.Machine.receive(uri, timeout=TIMEOUT)))
    thread.start()
    with running() as machine:
        deadline = time.monotonic() + TIMEOUT
        while not os.path.exists(f"{tmp_path}/m"):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        starter = threading.Thread(target=lambda: (thread.join(TIMEOUT), found[0].start()))
        starter.start()
        summary = machine.migrate(uri)
        starter.join(TIMEOUT)
        assert summary.one_clock
        with found[0] as there:
            wait_for_rounds(there)
    assert os.listdir(tmp_path) == []


def test_nobody_comes(tmp_path: Path) -> None:
    with pytest.raises(pyhv.TimedOut, match=r"nobody came within 0\.05 seconds; start pyhv migrate at the source"):
        pyhv.Machine.receive(f"unix:{tmp_path}/m", timeout=0.05)
    assert os.listdir(tmp_path) == []


def test_a_stamp_is_where_the_guest_puts_it() -> None:
    with running() as machine:
        machine.pause()
        word = struct.unpack("<Q", machine.vm.memory.read(0x200000 + 8 * (0x200 % 16), 8))[0]
        assert word & 0xFFFFFFFF == 0x200 and word >> 32 in (stamp(machine, 0), stamp(machine, 0) + 1)


@pytest.mark.parametrize("when", ["before the answer", "while it rests", "before it is ready"])
def test_giving_up_does_not_wait_for_the_other_side(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked for the migration is listened to wherever it waits."""
    begin = time.monotonic()

    def progress(progress: Progress) -> None:
        if progress.round == (1 if when == "while it rests" else 0) and time.monotonic() > begin + 0.3:
            raise pyhv.BadInput("the user", "has enough")

    def answer_late(self: Destination, *rest: Any) -> None:
        time.sleep(1.5)

    if when == "before the answer":
        monkeypatch.setattr(Destination, "accept", answer_late)
    elif when == "before it is ready":
        monkeypatch.setattr(Destination, "confirm", answer_late)
    slow = {"bandwidth": 1e5} if when == "while it rests" else {}
    with running() as machine:
        ours, theirs = socket.socketpair()

        def take() -> None:
            with contextlib.suppress(PyhvError):
                channel = Channel(theirs.fileno(), theirs.fileno(), "the source", theirs.close)
                pyhv.Machine.arrive(Destination(channel)).close()

        taker = threading.Thread(target=take)
        taker.start()
        with (
            Channel(ours.fileno(), ours.fileno(), "the destination", ours.close) as channel,
            pytest.raises(pyhv.BadInput, match="the user: has enough"),
        ):
            machine.depart(channel, limits=LIMITS._replace(silence=5.0, **slow), progress=progress)
        assert machine.vm.running
        wait_for_rounds(machine)
        taker.join(TIMEOUT)


# ------------------------------------------------------------------------------------------------------- cancelling

cancelled_in: set[Stage] = set()


@pytest.mark.parametrize("from_outside", [False, True], ids=["here", "another thread"])
@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name.lower())
def test_cancelling(stage: Stage, from_outside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every stage the guest goes on here, and is forgotten there; once it is given away, nothing comes of it."""
    answers: list[bool] = []
    enter = Source._enter

    def cancel() -> None:
        answers.append(machine.cancel_migration())

    def spy(self: Source, entered: Stage) -> None:
        enter(self, entered)
        if entered == stage and not answers:
            cancelled_in.add(stage)
            if from_outside:
                thread = threading.Thread(target=cancel)
                thread.start()
                thread.join(TIMEOUT)
            else:
                cancel()

    monkeypatch.setattr(Source, "_enter", spy)
    asked: list[bool] = []

    def may_stop() -> bool:  # not at once: for the stage in which it waits for that
        asked.append(True)
        return len(asked) > 3

    with running() as machine:
        done = try_hop(machine, may_stop=may_stop)
        assert answers == [stage != Stage.COMMITTED]
        if stage == Stage.COMMITTED:
            assert isinstance(done, Hop)
            done.machine.close()
            assert not machine.vm.running and machine.handed_over
            return
        assert isinstance(done, Failed), done
        assert str(done.here) == "migration to the destination: it was cancelled; the VM stays here"
        assert "the source: gave the migration up: migration to the destination: it was cancelled" in str(done.there)
        assert machine.vm.running and not machine.handed_over and not machine.cancel_migration()
        wait_for_rounds(machine)
        monkeypatch.setattr(Source, "_enter", enter)
        hop(machine).machine.close()  # and later it goes


def test_cancelling_was_tried_in_every_stage(request: pytest.FixtureRequest) -> None:
    selected = sum(item.name.startswith("test_cancelling[") for item in request.session.items)
    if selected < 2 * len(Stage):
        pytest.skip("only some of the stages were selected")
    assert cancelled_in == set(Stage)


def test_cancelling_what_waits_for_a_silent_side() -> None:
    """At once, though the other side says nothing."""
    ours, theirs = socket.socketpair()
    with running() as machine, theirs:
        timer = threading.Timer(0.2, machine.cancel_migration)
        timer.start()
        with (
            Channel(ours.fileno(), ours.fileno(), "the other side", ours.close) as channel,
            pytest.raises(pyhv.Cancelled),
        ):
            machine.depart(channel, limits=Limits(silence=60.0, heartbeat=30.0))
        timer.join()
        wait_for_rounds(machine)


# ------------------------------------------------------------------------------------------------------ a paused VM


def test_a_paused_vm_stays_paused() -> None:
    with running() as machine:
        machine.pause()
        before = stamp(machine)
        ours, theirs = socket.socketpair()
        found: list[pyhv.Machine] = []

        def take() -> None:
            channel = Channel(theirs.fileno(), theirs.fileno(), "the source", theirs.close)
            found.append(pyhv.Machine.arrive(Destination(channel)))
            assert found[0].came_paused
            found[0].settle()

        thread = threading.Thread(target=take)
        thread.start()
        with Channel(ours.fileno(), ours.fileno(), "the destination", ours.close) as channel:
            summary = machine.depart(channel, limits=LIMITS)
        thread.join(TIMEOUT)
        assert summary.downtime == 0 and machine.handed_over and not machine.vm.running
        with found[0] as there:
            check_equal(machine, there)
            time.sleep(0.05)
            assert not there.vm.running and stamp(there) == before and there.console() == b""
            there.start()
            wait_for_rounds(there)
            again = hop(there, look=check_equal)  # and one that runs goes as before
            again.machine.close()


def test_a_paused_vm_that_is_not_taken_stays_paused() -> None:
    with running() as machine:
        machine.pause()
        ours, theirs = socket.socketpair()
        theirs.close()
        with (
            Channel(ours.fileno(), ours.fileno(), "the destination", ours.close) as channel,
            pytest.raises(pyhv.HostError),
        ):
            machine.depart(channel, limits=LIMITS)
        assert not machine.vm.running and not machine.handed_over
        machine.start()
        wait_for_rounds(machine)


def test_who_listens_tells_its_port() -> None:
    told: list[str] = []
    with pytest.raises(pyhv.TimedOut):
        pyhv.Machine.receive("tcp://127.0.0.1:0", timeout=0.01, on_listening=told.append)
    assert len(told) == 1 and int(told[0].removeprefix("tcp://127.0.0.1:")) > 0

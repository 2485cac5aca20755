"""What wakes a guest that sleeps with interrupts off, and what pauses do to its timers: the same on both
accelerators."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

import pyhv

from . import cli, emulator

IDLE = 0.5  # seconds, in which a VM that lies still is looked at several times


@pytest.fixture(params=["kvm", "emulator"])
def accel(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "emulator":
        emulator.require()
    yield request.param


@pytest.mark.skipif(
    cli.IN_THE_LAB, reason="a guest that polls with interrupts off stops a host's timers (tests/lab/README.md)"
)
def test_ticks_of_the_pit_in_a_pause_are_no_storm(accel: str) -> None:
    """1,000 ticks a second; KVM would make good each that the guest has slept through."""
    with pyhv.Machine("pit", append="count", memory="4M", accel=accel) as machine:

        def count() -> int:
            return int.from_bytes(machine.vm.memory.read(0x200000, 4), "little")

        machine.start()
        while count() < 50:
            time.sleep(0.01)
        machine.pause()
        before = count()
        time.sleep(3)
        begin = time.monotonic()
        machine.start()
        time.sleep(0.1)
        machine.pause()
        ran = time.monotonic() - begin
        assert 0 < count() - before < 1000 * (ran + 1), "the 3,000 of the pause came along"


@pytest.mark.parametrize(("word", "cause"), [("nmi", "guest-exit"), ("masked", "halted"), ("silent", "halted")])
def test_halted_means_that_nothing_can_wake_it(accel: str, word: str, cause: str) -> None:
    with pyhv.Machine("pit", append=word, memory="4M", accel=accel) as machine:
        result = machine.run(timeout=30)
    assert (result.cause, result.status) == (cause, 0), result.message


def test_an_nmi_by_the_io_apic_can_wake_it(accel: str) -> None:
    reader, writer = os.pipe()
    try:
        with pyhv.Machine("pit", append="ioapic", memory="4M", accel=accel, console_in=reader) as machine:
            assert machine.run(timeout=IDLE).cause == "timeout"  # it was looked at meanwhile, and may still wake up
            os.write(writer, b"x")
            result = machine.run(timeout=30)
    finally:
        os.close(reader)
        os.close(writer)
    assert (result.cause, result.status) == ("guest-exit", 0), result.message


def test_a_guest_that_sleeps_is_not_paused_to_look_at_it(accel: str) -> None:
    """vm.left tells when a vCPU came back from a run: none may before the guest's own end."""
    with pyhv.Machine("timer", append="ms=2000", memory="4M", accel=accel) as machine:
        results: list[pyhv.RunResult] = []
        waiter = threading.Thread(target=lambda: results.append(machine.run(timeout=30)))
        waiter.start()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert machine.vm.left == 0
            time.sleep(0.02)
        waiter.join()
    assert [(result.cause, result.status) for result in results] == [("guest-exit", 0)]

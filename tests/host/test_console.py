"""A guest's console from Python: what it prints is kept, within limits, and it can be talked to."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

import pyhv
from pyhv.vm import devices

from .cli import IN_THE_LAB
from .migration import APPEND, MEMORY, TIMEOUT, check_console, wait_for_rounds
from .test_migration import hop


def echo(**options: object) -> pyhv.Machine:
    """A guest that prints what it is sent, until a q."""
    return pyhv.Machine("faults", append="echo", memory="4M", **options)  # type: ignore[arg-type]


def test_a_conversation() -> None:
    with echo() as machine:
        machine.send(b"early ")  # waits for the guest
        machine.start()
        assert machine.expect(b"early ", TIMEOUT).group() == b"early "
        for number in (7, 8):
            machine.send(b"[n=%d]" % number)
            assert machine.expect(re.compile(rb"\[n=(\d+)\]"), TIMEOUT).group(1) == b"%d" % number
        machine.pause()
        machine.send(b"paused;")
        with pytest.raises(pyhv.WrongState, match="does not run: it cannot print; let it run first"):
            machine.expect(b"paused;", TIMEOUT)
        machine.start()
        machine.expect(b"paused;", TIMEOUT)
        machine.send(b"q")
        result = machine.wait(TIMEOUT)
        assert result is not None and (result.cause, result.status) == ("guest-exit", 0)
        for text in (b"early ", b"[n=7][n=8]paused;"):
            assert text in result.console
        with pytest.raises(pyhv.WrongState, match="has come to its end: it cannot be sent input"):
            machine.send(b"x")
    with pytest.raises(pyhv.WrongState, match="has been closed: it cannot be sent input"):
        machine.send(b"x")


def test_each_expect_looks_behind_the_last_one() -> None:
    with pyhv.Machine("ticker", append=APPEND, memory=MEMORY) as machine:
        machine.start()
        numbers = [int(machine.expect(re.compile(rb"round (\d+)\n"), TIMEOUT).group(1)) for _ in range(20)]
        assert numbers == list(range(1, 21))


def test_what_does_not_come() -> None:
    with pyhv.Machine("hello", memory="4M") as machine:
        machine.start()
        machine.expect(b"hello from", TIMEOUT)
        with pytest.raises(pyhv.WrongState, match="come to its end: it cannot print; b'b y' did not come; the last"):
            machine.expect(b"b y")
        machine.expect(b"guest\n")  # what came before the end is there
    with echo() as machine:
        machine.start()
        with pytest.raises(pyhv.TimedOut, match=r"the guest: did not print b'x\+y' within 0.05 seconds; the last"):
            machine.expect(re.compile(rb"x+y"), 0.05)
        threading.Timer(0.05, machine.stop).start()
        with pytest.raises(pyhv.WrongState, match="was stopped"):
            machine.expect(b"never")
        closer = threading.Timer(0.05, machine.close)
        closer.start()
        with pytest.raises(pyhv.WrongState, match="has been closed"):
            machine.expect(b"never")
        closer.join()


def test_a_guest_that_halts_for_good_ends_the_wait() -> None:
    with pyhv.Machine("faults", append="halt", memory="4M") as machine:
        machine.start()
        with pytest.raises(pyhv.WrongState, match="has come to its end"):
            machine.expect(b"never")


def test_a_guest_that_does_not_read() -> None:
    with pyhv.Machine("spin", memory="4M") as machine:
        machine.start()
        with pytest.raises(pyhv.TimedOut, match=r"took \d+ of 300000 bytes within 0.05 seconds; it reads no console"):
            machine.send(bytes(300000), 0.05)
        errors: list[BaseException] = []

        def send() -> None:
            try:
                machine.send(bytes(300000))
            except pyhv.WrongState as error:
                errors.append(error)

        sender = threading.Thread(target=send)
        sender.start()
        machine.close()
        sender.join(TIMEOUT)
        assert "has been closed" in str(errors[0])


def test_what_is_typed_for_a_machine_that_left_is_refused() -> None:
    with pyhv.Machine("ticker", append=APPEND, memory=MEMORY) as machine:
        machine.send(b"x")
        machine.start()
        wait_for_rounds(machine)
        there = hop(machine).machine
        with there:
            there.send(b"y")
            there.expect(b"ticker: round", TIMEOUT)
        with pytest.raises(pyhv.WrongState, match="was handed over to the destination: it cannot be sent input"):
            machine.send(b"x")


def test_who_has_the_console() -> None:
    reader, writer = os.pipe()
    try:
        with echo(console_in=reader, console_out=writer) as machine:
            with pytest.raises(pyhv.BadInput, match="the console: has console_in as its input"):
                machine.send(b"x")
            with pytest.raises(pyhv.BadInput, match="the console: is not captured; leave console_out out"):
                machine.expect(b"x")
            assert (machine.console(), machine.console_dropped) == (b"", 0)
    finally:
        os.close(reader)
        os.close(writer)
    with echo() as machine:
        for what in ("text", re.compile("text"), 7):
            with pytest.raises(pyhv.BadInput, match="is no bytes; give bytes, or"):
                machine.expect(what)  # type: ignore[arg-type]
        with pytest.raises(pyhv.BadInput, match="data 'text': is no bytes; give bytes, not str"):
            machine.send("text")  # type: ignore[arg-type]


def test_the_last_of_the_output_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pyhv.Machine("ticker", append=f"{APPEND} rounds=300", memory=MEMORY)
    with whole as machine:
        result = machine.run(TIMEOUT)
        assert (result.status, result.console_dropped) == (0, 0)
        everything = result.console
    monkeypatch.setattr(devices, "KEPT", 1000)
    with pyhv.Machine("ticker", append=f"{APPEND} rounds=300", memory=MEMORY) as machine:
        machine.start()
        assert machine.expect(re.compile(rb"round 300\n"), TIMEOUT)
        kept = machine.run(TIMEOUT)
        assert kept.console == everything[-1000:] == machine.console()
        assert kept.console_dropped == len(everything) - 1000 == machine.console_dropped


def test_what_was_in_the_transmitter_of_a_saved_guest_is_kept(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with pyhv.Machine("ticker", append=APPEND, memory=MEMORY, console_out=writer) as machine:
        assert machine.run(1).cause == "timeout"  # the pipe is full
        machine.save(tmp_path / "saved")
    os.close(writer)
    with open(reader, "rb") as pipe:
        before = pipe.read()
    with pyhv.Machine.restore(tmp_path / "saved") as machine:
        machine.start()
        wait_for_rounds(machine, 3)
        machine.pause()
        check_console(before + machine.console())


def test_registers_are_numbers_too() -> None:
    with pyhv.Machine("faults", append="triple-fault", memory="4M") as machine:
        result = machine.run(TIMEOUT)
    assert result.cause == "triple-fault"
    if "is gone" in result.message:  # on a real AMD processor, and only there
        assert (result.vcpu, result.regs, result.sregs, result.registers) == (None, None, None, "") and IN_THE_LAB
        return
    assert result.vcpu == 0
    assert result.regs is not None and result.sregs is not None
    assert f"{result.regs.rax:016x}" in result.registers and f"cr3 {result.sregs.cr3:x}" in result.registers
    with pyhv.Machine("hello", memory="4M") as machine:
        match machine.run(TIMEOUT):
            case pyhv.RunResult("guest-exit", 0, console, regs=regs):
                assert (regs, console[:5]) == (None, b"hello")
            case other:
                raise AssertionError(other)

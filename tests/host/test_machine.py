"""A machine from its image to its end, on this machine's KVM."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection
from pathlib import Path

import pytest

import pyhv
from pyhv.errors import HostError
from pyhv.vm.devices import Devices
from pyhv.vm.vm import Vm

from .conftest import run

#: mov $0xfee00000, %eax; movl $0x1ff, 0xf0(%rax); movl $0xb, 0x3e0(%rax); movl $0x30, 0x320(%rax); movl $1000000,
#: 0x380(%rax); sti; 1: pause; jmp 1b: the local APIC's timer, in 1 ms, at vector 0x30.
WAITS_FOR_ITS_TIMER = bytes.fromhex(
    "b80000e0fe c780f0000000ff010000 c780e00300000b000000 c7802003000030000000 c7808003000040420f00 fb f390 ebfc"
)


def test_hello() -> None:
    result = run("hello", append="two words")
    assert (result.cause, result.status, result.message) == ("guest-exit", 0, "")
    assert result.console == b"hello from a pyhv guest\ncommand line: two words\n"


@pytest.mark.parametrize("status", [0, 2, 42, 124, 255])
def test_the_guests_byte_is_the_status(status: int) -> None:
    result = run("faults", append=f"status={status}")
    assert (result.cause, result.status) == ("guest-exit", status)


@pytest.mark.parametrize(
    ("word", "cause", "status"),
    [
        ("triple-fault", "triple-fault", 121),
        ("ud", "guest-exit", 70),
        ("halt", "halted", 0),
        ("reset", "reset", 0),
        ("unmapped", "guest-exit", 0),
        ("badport", "guest-exit", 0),
    ],
)
def test_every_end_has_its_cause(word: str, cause: str, status: int) -> None:
    result = run("faults", append=word)
    assert (result.cause, result.status) == (cause, status), result.message


def test_a_triple_fault_shows_registers_or_says_that_they_are_gone() -> None:
    result = run("faults", append="triple-fault")
    if "is gone" in result.message:  # kvm_amd
        assert "KVM resets an AMD vCPU" in result.message and result.registers == ""
        assert "fffffff0" not in result.message
    else:
        assert "triple fault at rip 0x10" in result.message and "rip 000000000010" in result.registers


def test_trap_by_stepping_ends_a_guest_that_takes_interrupts(tmp_path: Path) -> None:
    """Held back by the stepping its timer's interrupt would never come."""
    image = tmp_path / "lt"
    image.write_bytes(WAITS_FOR_ITS_TIMER)
    result = run(str(image), boot="flat", intercept="trap", accel="kvm", timeout=60)
    assert (result.cause, result.status) == ("not-executable", 122), result.message
    assert "an interrupt waits, which trap by stepping cannot deliver" in result.message


def test_what_kvm_cannot_execute_is_named_with_its_bytes_and_registers(unfaithful: None) -> None:
    result = run("faults", append="fpu")
    assert (result.cause, result.status) == ("not-executable", 122)
    assert "KVM_EXIT_INTERNAL_ERROR, suberror 1" in result.message
    assert "bytes there: " in result.message and "rip 0x1" in result.message
    assert "rip 0000000000" in result.registers and "cr3" in result.registers


def test_a_timeout_pauses_the_guest_which_can_run_on() -> None:
    with pyhv.Machine("ticker", append="every=1", memory="4M") as machine:
        first = machine.run(timeout=0.3)
        assert (first.cause, first.status) == ("timeout", 124)
        assert "vCPU 0 at rip 0x1" in first.message
        assert not machine.vm.running
        again = machine.run(timeout=0.5)
        assert again.cause == "timeout"
        assert again.console.startswith(first.console)
        assert len(again.console) > len(first.console), "the guest did not go on"
        assert again.console.count(b"error") == 0


def test_a_spinning_guest_with_interrupts_off_can_be_stopped() -> None:
    result = run("spin", timeout=0.2)
    assert result.cause == "timeout"
    assert "interrupts off" in result.message


def test_a_blocked_console_does_not_block_pause() -> None:
    """The guest waits in its OUT for a reader of a full pipe; nothing that it printed is lost."""
    reader, writer = os.pipe()
    try:
        with pyhv.Machine("ticker", append="every=1 pages=1", memory="4M", console_out=writer) as machine:
            for _ in range(3):
                assert machine.run(timeout=0.4).cause == "timeout"
            text = b""
            os.set_blocking(reader, False)
            while chunk := _read(reader):
                text += chunk
        lines = text.decode().splitlines()
        rounds = [int(line.split()[2]) for line in lines[:-1] if line.startswith("ticker: round ")]
        assert rounds == list(range(rounds[0], rounds[0] + len(rounds))), "console bytes were lost"
    finally:
        os.close(reader)
        os.close(writer)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return b""


def test_console_input_reaches_the_guest() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"abcq")
        result = run("faults", append="echo", console_in=reader)
        assert (result.cause, result.status) == ("guest-exit", 0)
        assert b"abc" in result.console
    finally:
        os.close(reader)
        os.close(writer)


def test_many_vcpus() -> None:
    result = run("hello", cpus=64)
    assert (result.cause, result.status) == ("guest-exit", 0)


def test_start_and_pause_again_and_again() -> None:
    with pyhv.Machine("ticker", append="every=1000000", memory="4M", cpus=2) as machine:
        for _ in range(50):
            machine.start()
            asked = time.monotonic_ns()
            machine.pause()
            assert not machine.vm.running
            assert asked <= machine.vm.left <= time.monotonic_ns()
        machine.start()
        assert machine.vm.running
    assert machine.vm.vcpus == []


def test_nothing_is_left_behind() -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    run("hello")
    before = count()
    for _ in range(20):
        run("hello")
        run("spin", timeout=0.01)
        with pytest.raises(pyhv.BadInput):
            run("hello", append="x" * 5000)
    assert count() == before


def test_many_machines_at_once() -> None:
    machines = [pyhv.Machine("hello", memory="4M", append=str(i)) for i in range(30)]
    try:
        for machine in machines:
            machine.start()
        for i, machine in enumerate(machines):
            assert machine.run(60).console.endswith(f"command line: {i}\n".encode())
    finally:
        for machine in machines:
            machine.close()


def test_close_that_is_interrupted_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the kick: the vCPU is kicked nevertheless, and close() may be asked for once more."""
    machine = pyhv.Machine("spin", append="cli")
    machine.start()
    vcpu = machine.vm.vcpus[0]
    kicks, kick = [KeyboardInterrupt], vcpu.kick

    def interrupted() -> None:
        if kicks:
            raise kicks.pop()
        kick()

    monkeypatch.setattr(vcpu, "kick", interrupted)
    with pytest.raises(KeyboardInterrupt):
        machine.close()
    machine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "vcpu-0"]


def test_devices_of_a_machine_that_is_never_made_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Devices] = []

    def fail(devices: Devices) -> None:
        made.append(devices)
        raise HostError("keep", 12)

    monkeypatch.setattr(Devices, "keep_output", fail)
    with pytest.raises(HostError, match="keep"):
        pyhv.Machine("hello", memory="4M")
    assert len(made) == 1 and not made[0].bus


def test_a_failure_on_a_vcpu_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(record: object) -> None:
        raise RuntimeError("from the callback")

    with pyhv.Machine("cpuid", on_cpuid=explode) as machine, pytest.raises(RuntimeError, match="from the callback"):
        machine.run(30)


def test_memory_above_4_gib_is_mapped() -> None:
    with pyhv.Machine("hello", memory="5G", overcommit=True) as machine:
        assert machine.vm.memory.regions == [(0, 3 << 30, 0), (4 << 30, 2 << 30, 3 << 30)]
        machine.vm.memory.write(5 << 30, b"there")
        assert machine.vm.memory.read(5 << 30, 5) == b"there"
        with pytest.raises(pyhv.BadInput, match="no RAM"):
            machine.vm.memory.write((3 << 30) - 2, b"over the edge")
        assert machine.run(30).status == 0


@pytest.mark.usefixtures("unfaithful")
def test_auto_gives_an_unknown_kernel_to_the_emulator_where_kvm_is_no_ordinary_one(tmp_path: Path) -> None:
    image = tmp_path / "int3"
    image.write_bytes(b"\xb0\x07\xe6\xf4\xcc")  # mov al, 7; out 0xf4, al; int3
    result = run(str(image), boot="flat")
    assert (result.cause, result.status) == ("guest-exit", 7)
    with pyhv.Machine(str(image), boot="flat") as machine:
        assert machine.choice.accelerator.name == "emulator"
        assert "failed the CPUID probe" in machine.notes[0]
    with pyhv.Machine("hello") as machine:
        assert (machine.choice.accelerator.name, machine.notes) == ("kvm", [])


@pytest.mark.usefixtures("unfaithful")
def test_who_dies_of_what_kvm_lacks_is_told_of_the_emulator(tmp_path: Path) -> None:
    image = tmp_path / "int3"
    image.write_bytes(b"\xcc\xf4")  # int3; hlt: this KVM executes no INT3
    result = run(str(image), boot="flat", accel="kvm")
    assert result.cause == "not-executable"
    assert result.message.endswith('; the emulator may run this guest: accel="emulator"')


# A multiboot kernel, from 0x100000: its header, and then a page directory with one page of 4 MiB at 0x101000; CR3; PSE;
# paging; 5 to port 0xf4.
FOUR_MIB_PAGES = "02b0ad1b00000100fe4f51e40000100000001000000000000020100020001000" + (
    "c7050010100083000000b8001010000f22d80f20e083c8100f22e00f20c00d000000800f22c0b005e6f4"
)


@pytest.mark.usefixtures("unfaithful")
def test_4_mib_pages_are_what_such_a_kvm_lacks(tmp_path: Path) -> None:
    image = tmp_path / "pse"
    image.write_bytes(bytes.fromhex(FOUR_MIB_PAGES))
    result = run(str(image), accel="kvm")
    assert result.cause == "triple-fault"
    assert result.message.endswith('; the emulator may run this guest: accel="emulator"')
    assert run(str(image)).status == 5


def test_flat_binary(tmp_path: Path) -> None:
    image = tmp_path / "flat"
    image.write_bytes(bytes.fromhex("66baf400b007ee"))  # mov dx, 0xf4; mov al, 7; out dx, al
    result = run(str(image), boot="flat")
    assert (result.cause, result.status) == ("guest-exit", 7)
    with pytest.raises(pyhv.BadInput, match=r'flat: is not recognised as an image; .*, boot="flat" runs it'):
        pyhv.Machine(str(image))


def test_a_vm_that_cannot_be_built_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def fail(self: Vm, *arguments: object) -> None:
        raise RuntimeError("planted")

    run("hello")
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("pyhv.boot.start64.load", fail)
    with pytest.raises(RuntimeError, match="planted"):
        pyhv.Machine("hello")
    assert len(os.listdir("/proc/self/fd")) == before


def test_pinned_vcpus_stay_on_their_processors() -> None:
    usable = sorted(os.sched_getaffinity(0))
    with pyhv.Machine("spin", cpus=1) as machine:
        machine.pin([usable[-1]])
        machine.start()
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "vcpu-0"]
        deadline = time.monotonic() + 10
        while os.sched_getaffinity(thread.native_id or 0) != {usable[-1]}:
            assert time.monotonic() < deadline
        assert os.sched_getaffinity(0) == set(usable)
        with pytest.raises(pyhv.BadInput, match="processor 4095: cannot be used by this process"):
            machine.pin([4095])


@pytest.mark.parametrize(
    ("word", "fail_on", "cause", "status"),
    [
        ("halt", {"halted", "reset"}, "halted", 119),
        ("reset", ["reset"], "reset", 119),
        ("reset", {"halted"}, "reset", 0),
        ("status=0", {"guest-exit"}, "guest-exit", 119),
        ("status=7", {"guest-exit"}, "guest-exit", 7),
        ("triple-fault", {"triple-fault"}, "triple-fault", 121),
    ],
)
def test_ends_that_count_as_failures(word: str, fail_on: Collection[str], cause: str, status: int) -> None:
    with pyhv.Machine("faults", append=word) as machine:
        result = machine.run(60, fail_on=fail_on)
        assert (result.cause, result.status) == (cause, status)
        again = machine.wait(fail_on=fail_on)
        assert again is not None and again.status == status


def test_what_is_no_cause() -> None:
    with pyhv.Machine("spin") as machine:
        for fail_on in ({"halt"}, {"usage"}, {7}):
            with pytest.raises(pyhv.BadInput, match=r"is no cause of an end; there are guest-exit, power-off, reset"):
                machine.run(fail_on=fail_on)  # type: ignore[arg-type]
        with pytest.raises(pyhv.BadInput, match="fail_on 'halted': is a str"):
            machine.run(fail_on="halted")
        assert machine.state == "built"

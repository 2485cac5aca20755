"""Instruction by instruction: the registers after each step under KVM and under the emulator.

Left out of what is compared are RF and the flags that the SDM leaves undefined. No guest here reads the TSC.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import pyhv
from pyhv.accel.data import Stop
from pyhv.machine import Machine
from tests.host import emulator

_CF, _PF, _AF, _ZF, _SF, _OF, _RF = 1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11, 1 << 16
_MOST = 30_000

GUESTS = [
    ("hello", ""),
    ("hello", "some words"),
    ("refuse", ""),
    ("dispatch", ""),
    ("cpuid", ""),
    ("faults", "ud"),
    ("faults", "badport"),
    ("faults", "unmapped"),
    ("faults", "status=7"),
    ("faults", "triple-fault"),
]


@pytest.fixture(autouse=True)
def _both() -> None:
    emulator.require()
    emulator.require_kvm()


def undefined_flags(code: bytes) -> int:
    """The flags that the SDM leaves undefined after the instruction; AF is one of most that touch flags."""
    code = code.lstrip(b"\x66\xf2\xf3")
    if code[:1] and code[0] & 0xF0 == 0x40:  # REX
        code = code[1:]
    opcode, extension = code[0], code[1] >> 3 & 7
    if opcode in (0x69, 0x6B) or code[:2] == b"\x0f\xaf" or (opcode in (0xF6, 0xF7) and extension in (4, 5)):
        return _SF | _ZF | _AF | _PF  # IMUL, MUL
    if opcode in (0xF6, 0xF7) and extension in (6, 7):
        return _CF | _PF | _AF | _ZF | _SF | _OF  # DIV, IDIV
    if opcode in (0xC0, 0xC1, 0xD2, 0xD3):
        return _OF | _AF  # shifts and rotations by more than one
    return _AF


class Walk:
    """One vCPU's way through the guest. The rounds of a repeated string instruction are one step: KVM may do several at
    once."""

    def __init__(self, machine: Machine) -> None:
        self.vcpu = machine.vm.vcpus[0]
        self.regs = self.vcpu.get_regs()
        self.code = machine.vm.memory.read(self.regs.rip, 16)
        """What is at RIP."""
        self.end = ""

    def step(self) -> None:
        before = self.regs.rip
        while not self.end and self.regs.rip == before:
            exit = self.vcpu.step()
            self.regs, self.code = self.vcpu.get_regs(), exit.instruction
            if exit.stop != Stop.DEBUG:
                self.end = f"{exit.stop.name} {exit.status}"


def walk_together(emulated: Machine, real: Machine) -> tuple[int, str]:
    """How many instructions both executed alike, and the first difference, or ""."""
    ours, theirs = Walk(emulated), Walk(real)
    for count in range(_MOST):
        undefined = undefined_flags(ours.code) | _RF
        fault = ours.code[:2] == b"\x0f\x0b"  # UD2
        ours.step()
        theirs.step()
        if fault and ours.regs.rip != theirs.regs.rip:
            ours.step()  # KVM tells of a step that ends in a handler after the handler's first instruction
        if ours.end or theirs.end:
            return count, "" if ours.end == theirs.end else f"{ours.end or 'went on'}, KVM: {theirs.end or 'went on'}"
        if ours.regs._replace(rflags=ours.regs.rflags | undefined) != theirs.regs._replace(
            rflags=theirs.regs.rflags | undefined
        ):
            return count, f"{ours.regs}, KVM: {theirs.regs}"
        if ours.regs != theirs.regs:  # what is undefined may be seen later: it shall be the same then
            ours.regs = theirs.regs
            ours.vcpu.set_regs(ours.regs)
    return _MOST, "no end"


@pytest.mark.parametrize(("image", "append"), GUESTS)
def test_the_registers_after_each_instruction_are_the_same(image: str, append: str, tmp_path: Path) -> None:
    options = {"cpu": emulator.common_profile(tmp_path), "append": append, "memory": "4M"}
    with (
        pyhv.Machine(image, accel="emulator", **options) as emulated,  # type: ignore[arg-type]
        pyhv.Machine(image, accel="kvm", intercept="trap", **options) as real,  # type: ignore[arg-type]
    ):
        real.vm.vcpus[0].trap(emulated.guest.table, ())
        count, difference = walk_together(emulated, real)
        assert not difference, f"after {count} instructions: {difference}"
        assert count > 10
        assert emulated.console() == real.console()


def test_a_difference_would_be_noticed(tmp_path: Path) -> None:
    """Planted: another CPUID answer, which only the registers show."""
    options = {"cpu": emulator.common_profile(tmp_path), "memory": "4M"}
    with (
        pyhv.Machine("refuse", accel="emulator", **options) as emulated,  # type: ignore[arg-type]
        pyhv.Machine("refuse", accel="kvm", intercept="trap", **options) as real,  # type: ignore[arg-type]
    ):
        table = emulated.guest.table
        real.vm.vcpus[0].trap(table.replace({(1, 0): table.get(1)._replace(eax=0x12345)}), ())
        assert "rax=74565" in walk_together(emulated, real)[1]


@pytest.mark.parametrize(
    ("image", "append", "seconds"),
    [
        *((image, append, 30.0) for image, append in GUESTS),
        ("timer", "ms=50", 30.0),
        ("ticker", "rounds=20 every=5", 30.0),
        ("faults", "halt", 30.0),
        ("faults", "reset", 30.0),
        ("spin", "", 0.3),
    ],
)
def test_the_console_and_the_end_are_the_same(image: str, append: str, seconds: float, tmp_path: Path) -> None:
    results = []
    for accel in ("emulator", "kvm"):
        options = {"cpu": emulator.common_profile(tmp_path), "append": append, "memory": "4M"}
        with pyhv.Machine(image, accel=accel, **options) as machine:  # type: ignore[arg-type]
            result = machine.run(seconds)
            results.append((result.cause, result.status, without_cpuid_leaf(result.console)))
    assert results[0] == results[1]


def without_cpuid_leaf(console: bytes) -> list[bytes]:
    """Leaf 0x40000000 says who runs the guest: KVM does, the emulator says nothing."""
    return [line for line in console.splitlines() if not line.lstrip().startswith(b"0x40000")]

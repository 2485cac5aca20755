"""Records and the C engine's structures: every field stands where the other side looks for it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pyhv._native import ffi
from pyhv.accel import structs
from pyhv.accel.data import Regs, Segment, Sregs
from pyhv.accel.state import (
    DebugRegs,
    Events,
    Ioapic,
    Irqchip,
    Pic,
    PitChannel,
    ProcessorsState,
    RawState,
    RawVcpu,
    VcpuState,
)

FLAT = {"pyhv_regs": Regs, "pyhv_events": Events}


def noise(name: str) -> Any:
    """A structure full of different bytes."""
    struct = ffi.new(f"struct {name} *")
    ffi.buffer(struct)[:] = random.Random(name).randbytes(ffi.sizeof(struct[0]))
    return struct


def fields(struct: Any, names: tuple[str, ...]) -> list[Any]:
    """By name, as C has them; a list for an array."""
    values = [getattr(struct, name) for name in names]
    return [tuple(v) if isinstance(v, ffi.CData) else v for v in values]


@pytest.mark.parametrize("name", FLAT)
def test_flat_records(name: str) -> None:
    struct, cls = noise(name), FLAT[name]
    record: Any = structs.record(cls, struct)
    assert list(record) == fields(struct, cls._fields)
    again = structs.struct(name, record)
    assert fields(again, cls._fields) == list(record)


def test_debug_registers() -> None:
    record = DebugRegs((1, 2, 3, 4), 5, 6)
    assert fields(structs.struct("pyhv_debugregs", record), DebugRegs._fields) == list(record)


def test_segments_and_control_registers() -> None:
    struct = noise("pyhv_sregs")
    sregs = structs.to_sregs(struct)
    for name in Sregs._fields:
        found, value = getattr(struct, name), getattr(sregs, name)
        if isinstance(value, Segment):
            assert fields(found, Segment._fields) == list(value), name
        else:
            assert (tuple(found) if name == "pdptrs" else found) == value, name
    assert structs.to_sregs(structs.from_sregs(sregs)) == sregs
    with pytest.raises((OverflowError, IndexError)):
        structs.from_sregs(sregs._replace(pdptrs=(1, 2, 3, 4, 5)))
    with pytest.raises(OverflowError):
        structs.from_sregs(sregs._replace(cs=Segment(1 << 32, 0, 0, 0)))


def test_interrupt_controllers_and_timer() -> None:
    struct = noise("pyhv_irqchip")
    chip = structs.to_irqchip(struct, True)
    for pic, found in zip(chip.pic, struct.pic, strict=True):
        assert list(pic) == fields(found, Pic._fields)
    for channel, found in zip(chip.pit, struct.pit, strict=True):
        assert list(channel) == fields(found, PitChannel._fields)
    assert list(chip.ioapic) == fields(struct.ioapic, Ioapic._fields)
    assert chip.pit_flags == struct.pit_flags
    assert structs.to_irqchip(structs.from_irqchip(chip), True) == chip
    assert structs.to_irqchip(struct, False) == chip._replace(pit=())
    for wrong in (chip._replace(pic=chip.pic * 2), chip._replace(pit_flags=1 << 32)):
        with pytest.raises((OverflowError, IndexError)):
            structs.from_irqchip(wrong)


@pytest.mark.parametrize("chips", [True, False], ids=["with irqchip", "without"])
def test_all_of_a_state(chips: bool) -> None:
    def vcpu(number: int) -> VcpuState:
        regs = structs.record(Regs, noise("pyhv_regs"))._replace(rax=number)
        events = structs.record(Events, noise("pyhv_events"))
        msrs = {0x10: (1 << 64) - 1, 0xC0000080: number}
        debugregs = DebugRegs((1, 2, 3, 4), 5, 6)
        sregs = structs.to_sregs(noise("pyhv_sregs"))
        return VcpuState(number, regs, sregs, 7, b"xsave", msrs, bytes(range(256)), events, debugregs, 3)

    chip = structs.to_irqchip(noise("pyhv_irqchip"), True) if chips else None
    state = ProcessorsState((vcpu(0), vcpu(1)), chip, 1 << 40, 1 << 21)
    raw = structs.from_state(state)
    assert (bool(raw.irqchip), raw.pit, len(raw.vcpus)) == (chips, chips, 2)
    assert structs.to_state(raw) == state
    padded = raw._replace(vcpus=tuple(vcpu._replace(xsave=vcpu.xsave + bytes(9)) for vcpu in raw.vcpus))
    assert structs.to_state(padded) == state


def raw_vcpu(**changes: bytes) -> RawVcpu:
    sizes = {name: ffi.sizeof(f"struct pyhv_{name}") for name in ("regs", "sregs", "events", "debugregs")}
    fixed = {name: bytes([number + 1]) * size for number, (name, size) in enumerate(sizes.items())}
    rest = {"msr_indices": bytes(range(8)), "msr_values": bytes(range(16)), "lapic": b"", "xsave": b"x" * 576}
    return RawVcpu(**{"xcr0": 7, "mp_state": 3, **fixed, **rest, **changes})  # type: ignore[arg-type]


def test_a_state_goes_through_the_engines_buffer() -> None:
    buffer = structs.StateBuffer(2)
    chip = structs.to_bytes(noise("pyhv_irqchip"))
    long = raw_vcpu(lapic=b"l" * 1024, xsave=b"y" * 16384, msr_indices=b"i" * 2048, msr_values=b"v" * 4096)
    for state in (
        RawState((raw_vcpu(), long), chip, True, 1 << 40, 1 << 21),
        RawState((long, raw_vcpu()), b"", False, 0, 0),  # nothing of the one before is left
    ):
        buffer.put(state)
        assert buffer.take() == state


@pytest.mark.parametrize(
    "changes",
    [
        {"regs": b""},
        {"sregs": b"1"},
        {"msr_indices": bytes(7)},
        {"msr_values": bytes(8)},
        {"msr_indices": bytes(4 * 513), "msr_values": bytes(8 * 513)},
        {"lapic": bytes(1025)},
        {"xsave": bytes(16385)},
    ],
)
def test_bytes_that_are_no_state_are_refused(changes: dict[str, bytes]) -> None:
    buffer = structs.StateBuffer(1)
    with pytest.raises(ValueError):
        buffer.put(RawState((raw_vcpu(**changes),), b"", False, 0, 0))


@pytest.mark.parametrize(
    "state",
    [RawState((raw_vcpu(),), bytes(3), False, 0, 0), RawState((), b"", False, 0, 0)],
    ids=["an irqchip that is none", "too few vCPUs"],
)
def test_a_state_of_another_kind_is_refused(state: RawState) -> None:
    with pytest.raises(ValueError):
        structs.StateBuffer(1).put(state)


def test_a_structure_whose_fields_are_others_is_noticed() -> None:
    with pytest.raises(AssertionError):
        structs.record(Irqchip, ffi.new("struct pyhv_debugregs *"))

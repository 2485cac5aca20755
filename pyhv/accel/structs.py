"""Between pyhv's records and the C engine's structures, which are the same under every accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pyhv._native import ffi, to_exception
from pyhv.accel.data import CpuidRecord, Exit, Regs, Segment, Sregs, Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.accel.state import Irqchip
    from pyhv.cpu.table import CpuidTable

_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_LOG_PIECE = 256  # records that are taken out of a log at once

T = TypeVar("T", bound=tuple[Any, ...])


def record(cls: type[T], struct: Any) -> T:
    """A record from a C structure that has fields of the same names."""
    return cls(*(getattr(struct, name) for name in cls._fields))  # type: ignore[attr-defined]


def struct(name: str, values: Any) -> Any:
    """And back: a new struct NAME with a record's values."""
    return ffi.new(f"struct {name} *", values._asdict())


def to_regs(struct: Any) -> Regs:
    return record(Regs, struct)


def to_sregs(struct: Any) -> Sregs:
    values: list[Any] = []
    for name in Sregs._fields:
        value = getattr(struct, name)
        if name in _SEGMENTS:
            value = Segment(value.selector, value.base, value.limit, value.attributes)
        elif name == "pdptrs":
            value = tuple(value)
        values.append(value)
    return Sregs(*values)


def from_sregs(sregs: Sregs) -> Any:
    """A new struct pyhv_sregs."""
    values = {n: v._asdict() if isinstance(v, Segment) else v for n, v in sregs._asdict().items()}
    return ffi.new("struct pyhv_sregs *", values)


def to_table(entries: Iterable[Any]) -> CpuidTable:
    """A table from struct pyhv_cpuid_entry."""
    from pyhv.cpu.table import CpuidTable

    return CpuidTable.from_entries((e.leaf, e.subleaf, e.indexed, e.eax, e.ebx, e.ecx, e.edx) for e in entries)


def take_log(take: Callable[[Any, int], int]) -> list[CpuidRecord]:
    """Empties a log. take: moves records into an array of so many, and returns how many it moved."""
    records = ffi.new("struct pyhv_cpuid_record[]", _LOG_PIECE)
    log: list[CpuidRecord] = []
    while count := take(records, _LOG_PIECE):
        log.extend(
            CpuidRecord(r.vcpu, r.rip, r.cpl, r.leaf, r.subleaf, tuple(r.hardware), tuple(r.guest))
            for r in records[0:count]
        )
    return log


def to_exit(exit: Any) -> Exit:
    return Exit(
        Stop(exit.stop),
        exit.exit_reason,
        exit.status,
        exit.suberror,
        exit.hardware_reason,
        exit.rip,
        tuple(exit.data[0 : exit.data_count]),
        bytes(exit.bytes[0 : exit.bytes_count]),
        str(to_exception(exit.error)) if exit.stop == Stop.FAILED else "",
    )


def to_counters(counters: Any) -> dict[str, int]:
    return {name: getattr(counters, name) for name, _ in ffi.typeof("struct pyhv_counters").fields}


def to_irqchip(chip: Any, pit: bool) -> Irqchip:
    """pit: whether the VM has one."""
    from pyhv.accel.state import Ioapic, Irqchip, Pic, PitChannel

    return Irqchip(
        pic=tuple(record(Pic, pic) for pic in chip.pic),
        ioapic=record(Ioapic, chip.ioapic)._replace(redirection=tuple(chip.ioapic.redirection)),
        pit=tuple(record(PitChannel, channel) for channel in chip.pit) if pit else (),
        pit_flags=chip.pit_flags,
    )


def from_irqchip(irqchip: Irqchip) -> Any:
    """A new struct pyhv_irqchip."""
    return ffi.new(
        "struct pyhv_irqchip *",
        {
            "pic": [pic._asdict() for pic in irqchip.pic],
            "ioapic": irqchip.ioapic._asdict(),
            "pit": [channel._asdict() for channel in irqchip.pit],
            "pit_flags": irqchip.pit_flags,
        },
    )

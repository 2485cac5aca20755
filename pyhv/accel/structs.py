"""Between pyhv's records, the C engine's structures, which are the same under every accelerator, and their bytes."""

from __future__ import annotations

import functools
from struct import Struct, unpack

from pyhv._native import ffi, lib, to_exception
from pyhv.accel.data import CpuidRecord, Exit, Segment, Sregs, Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeVar

    from pyhv.accel.state import Irqchip, ProcessorsState, RawState, RawVcpu
    from pyhv.cpu.table import CpuidTable

    T = TypeVar("T", bound=tuple[Any, ...])

# struct pyhv_sregs: eight segments, the tables' bases and limits, CR0 to APIC base, PDPTRs, whether these are valid.
_SREGS = Struct("<" + 8 * "Q3I4x" + "2Q2I7Q4QI4x")
_LOG_PIECE = 256  # records that are taken out of a log at once

_CODES = {"uint8_t": "B", "uint32_t": "I", "uint64_t": "Q", "int64_t": "q"}

# Of a record: the numbers of its C structure, and how many of them, from the first on, are its own.
_known: dict[type, tuple[Struct, int]] = {}


def _layout(cls: type[tuple[Any, ...]], ctype: Any) -> tuple[Struct, int]:
    if cls not in _known:
        names: tuple[str, ...] = cls._fields  # type: ignore[attr-defined]
        assert [name for name, _ in ctype.fields][: len(names)] == list(names), ctype
        codes, end = "<", 0
        for _, field in ctype.fields:
            item, count = (field.type.item, field.type.length) if field.type.kind == "array" else (field.type, 1)
            codes += f"{field.offset - end}x{count}{_CODES[item.cname]}"
            end = field.offset + ffi.sizeof(field.type)
        _known[cls] = Struct(f"{codes}{ffi.sizeof(ctype) - end}x"), len(names)
    return _known[cls]


def record(cls: type[T], struct: Any) -> T:
    """A record of numbers from a pointer to a C structure that begins with fields of the same names."""
    layout, count = _layout(cls, ffi.typeof(struct).item)
    return cls(*layout.unpack(ffi.buffer(struct))[:count])


def records(cls: type[T], structs: Any) -> tuple[T, ...]:
    """Likewise from an array."""
    layout, count = _layout(cls, ffi.typeof(structs).item)
    return tuple([cls(*values[:count]) for values in layout.iter_unpack(ffi.buffer(structs))])


def struct(name: str, values: tuple[Any, ...]) -> Any:
    """And back: a new struct NAME with a record's values."""
    return ffi.new(f"struct {name} *", values)


def to_sregs(struct: Any) -> Sregs:
    # A segment is base, limit, attributes, selector, reserved; then the other fields in C's order.
    n = _SREGS.unpack(ffi.buffer(struct))
    segments = [Segment(n[i + 3], n[i], n[i + 1], n[i + 2]) for i in range(0, 32, 4)]
    gdt_base, idt_base, gdt_limit, idt_limit, *control = n[32:43]
    return Sregs._make((*segments, gdt_base, gdt_limit, idt_base, idt_limit, *control, n[43:47], n[47]))


def from_sregs(sregs: Sregs) -> Any:
    """A new struct pyhv_sregs."""
    segments = [(s.base, s.limit, s.attributes, s.selector) for s in sregs[:8]]
    tables = (sregs.gdt_base, sregs.idt_base, sregs.gdt_limit, sregs.idt_limit)
    return ffi.new("struct pyhv_sregs *", (*segments, *tables, *sregs[12:]))


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
        str(to_exception(exit.error)) if exit.stop == Stop.FAILED or exit.error.what[0] != b"\0" else "",
    )


def to_counters(counters: Any) -> dict[str, int]:
    return {name: getattr(counters, name) for name, _ in ffi.typeof("struct pyhv_counters").fields}


def to_bytes(struct: Any) -> bytes:
    """Those of what a pointer points to, or of an array."""
    return bytes(ffi.buffer(struct))


def view(name: str, data: bytes) -> Any:
    """Bytes as a struct NAME, which is not to be written to. Raises ValueError for another number of them."""
    if len(data) != ffi.sizeof(f"struct {name}"):
        raise ValueError(f"struct {name} has not {len(data)} bytes")
    return ffi.from_buffer(f"struct {name} *", data)


class StateBuffer:
    """A struct pyhv_state and its vCPUs: where the engine puts a state, and takes one from."""

    def __init__(self, vcpus: int) -> None:
        self._vcpus = ffi.new("struct pyhv_vcpu_state[]", vcpus)
        self.head: Any = ffi.new("struct pyhv_state *", {"vcpu_count": vcpus, "vcpus": self._vcpus})
        self._bytes = ffi.buffer(self._vcpus)

    def take(self) -> RawState:
        """What the engine has put there."""
        from pyhv.accel.state import RawState, RawVcpu

        vcpus = []
        for number, vcpu in enumerate(self._vcpus):
            at = number * _VCPU_SIZE
            regs, sregs, events, debugregs = [self._bytes[at + place.start : at + place.stop] for place in _FIXED]
            vcpus.append(
                RawVcpu(
                    regs,
                    sregs,
                    events,
                    debugregs,
                    vcpu.xcr0,
                    vcpu.mp_state,
                    self._piece(at, "msr_indices", 4 * vcpu.msr_count),
                    self._piece(at, "msr_values", 8 * vcpu.msr_count),
                    self._piece(at, "lapic", vcpu.lapic_size),
                    self._piece(at, "xsave", vcpu.xsave_size),
                )
            )
        head = self.head
        chip = to_bytes(ffi.addressof(head, "irqchip")) if head.has_irqchip else b""
        return RawState(tuple(vcpus), chip, bool(head.has_pit), head.clock, head.tsc_khz)

    def _piece(self, at: int, name: str, size: int) -> bytes:
        start = at + _PIECES[name].start
        piece: bytes = self._bytes[start : start + size]
        return piece

    def put(self, state: RawState) -> None:
        """Puts a state there, for the engine. Raises ValueError for bytes that are none."""
        if len(state.vcpus) != len(self._vcpus):
            raise ValueError(f"it has {len(state.vcpus)} vCPUs, the VM {len(self._vcpus)}")
        for number, (vcpu, saved) in enumerate(zip(self._vcpus, state.vcpus, strict=True)):
            at = number * _VCPU_SIZE
            fixed = saved.regs, saved.sregs, saved.events, saved.debugregs
            for name, place, data in zip(_FIXED_NAMES, _FIXED, fixed, strict=True):
                if len(data) != place.stop - place.start:
                    raise ValueError(f"struct pyhv_{name} has not {len(data)} bytes")
                self._bytes[at + place.start : at + place.stop] = data
            vcpu.xcr0, vcpu.mp_state = saved.xcr0, saved.mp_state
            vcpu.msr_count = _msr_count(saved)
            vcpu.xsave_size, vcpu.lapic_size = len(saved.xsave), len(saved.lapic)
            for name, piece in _PIECES.items():
                data = getattr(saved, name)
                if len(data) > piece.stop - piece.start:
                    raise ValueError(f"{name}: {len(data)} bytes, at most {piece.stop - piece.start} are possible")
                self._bytes[at + piece.start : at + piece.start + len(data)] = data
        self.head.clock, self.head.tsc_khz = state.clock, state.tsc_khz
        self.head.has_irqchip, self.head.has_pit = bool(state.irqchip), state.pit
        if state.irqchip:
            self.head.irqchip = view("pyhv_irqchip", state.irqchip)[0]


def _place(name: str) -> slice:
    start = ffi.offsetof("struct pyhv_vcpu_state", name)
    field = next(field for known, field in ffi.typeof("struct pyhv_vcpu_state").fields if known == name)
    return slice(start, start + ffi.sizeof(field.type))


# Where in a struct pyhv_vcpu_state a RawVcpu's bytes are: whole structures, and arrays that are used in part.
_FIXED_NAMES = ("regs", "sregs", "events", "debugregs")
_FIXED = [_place(name) for name in _FIXED_NAMES]
_PIECES = {name: _place(name) for name in ("msr_indices", "msr_values", "lapic", "xsave")}
_VCPU_SIZE: int = ffi.sizeof("struct pyhv_vcpu_state")


@functools.lru_cache(maxsize=8)
def msr_rules(numbers: tuple[int, ...], absent: frozenset[int]) -> Any:
    """struct pyhv_msr_rule[] for MSRs (ascending), of which this host does not have `absent`. Read-only."""
    from pyhv.cpu import msrs

    rules = []
    for number in numbers:
        msr = msrs.BY_NUMBER[number]
        flags = 0 if msr.usual is None else lib.PYHV_MSR_UNUSUAL
        flags |= lib.PYHV_MSR_ABSENT if number in absent else 0
        flags |= 0 if msr.listed else lib.PYHV_MSR_UNSURE
        flags |= lib.PYHV_MSR_NEEDLESS if number == msrs.AMD64_DE_CFG else 0
        rules.append((number, flags, msr.usual or 0, msr.name.encode()))
    return ffi.new("struct pyhv_msr_rule[]", rules)


def _msr_count(raw: RawVcpu) -> int:
    """How many MSRs there are. Raises ValueError for bytes that are no pairs of index and value."""
    count = len(raw.msr_indices) // 4
    if (len(raw.msr_indices), len(raw.msr_values)) != (4 * count, 8 * count):
        raise ValueError(f"{len(raw.msr_indices)} bytes of indices, {len(raw.msr_values)} of values are no MSRs")
    if count > lib.PYHV_STATE_MSRS_MAX:
        raise ValueError(f"{count} MSRs, at most {lib.PYHV_STATE_MSRS_MAX} are possible")
    return count


def msrs(raw: RawVcpu) -> dict[int, int]:
    """Index -> value. Raises ValueError for bytes that are no such pairs."""
    count = _msr_count(raw)
    return dict(zip(unpack(f"<{count}I", raw.msr_indices), unpack(f"<{count}Q", raw.msr_values), strict=True))


def to_state(raw: RawState) -> ProcessorsState:
    """The records of what an accelerator has handed out."""
    from pyhv.accel.data import Regs
    from pyhv.accel.state import DebugRegs, Events, ProcessorsState, VcpuState

    vcpus = []
    for index, vcpu in enumerate(raw.vcpus):
        debugregs = view("pyhv_debugregs", vcpu.debugregs)
        vcpus.append(
            VcpuState(
                vcpu=index,
                regs=record(Regs, view("pyhv_regs", vcpu.regs)),
                sregs=to_sregs(view("pyhv_sregs", vcpu.sregs)),
                xcr0=vcpu.xcr0,
                xsave=vcpu.xsave.rstrip(b"\0"),
                msrs=msrs(vcpu),
                lapic=vcpu.lapic,
                events=record(Events, view("pyhv_events", vcpu.events)),
                debugregs=DebugRegs(tuple(debugregs.db), debugregs.dr6, debugregs.dr7),
                mp_state=vcpu.mp_state,
            )
        )
    chip = to_irqchip(view("pyhv_irqchip", raw.irqchip), raw.pit) if raw.irqchip else None
    return ProcessorsState(tuple(vcpus), chip, raw.clock, raw.tsc_khz)


def from_state(state: ProcessorsState) -> RawState:
    """And back. Raises OverflowError, IndexError, TypeError or ValueError for what no structure can hold."""
    from pyhv.accel.state import RawState, RawVcpu

    vcpus = tuple(
        RawVcpu(
            regs=to_bytes(struct("pyhv_regs", vcpu.regs)),
            sregs=to_bytes(from_sregs(vcpu.sregs)),
            events=to_bytes(struct("pyhv_events", vcpu.events)),
            debugregs=to_bytes(struct("pyhv_debugregs", vcpu.debugregs)),
            xcr0=vcpu.xcr0,
            mp_state=vcpu.mp_state,
            msr_indices=to_bytes(ffi.new("uint32_t[]", list(vcpu.msrs))),
            msr_values=to_bytes(ffi.new("uint64_t[]", list(vcpu.msrs.values()))),
            lapic=vcpu.lapic,
            xsave=vcpu.xsave,
        )
        for vcpu in state.vcpus
    )
    chip = state.irqchip
    raw_chip = to_bytes(from_irqchip(chip)) if chip is not None else b""
    return RawState(vcpus, raw_chip, chip is not None and bool(chip.pit), state.clock, state.tsc_khz)


def to_irqchip(chip: Any, pit: bool) -> Irqchip:
    """pit: whether the VM has one."""
    from pyhv.accel.state import Ioapic, Irqchip, Pic, PitChannel

    ioapic = chip.ioapic
    return Irqchip(
        pic=records(Pic, chip.pic),
        ioapic=Ioapic(ioapic.base_address, ioapic.ioregsel, ioapic.id, ioapic.irr, tuple(ioapic.redirection)),
        pit=records(PitChannel, chip.pit) if pit else (),
        pit_flags=chip.pit_flags,
    )


def from_irqchip(irqchip: Irqchip) -> Any:
    """A new struct pyhv_irqchip."""
    return ffi.new(
        "struct pyhv_irqchip *",
        {
            "pic": irqchip.pic,
            "ioapic": irqchip.ioapic._asdict(),
            "pit": irqchip.pit,
            "pit_flags": irqchip.pit_flags,
        },
    )

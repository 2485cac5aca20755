"""A vCPU set directly into 64-bit mode: descriptor tables and registers.

Source of the formats: SDM Vol. 3, "Segment Descriptors", "64-bit TSS", "IDT Gate Descriptors in IA-32e Mode".
"""

from __future__ import annotations

import struct

from pyhv.accel.data import Segment, Sregs

CODE, DATA, USER_DATA, USER_CODE, TSS = 0x08, 0x10, 0x1B, 0x23, 0x28

PRESENT, WRITABLE, USER, LARGE_PAGE = 1 << 0, 1 << 1, 1 << 2, 1 << 7

_GDT_ENTRIES = 7
_TSS_SIZE = 104
_CR0 = 0x80010033  # PG, WP, NE, ET, MP, PE
_CR4 = 0x620  # OSXMMEXCPT, OSFXSR, PAE
_EFER = 0x500  # LMA, LME


def gdt(tss: int) -> bytes:
    """The descriptor table for the selectors above, with the task-state segment at `tss` (below 16 MiB)."""
    return struct.pack(
        f"<{_GDT_ENTRIES}Q",
        0,
        0x00AF9B000000FFFF,  # 0x08: 64-bit code, CPL 0
        0x00CF93000000FFFF,  # 0x10: data, CPL 0
        0x00CFF3000000FFFF,  # 0x18: data, CPL 3 (data before code: SYSRET's order)
        0x00AFFB000000FFFF,  # 0x20: 64-bit code, CPL 3
        0x0000890000000000 | _TSS_SIZE - 1 | tss << 16,  # 0x28: available 64-bit TSS, two entries long
        0,
    )


def task_state(rsp0: int) -> bytes:
    """A task-state segment with the stack for CPL 0; its I/O map lies beyond the limit: CPL 3 has no ports."""
    return struct.pack("<IQ", 0, rsp0).ljust(_TSS_SIZE - 2, b"\0") + struct.pack("<H", _TSS_SIZE)


def gate(handler: int) -> bytes:
    """An interrupt gate of the IDT to `handler` at CPL 0."""
    low = handler & 0xFFFF | CODE << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48
    return struct.pack("<2Q", low, handler >> 32)


def sregs(reset: Sregs, cr3: int, gdt: int, tss: int, idt: int = 0, idt_limit: int = 0, cpl: int = 0) -> Sregs:
    """Registers of a vCPU in 64-bit mode at `cpl`. reset: its registers after reset, of which the rest is kept."""
    code = Segment(USER_CODE if cpl else CODE, 0, 0xFFFFFFFF, 0xA09B | cpl << 5)
    data = Segment(USER_DATA if cpl else DATA, 0, 0xFFFFFFFF, 0xC093 | cpl << 5)
    return reset._replace(
        cs=code,
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(TSS, tss, _TSS_SIZE - 1, 0x008B),
        ldt=Segment(0, 0, 0, 1 << 16),
        gdt_base=gdt,
        gdt_limit=_GDT_ENTRIES * 8 - 1,
        idt_base=idt,
        idt_limit=idt_limit,
        cr0=_CR0,
        cr3=cr3,
        cr4=_CR4,
        efer=_EFER,
    )

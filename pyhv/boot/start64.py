"""The state in which ELF64 and flat images start: 64-bit mode at CPL 0. guest_images/README.md documents it for
authors of guests; these numbers are that page's.

Source of the formats: SDM Vol. 3, "Paging" (4-level paging, 2-MiB pages), "Segment Descriptors", "64-bit TSS".
"""

from __future__ import annotations

import struct

from pyhv.accel.protocol import Regs, Segment, Sregs
from pyhv.boot.image import Image
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.vm.memory import GuestMemory

LOAD_BASE = 0x100000

_GDT, _TSS = 0x1000, 0x1100
_PML4, _PDPT, _PAGE_DIRECTORIES = 0x2000, 0x3000, 0x4000
_COMMAND_LINE, _COMMAND_LINE_SIZE = 0x8000, 0x1000
_STACK_TOP = 0x80000

_CODE, _DATA, _USER_CODE, _USER_DATA, _TSS_SELECTOR = 0x08, 0x10, 0x18, 0x20, 0x28

_PRESENT_WRITABLE = 0x3
_LARGE_PAGE = 1 << 7
_CR0 = 0x80010033  # PG, WP, NE, ET, MP, PE
_CR4 = 0x620  # OSXMMEXCPT, OSFXSR, PAE
_EFER = 0x500  # LMA, LME
_APIC_BASE = 0xFEE00000 | 1 << 11  # enabled
_APIC_BASE_BSP = 1 << 8


def load(image: Image, memory: GuestMemory, command_line: str, vcpus: int, sregs: Sregs) -> tuple[Regs, Sregs]:
    """Puts the image and the start state into memory; returns vCPU 0's registers.

    sregs: the vCPU's registers after reset, of which CR8 and the like are kept. Raises BadInput when something does
    not fit.
    """
    for segment in image.segments:
        if segment.gpa + segment.size > memory.low_size:
            raise BadInput(
                image.name,
                f"needs memory up to 0x{segment.gpa + segment.size:x}, the guest has 0x{memory.low_size:x} bytes",
                "give it more (--mem)",
            )
        memory.write(segment.gpa, segment.data)
    _write_tables(memory)
    memory.write(_COMMAND_LINE, encode_command_line(command_line))
    data = Segment(_DATA, 0, 0xFFFFFFFF, 0xC093)
    start = sregs._replace(
        cs=Segment(_CODE, 0, 0xFFFFFFFF, 0xA09B),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(_TSS_SELECTOR, _TSS, 103, 0x008B),
        ldt=Segment(0, 0, 0, 0x10000),
        gdt_base=_GDT,
        gdt_limit=7 * 8 - 1,
        idt_base=0,
        idt_limit=0,
        cr0=_CR0,
        cr3=_PML4,
        cr4=_CR4,
        efer=_EFER,
        apic_base=_APIC_BASE | _APIC_BASE_BSP,
    )
    return Regs(rip=image.entry, rsp=_STACK_TOP, rdi=_COMMAND_LINE, rsi=memory.low_size, rdx=vcpus), start


def encode_command_line(command_line: str) -> bytes:
    """The bytes of a command line with their final NUL. Raises BadInput for one that does not fit."""
    data = command_line.encode()
    if len(data) >= _COMMAND_LINE_SIZE:
        raise BadInput("command line", f"is {len(data)} bytes long, at most {_COMMAND_LINE_SIZE - 1} fit")
    if b"\0" in data:
        raise BadInput("command line", "contains a NUL character")
    return data + b"\0"


def _write_tables(memory: GuestMemory) -> None:
    gdt = struct.pack(
        "<7Q",
        0,
        0x00AF9B000000FFFF,  # 0x08: 64-bit code, CPL 0
        0x00CF93000000FFFF,  # 0x10: data
        0x00AFFB000000FFFF,  # 0x18: 64-bit code, CPL 3
        0x00CFF3000000FFFF,  # 0x20: data, CPL 3
        0x0000890000000067 | (_TSS & 0xFFFFFF) << 16 | (_TSS >> 24) << 56,  # 0x28: available TSS, 104 bytes
        0,
    )
    memory.write(_GDT, gdt)
    # Reserved, RSP0, then nothing up to the I/O map's offset: past the limit, so that CPL 3 has no ports.
    memory.write(_TSS, struct.pack("<IQ", 0, _STACK_TOP).ljust(102, b"\0") + struct.pack("<H", 104))
    memory.write(_PML4, struct.pack("<Q", _PDPT | _PRESENT_WRITABLE))
    directories = [_PAGE_DIRECTORIES + 0x1000 * i for i in range(4)]
    memory.write(_PDPT, struct.pack("<4Q", *(d | _PRESENT_WRITABLE for d in directories)))
    entries = (page << 21 | _LARGE_PAGE | _PRESENT_WRITABLE for page in range(2048))
    memory.write(_PAGE_DIRECTORIES, struct.pack("<2048Q", *entries))

"""The state in which ELF64 and flat images start: 64-bit mode at CPL 0. guest_images/README.md documents it for
authors of guests; these numbers are that page's."""

from __future__ import annotations

import struct

from pyhv.accel import long_mode
from pyhv.accel.data import Regs, Sregs
from pyhv.boot.image import Image
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.vm.memory import GuestMemory

LOAD_BASE = 0x100000

GDT, TSS = 0x1000, 0x1100
PML4, _PDPT, _PAGE_DIRECTORIES = 0x2000, 0x3000, 0x4000
_COMMAND_LINE, _COMMAND_LINE_SIZE = 0x8000, 0x1000
STACK_TOP = 0x80000


def load(image: Image, memory: GuestMemory, command_line: str, vcpus: int, reset: Sregs) -> tuple[Regs, Sregs]:
    """Puts the image and the start state into memory; returns vCPU 0's registers.

    reset: the vCPU's registers after reset. Raises BadInput when something does not fit.
    """
    write_segments(image, memory)
    memory.write(GDT, long_mode.gdt(TSS))
    memory.write(TSS, long_mode.task_state(STACK_TOP))
    write_page_tables(memory)
    memory.write(_COMMAND_LINE, encode_command_line(command_line))
    regs = Regs(rip=image.entry, rsp=STACK_TOP, rdi=_COMMAND_LINE, rsi=memory.low_size, rdx=vcpus)
    return regs, long_mode.sregs(reset, PML4, GDT, TSS)


def write_segments(image: Image, memory: GuestMemory) -> None:
    """Puts the image itself into memory. Raises BadInput where it does not fit."""
    for segment in image.segments:
        if segment.gpa + segment.size > memory.low_size:
            raise BadInput(
                image.name,
                f"needs memory up to 0x{segment.gpa + segment.size:x}, the guest has 0x{memory.low_size:x} bytes",
                "give the guest more memory",
            )
        memory.write(segment.gpa, segment.data)


def command_line_for(image: Image, command_line: str) -> bytes:
    """As encode_command_line(), of a line that the image takes. Raises BadInput for one that is too long for it."""
    line = encode_command_line(command_line)
    if len(line) - 1 > image.longest_line:
        raise BadInput(
            "command line", f"is {len(line) - 1} bytes long, {image.name} takes at most {image.longest_line}"
        )
    return line


def encode_command_line(command_line: str, what: str = "command line") -> bytes:
    """The bytes of a command line with their final NUL. what: its name in errors. Raises BadInput for one that does not
    fit, or that no guest could be given."""
    try:
        data = command_line.encode()
    except UnicodeEncodeError:  # bytes that the shell passed on
        raise BadInput(what, "is not UTF-8 text") from None
    if len(data) >= _COMMAND_LINE_SIZE:
        raise BadInput(what, f"is {len(data)} bytes long, at most {_COMMAND_LINE_SIZE - 1} fit")
    if b"\0" in data:
        raise BadInput(what, "contains a NUL character")
    return data + b"\0"


def write_page_tables(memory: GuestMemory) -> None:
    """At PML4: identity map of the first 4 GiB in 2 MiB pages (SDM Vol. 3, "4-Level Paging")."""
    table = long_mode.PRESENT | long_mode.WRITABLE
    memory.write(PML4, struct.pack("<Q", _PDPT | table))
    memory.write(_PDPT, struct.pack("<4Q", *(_PAGE_DIRECTORIES + 0x1000 * i | table for i in range(4))))
    first = table | long_mode.LARGE_PAGE
    memory.write(_PAGE_DIRECTORIES, struct.pack("<2048Q", *range(first, first + (4 << 30), 2 << 20)))

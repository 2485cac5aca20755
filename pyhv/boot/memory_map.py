"""What kernels are told of the guest's physical memory, and where the loaders put what they tell.

The map is a PC's: RAM up to 639 KiB, tables below 1 MiB (pc.py), RAM again from 1 MiB on.
"""

from __future__ import annotations

import struct

from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.vm.memory import GuestMemory

# Types of the BIOS call E820 (ACPI specification, "Address Range Types"); all boot protocols have taken them over.
RAM, RESERVED = 1, 2

LOW_END = 0x9FC00  # a PC keeps the last KiB below 640 KiB for its firmware
TABLES, TABLES_END = 0xE0000, 0x100000
# KVM's own pages for real-mode code (csrc/kvm/vm.c), and above them what a PC has its firmware in.
_FIRMWARE, _FIRMWARE_END = 0xFFFBC000, 1 << 32


class Area(NamedTuple):
    """A piece of the map. kind: RAM or RESERVED."""

    gpa: int
    size: int
    kind: int


def areas(memory: GuestMemory) -> list[Area]:
    """The map, ascending."""
    low, *high = memory.regions
    return [
        Area(0, LOW_END, RAM),
        Area(LOW_END, 0xA0000 - LOW_END, RESERVED),
        Area(TABLES, TABLES_END - TABLES, RESERVED),
        Area(TABLES_END, low[1] - TABLES_END, RAM),
        Area(_FIRMWARE, _FIRMWARE_END - _FIRMWARE, RESERVED),
        *(Area(gpa, size, RAM) for gpa, size, _ in high),
    ]


def e820(memory: GuestMemory) -> bytes:
    """The map in E820's own format: u64 address, u64 size, u32 type."""
    return b"".join(struct.pack("<QQI", *area) for area in areas(memory))


class LowMemory:
    """Puts one thing behind the other below 640 KiB, where a loader leaves them for a kernel to find."""

    START = 0x8000

    def __init__(self, memory: GuestMemory, start: int = START) -> None:
        self._memory = memory
        self._next = start

    def place(self, what: str, data: bytes, alignment: int = 8) -> int:
        """Where `data` is now. what: its name in the error. Raises BadInput where there is no more room."""
        gpa = self._next + -self._next % alignment
        if gpa + len(data) > LOW_END:
            raise BadInput(what, f"its {len(data)} bytes do not fit below 640 KiB")
        self._memory.write(gpa, data)
        self._next = gpa + len(data)
        return gpa

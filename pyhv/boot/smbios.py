"""SMBIOS tables: who made this machine. Linux reads them for its DMI names, and trusts a PCI bus without devices only
where they date the firmware later than 2000. Pure: bytes from values.

Source: DMTF DSP0134 3.7, chapters 5 (entry point), 6.1 (strings), 7.1, 7.2 and 7.45 (types 0, 1 and 127).
"""

from __future__ import annotations

import struct

from pyhv.boot.acpi import checksummed
from pyhv.version import VERSION

_MAJOR, _MINOR = 2, 8
_FIRMWARE_DATE = "11/23/2026"  # when these tables were last changed

# Type 0: characteristics are not told; in their second extension byte: this is a virtual machine.
_NO_CHARACTERISTICS, _IS_VIRTUAL = 1 << 3, 1 << 4
_NOT_TOLD = 0xFF
_POWER_SWITCH = 6  # type 1: what woke it up


def structures(uuid: str) -> list[bytes]:
    """The structures: firmware, system with the VM's UUID, end of table."""
    bits = uuid.replace("-", "")
    # Its first three fields are little-endian here.
    mixed = struct.pack("<IHH", int(bits[:8], 16), int(bits[8:12], 16), int(bits[12:16], 16)) + bytes.fromhex(bits[16:])
    numbers = struct.pack(
        "<HBBQBBBBBB", 0, 3, 0, _NO_CHARACTERISTICS, 0, _IS_VIRTUAL, *(_NOT_TOLD for _ in range(4))
    )
    return [
        _structure(0, b"\1\2" + numbers, "pyhv", VERSION, _FIRMWARE_DATE),
        _structure(1, b"\1\2\3\0" + mixed + struct.pack("<BBB", _POWER_SWITCH, 0, 0), "pyhv", "PC", VERSION),
        _structure(127, b""),
    ]


def entry_point(gpa: int, tables: list[bytes]) -> bytes:
    """The entry point, at a multiple of 16, to the structures, which are at `gpa`."""
    size = sum(len(table) for table in tables)
    inner = checksummed(struct.pack("<5sBHIHB", b"_DMI_", 0, size, gpa, len(tables), _MAJOR << 4 | _MINOR), 5)
    longest = max(len(table) for table in tables)
    outer = struct.pack("<4sBBBBHB5x", b"_SM_", 0, 16 + len(inner), _MAJOR, _MINOR, longest, 0)
    return checksummed(outer + inner, 4)


def _structure(kind: int, formatted: bytes, *strings: str) -> bytes:
    """A structure: header, its formatted part, and the strings that it refers to by number, from 1 on. The types are
    the handles too."""
    head = struct.pack("<BBH", kind, 4 + len(formatted), kind)
    return head + formatted + (b"".join(text.encode("ascii") + b"\0" for text in strings) or b"\0") + b"\0"

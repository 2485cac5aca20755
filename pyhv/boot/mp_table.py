"""The MP table: interrupt controllers and processors for kernels that know no ACPI. Pure: bytes from numbers.

Source: Intel, MultiProcessor Specification 1.4, chapter 4.
"""

from __future__ import annotations

import struct

from pyhv.boot.acpi import IO_APIC, LOCAL_APIC, checksummed

_VERSION = 4  # 1.4
_LOCAL_APIC_VERSION, _IO_APIC_VERSION = 0x14, 0x11  # as KVM's say
_ENABLED, _BOOTS = 1, 2
_INT, _NMI, _EXT_INT = 0, 1, 3
_LEVEL_HIGH = 0xD
_ALL = 0xFF


def pointer(table: int) -> bytes:
    """The floating pointer structure to the table; at a multiple of 16."""
    return checksummed(struct.pack("<4sIBBB5x", b"_MP_", table, 1, _VERSION, 0), 10)


def table(vcpus: int, signature: int, features: int, sci: int) -> bytes:
    """The configuration table. signature, features: EAX and EDX of the vCPUs' CPUID leaf 1. sci: the interrupt that is
    level triggered."""
    # The I/O APIC's id must be none of the processors'.
    io_apic, isa = vcpus, 0
    entries = [
        struct.pack(
            "<BBBBII8x", 0, index, _LOCAL_APIC_VERSION, _ENABLED | (0 if index else _BOOTS), signature, features
        )
        for index in range(vcpus)
    ]
    entries.append(struct.pack("<BB6s", 1, isa, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, io_apic, _IO_APIC_VERSION, _ENABLED, IO_APIC))
    for irq in range(16):
        flags = _LEVEL_HIGH if irq == sci else 0
        entries.append(struct.pack("<BBHBBBB", 3, _INT, flags, isa, irq, io_apic, irq))
    entries.append(struct.pack("<BBHBBBB", 4, _EXT_INT, 0, isa, 0, 0, 0))
    entries.append(struct.pack("<BBHBBBB", 4, _NMI, 0, isa, 0, _ALL, 1))
    body = b"".join(entries)
    head = struct.pack(
        "<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), _VERSION, 0, b"PYHV    ", b"PC          ", 0, 0,
        len(entries), LOCAL_APIC, 0, 0, 0,
    )  # fmt: skip
    return checksummed(head + body, 7)

"""ACPI tables of the virtual PC: RSDP, RSDT and XSDT, FADT, FACS, MADT and DSDT. Pure: bytes from numbers.

Source: ACPI specification 6.4, chapters 5 (tables), 19 and 20 (AML), 6.4 (resource descriptors). The devices behind the
numbers are those of vm/devices.py.
"""

from __future__ import annotations

import struct

LOCAL_APIC, IO_APIC = 0xFEE00000, 0xFEC00000

_OEM = b"PYHV  "
_TABLE_OEM = b"PYHVPC  "
_CREATOR = b"PYHV"

# The reset register: a byte with this value to port 0xcf9 (csrc/devices/chipset.c).
_RESET_PORT, _RESET_VALUE = 0xCF9, 0x06

# FADT flags: WBINVD works, C1 does; no power button, no sleep button, no RTC among the fixed events; the timer has 32
# bits; there is a reset register.
_FADT_FLAGS = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10
# IAPC_BOOT_ARCH: ISA devices; no VGA; no MSI. Not bit 1: no keyboard controller to look for, only its reset line.
_BOOT_ARCH = 1 << 0 | 1 << 2 | 1 << 3
_CMOS_CENTURY = 0x32

_LEVEL_HIGH = 0xD  # MPS INTI flags: active high, level triggered


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table: the header that all of them have, and a body."""
    head = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, _OEM, _TABLE_OEM, 1, _CREATOR, 1)
    return checksummed(head + body, 9)


def checksummed(data: bytes, at: int) -> bytes:
    """`data` with the byte at `at` such that all of them add up to 0 modulo 256."""
    return data[:at] + bytes([-(sum(data) - data[at]) & 0xFF]) + data[at + 1 :]


def rsdp(rsdt: int, xsdt: int) -> bytes:
    """The root pointer to the two root tables."""
    first = checksummed(struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM, 2, rsdt), 8)
    return checksummed(first + struct.pack("<IQB3x", 36, xsdt, 0), 32)


def rsdt(tables: list[int]) -> bytes:
    """The root table with 32-bit addresses, which old kernels look for."""
    return table(b"RSDT", 1, struct.pack(f"<{len(tables)}I", *tables))


def xsdt(tables: list[int]) -> bytes:
    """The root table with 64-bit addresses."""
    return table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables))


def facs() -> bytes:
    """The table that firmware and kernel share. It must begin at a multiple of 64."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def fadt(dsdt: int, facs: int, pm_port: int, sci: int) -> bytes:
    """The table of the fixed hardware: power management registers at `pm_port`, whose interrupt is `sci`."""
    event, control, timer, gpe = pm_port, pm_port + 4, pm_port + 8, pm_port + 12
    none = bytes(12)
    body = b"".join(
        (
            struct.pack("<IIBBHI4B", facs, dsdt, 0, 0, sci, 0, 0, 0, 0, 0),
            struct.pack("<8I", event, 0, control, 0, 0, timer, gpe, 0),
            # Lengths of the registers; no C2 and C3 (latencies beyond what the specification allows).
            struct.pack("<8B", 4, 2, 0, 4, 2, 0, 0, 0),
            struct.pack("<HHHH5BHBI", 0xFFF, 0xFFF, 0, 0, 0, 0, 0, 0, _CMOS_CENTURY, _BOOT_ARCH, 0, _FADT_FLAGS),
            _register(_RESET_PORT, 8, 1),
            struct.pack("<BHBQQ", _RESET_VALUE, 0, 1, 0, dsdt),
            _register(event, 32, 2),
            none,
            _register(control, 16, 2),
            none,
            none,
            _register(timer, 32, 4),
            _register(gpe, 16, 1),
            none,
            none,
            none,
            b"pyhv\0\0\0\0",
        )
    )
    return table(b"FACP", 6, body)


def madt(vcpus: int, sci: int) -> bytes:
    """The table of the interrupt controllers. APIC ids are the vCPUs' numbers."""
    entries = [struct.pack("<BBBBI", 0, 8, index, index, 1) for index in range(vcpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, IO_APIC, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, sci, sci, _LEVEL_HIGH))
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI at LINT1 of all
    pcat_compatible = 1  # there are two 8259s too
    return table(b"APIC", 5, struct.pack("<II", LOCAL_APIC, pcat_compatible) + b"".join(entries))


def dsdt(generation_id: int, generation_event: int, pvpanic_port: int) -> bytes:
    """The table of the devices: COM1, the RTC, firmware configuration, pvpanic, the VM generation ID; and S5, whose
    type is 0. generation_id: guest-physical address. generation_event: the general-purpose event of its change."""
    address = _package(_integer(generation_id & 0xFFFFFFFF), _integer(generation_id >> 32))
    devices = (
        _device("COM1", "PNP0501", _io(0x3F8, 8) + _irq(4), _name("_UID", _integer(1))),
        _device("RTC_", "PNP0B00", _io(0x70, 2) + _irq(8)),
        _device("FWCF", "QEMU0002", _io(0x510, 2)),
        _device("PEVT", "QEMU0001", _io(pvpanic_port, 1)),
        _device(
            "VGEN",
            "PYHV0001",  # kernels look for the compatible id
            b"",
            _name("_CID", _string("VM_Gen_Counter")),
            _name("_DDN", _string("VM_Gen_Counter")),
            _name("ADDR", address),
        ),
    )
    notify = b"\x86" + b"\\" + b"\x2e_SB_VGEN" + _integer(0x80)
    body = (
        _name("\\_S5_", _package(_integer(0), _integer(0), _integer(0), _integer(0)))
        + _scope("\\_SB_", *devices)
        + _scope("\\_GPE", _method(f"_E{generation_event:02X}", notify))
    )
    return table(b"DSDT", 2, body)


def _register(port: int, bits: int, access: int) -> bytes:
    """The generic address of a register in port space that takes accesses of 1, 2 or 4 bytes."""
    return struct.pack("<BBBBQ", 1, bits, 0, access.bit_length(), port)


# ------------------------------------------------------------------------------------------------ AML


def _sized(content: bytes) -> bytes:
    """A PkgLength, which counts itself, and the content."""
    if len(content) + 1 < 1 << 6:
        return bytes([len(content) + 1]) + content
    extra = 1 if len(content) + 2 < 1 << 12 else 2
    size = len(content) + 1 + extra
    return bytes([extra << 6 | size & 0xF]) + (size >> 4).to_bytes(extra, "little") + content


def _integer(value: int) -> bytes:
    if value < 2:
        return bytes([value])  # ZeroOp, OneOp
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    return b"\x0e" + value.to_bytes(8, "little")


def _string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def _name(name: str, value: bytes) -> bytes:
    return b"\x08" + name.encode("ascii") + value


def _package(*items: bytes) -> bytes:
    return b"\x12" + _sized(bytes([len(items)]) + b"".join(items))


def _scope(name: str, *terms: bytes) -> bytes:
    return b"\x10" + _sized(name.encode("ascii") + b"".join(terms))


def _method(name: str, body: bytes) -> bytes:
    """A method without arguments."""
    return b"\x14" + _sized(name.encode("ascii") + b"\0" + body)


def _device(name: str, hardware_id: str, resources: bytes, *terms: bytes) -> bytes:
    identity = b"\x0c" + _eisa_id(hardware_id) if hardware_id.startswith("PNP") else _string(hardware_id)
    objects = [_name("_HID", identity), _name("_STA", _integer(0xF)), *terms]
    if resources:
        template = resources + b"\x79\0"  # the end tag; its checksum 0 counts as right
        objects.append(_name("_CRS", b"\x11" + _sized(_integer(len(template)) + template)))
    return b"\x5b\x82" + _sized(name.encode("ascii") + b"".join(objects))


def _eisa_id(text: str) -> bytes:
    """Three letters of five bits and four hexadecimal digits, high byte first."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    return (letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)).to_bytes(4, "big")


def _io(port: int, count: int) -> bytes:
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 0, count)


def _irq(number: int) -> bytes:
    """Edge triggered, active high, as on the ISA bus."""
    return struct.pack("<BH", 0x22, 1 << number)

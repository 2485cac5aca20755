"""What makes a VM a small PC for a kernel: the tables below 1 MiB, firmware configuration, the VM generation ID.

Images that declare themselves (guest_images/README.md) get none of it unless they ask.
"""

from __future__ import annotations

import os
import struct
import time

from pyhv.boot import acpi, mp_table, smbios
from pyhv.boot.memory_map import LOW_END, TABLES, e820
from pyhv.boot.start64 import encode_command_line
from pyhv.errors import BadInput
from pyhv.vm.devices import ACPI_PM_IRQ, ACPI_PM_PORT, GENERATION_EVENT, GENERATION_ID, PVPANIC_PORT, UART_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.vm.vm import Vm

RSDP = TABLES
_ACPI, _MP, _SMBIOS = TABLES + 0x200, 0xF0000, 0xF8000  # _MP has 5 KiB at the most
_GENERATION_SIZE = 16

# The BIOS data area, and words in it by their offsets (Phoenix, "System BIOS for IBM PCs", BIOS data area; the same in
# SeaBIOS, src/biosvar.h).
_BIOS_DATA, _BIOS_DATA_SIZE = 0x400, 0x100
_COM1, _EBDA_SEGMENT, _EQUIPMENT, _LOW_KIB, _TICKS = 0x00, 0x0E, 0x10, 0x13, 0x6C
_HAS_FPU, _SERIAL_PORTS_SHIFT = 1 << 1, 9
_TICKS_A_DAY = 0x1800B0  # of the 8254 when it divides by 65536

# Keys of firmware configuration (QEMU, docs/specs/fw_cfg.rst and include/standard-headers/linux/qemu_fw_cfg.h).
_SIGNATURE, _ID, _RAM_SIZE, _NB_CPUS, _MAX_CPUS = 0x00, 0x01, 0x03, 0x05, 0x0F
_CMDLINE_SIZE, _CMDLINE_DATA, _FILE_DIRECTORY, _FIRST_FILE = 0x14, 0x15, 0x19, 0x20
_ID_TRADITIONAL = 1  # no DMA


def furnish(vm: Vm, command_line: str, uuid: str) -> int:
    """Puts the tables into the memory of a VM that is a pc and has never run, and fills its firmware configuration.
    uuid: the VM's. Returns where the ACPI tables begin. Raises BadInput for a command line that is too long."""
    leaf = vm.tables[0].get(1)
    _write_bios_data(vm)
    _write_acpi(vm)
    table = mp_table.table(len(vm.vcpus), leaf.eax, leaf.edx, ACPI_PM_IRQ)
    pointer = mp_table.pointer(_MP + 16)
    vm.memory.write(_MP, pointer)
    vm.memory.write(_MP + len(pointer), table)
    assert _MP + len(pointer) + len(table) <= _SMBIOS
    tables = smbios.structures(uuid)
    entry = smbios.entry_point(_SMBIOS + 32, tables)
    vm.memory.write(_SMBIOS, entry.ljust(32, b"\0") + b"".join(tables))
    vm.memory.write(GENERATION_ID, os.urandom(_GENERATION_SIZE))
    line = encode_command_line(command_line)
    items = {
        _SIGNATURE: b"QEMU",
        _ID: struct.pack("<I", _ID_TRADITIONAL),
        _RAM_SIZE: struct.pack("<Q", vm.memory.size),
        _NB_CPUS: struct.pack("<H", len(vm.vcpus)),
        _MAX_CPUS: struct.pack("<H", len(vm.vcpus)),
        _CMDLINE_SIZE: struct.pack("<I", len(line)),
        _CMDLINE_DATA: line,
        **_files({"etc/e820": e820(vm.memory), "etc/vmgenid_addr": struct.pack("<Q", GENERATION_ID)}),
    }
    for key, data in items.items():
        vm.devices.configure(key, data)
    return RSDP


def renew_generation(vm: Vm) -> None:
    """Tells the guest of a pc, one that was restored, that it is a copy. Raises BadInput where its state says that the
    VM generation ID is outside its memory."""
    try:
        vm.memory.write(vm.devices.generation_id, os.urandom(_GENERATION_SIZE))
    except BadInput as error:
        raise BadInput("VM generation ID", error.problem) from None
    vm.devices.tell_generation()


def _write_bios_data(vm: Vm) -> None:
    """What a BIOS leaves in its data area at 0x400. Early code asks there how much low memory is free, to put its
    trampoline below. There is no BIOS behind these words; what is not there (video, disks, parallel ports) is 0, as it
    is on a PC without."""
    data = bytearray(_BIOS_DATA_SIZE)
    for offset, size, value in (
        (_COM1, 2, UART_PORT),
        (_EBDA_SEGMENT, 2, LOW_END >> 4),
        (_EQUIPMENT, 2, _HAS_FPU | 1 << _SERIAL_PORTS_SHIFT),
        (_LOW_KIB, 2, LOW_END >> 10),
        (_TICKS, 4, int(time.time()) % 86400 * _TICKS_A_DAY // 86400),
    ):
        data[offset : offset + size] = value.to_bytes(size, "little")
    vm.memory.write(_BIOS_DATA, bytes(data))
    # The extended area begins with its own size in KiB.
    vm.memory.write(LOW_END, bytes([(0xA0000 - LOW_END) >> 10]))


def _write_acpi(vm: Vm) -> None:
    """The ACPI tables: the pointer at RSDP, where kernels look for it, the others behind."""
    at = _ACPI

    def write(table: bytes) -> int:
        nonlocal at
        gpa = at
        at = gpa + len(table) + -len(table) % 64  # FACS must be aligned so
        assert at <= _MP
        vm.memory.write(gpa, table)
        return gpa

    dsdt = write(acpi.dsdt(GENERATION_ID, GENERATION_EVENT, PVPANIC_PORT))
    facs = write(acpi.facs())
    fadt = write(acpi.fadt(dsdt, facs, ACPI_PM_PORT, ACPI_PM_IRQ))
    madt = write(acpi.madt(len(vm.vcpus), ACPI_PM_IRQ))
    roots = write(acpi.rsdt([fadt, madt])), write(acpi.xsdt([fadt, madt]))
    vm.memory.write(RSDP, acpi.rsdp(*roots))


def _files(files: dict[str, bytes]) -> dict[int, bytes]:
    """Items for named files and for their directory, whose numbers are big-endian."""
    items: dict[int, bytes] = {}
    directory = struct.pack(">I", len(files))
    for key, (name, data) in enumerate(files.items(), _FIRST_FILE):
        directory += struct.pack(">IHxx56s", len(data), key, name.encode("ascii"))
        items[key] = data
    return {_FILE_DIRECTORY: directory, **items}

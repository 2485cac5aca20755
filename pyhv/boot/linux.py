"""Linux's own boot protocol: a bzImage, entered in 64-bit mode. (An uncompressed vmlinux is booted by PVH.)

Source: Linux, Documentation/arch/x86/boot.rst and zero-page.rst. The file's numbers are checked before they are used.
"""

from __future__ import annotations

import struct

from pyhv.accel import long_mode
from pyhv.accel.data import Regs, Segment, Sregs
from pyhv.boot.image import Image, Module
from pyhv.boot.image import Segment as Piece
from pyhv.boot.memory_map import LowMemory, areas, e820
from pyhv.boot.pvh import place_at_top
from pyhv.boot.start64 import GDT, PML4, STACK_TOP, TSS, command_line_for, write_page_tables, write_segments
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.boot.image import Content
    from pyhv.vm.memory import GuestMemory

# The set-up header: where it begins, in the file and in the boot parameters, and fields of it, by their offsets there.
_HEADER = 0x1F1
_SETUP_SECTS, _SYSSIZE, _BOOT_FLAG = 0x1F1, 0x1F4, 0x1FE
_JUMP = 0x201  # the second byte of a jump over the header: its length
_MAGIC, _VERSION = 0x202, 0x206
_TYPE_OF_LOADER, _CODE32_START, _RAMDISK, _COMMAND_LINE = 0x210, 0x214, 0x218, 0x228
_INITRD_ADDR_MAX, _XLOADFLAGS, _CMDLINE_SIZE = 0x22C, 0x236, 0x238
_PREF_ADDRESS, _INIT_SIZE = 0x258, 0x260
_HEADER_MAX = 0x290  # the E820 map is at 0x2d0, after the EDD buffer

# Other fields of the boot parameters ("zero page").
_PARAMETERS_SIZE = 4096
_ACPI_RSDP, _E820_ENTRIES, _E820_TABLE = 0x070, 0x1E8, 0x2D0

_KERNEL_64 = 1 << 0  # in xloadflags: there is a 64-bit entry, at 0x200
_ENTRY_64 = 0x200
_LEAST_VERSION = 0x20C  # the first with xloadflags, Linux 3.8
_UNKNOWN_LOADER = 0xFF

_CODE, _DATA = 0x10, 0x18  # the selectors that the protocol asks for


def parse(data: Content, name: str) -> Image:
    """The image of a bzImage's bytes. Raises BadInput."""
    if data[_MAGIC : _MAGIC + 4] != b"HdrS":
        what = "is an ELF file: an uncompressed kernel, which PVH boots" if data[:4] == b"\x7fELF" else ""
        magic = data[_MAGIC : _MAGIC + 4].hex(" ") or "the file ends before"
        raise BadInput(name, what or f"is no Linux kernel: no HdrS at 0x202, but {magic}", "leave --boot out")
    if len(data) < _PREF_ADDRESS + 16:
        raise BadInput(name, f"is a Linux kernel cut off in its set-up header ({len(data)} bytes)")
    version, boot_flag = _get(data, _VERSION, 2), _get(data, _BOOT_FLAG, 2)
    shown = f"{version >> 8}.{version & 0xFF}"
    if boot_flag != 0xAA55:
        raise BadInput(name, f"is a damaged Linux kernel: its boot flag is 0x{boot_flag:04x}, not 0xaa55")
    if version < _LEAST_VERSION:
        raise BadInput(name, f"speaks boot protocol {shown}, too old: 2.12 (Linux 3.8) is the first that pyhv speaks")
    if not _get(data, _XLOADFLAGS, 2) & _KERNEL_64:
        raise BadInput(name, "has no 64-bit entry point", "give a kernel for x86-64")
    setup = ((data[_SETUP_SECTS] or 4) + 1) * 512
    header_end = min(_JUMP + 1 + data[_JUMP], _HEADER_MAX)
    if len(data) <= setup:
        raise BadInput(name, f"is cut off in its set-up ({len(data)} of {setup} bytes), before the kernel")
    kernel = memoryview(data)[setup:]
    if len(kernel) < _get(data, _SYSSIZE, 4) * 16:
        raise BadInput(name, f"is cut off ({len(kernel)} of {_get(data, _SYSSIZE, 4) * 16} bytes of the kernel)")
    address, size = _get(data, _PREF_ADDRESS, 8), _get(data, _INIT_SIZE, 4)
    if not 0x100000 <= address < 1 << 32 or size < len(kernel) or len(kernel) <= _ENTRY_64:
        raise BadInput(name, f"is a damaged Linux kernel: {len(kernel)} bytes that need 0x{size:x} at 0x{address:x}")
    header = bytes(data[_HEADER:header_end]).ljust(_HEADER_MAX - _HEADER, b"\0")
    return Image(
        name,
        "linux",
        address + _ENTRY_64,
        (Piece(address, kernel, size),),
        (),
        None,
        longest_line=_get(data, _CMDLINE_SIZE, 4),
        header=header,
    )


def load(
    image: Image, memory: GuestMemory, command_line: str, modules: tuple[Module, ...], rsdp: int, reset: Sregs
) -> tuple[Regs, Sregs]:
    """Puts the kernel, its initrd (the only module, if any) and the boot parameters into memory; returns vCPU 0's
    registers.

    rsdp: where the ACPI tables begin. reset: the vCPU's registers after reset. Raises BadInput when something does not
    fit.
    """
    write_segments(image, memory)
    (kernel,) = image.segments
    parameters = bytearray(_PARAMETERS_SIZE)
    parameters[_HEADER:_HEADER_MAX] = image.header
    low = LowMemory(memory)
    line = low.place("command line", command_line_for(image, command_line))
    _put(parameters, _COMMAND_LINE, line, 4)
    limit = _get(parameters, _INITRD_ADDR_MAX, 4) + 1
    (initrd,) = place_at_top(modules, memory, image.name, kernel.gpa + kernel.size, limit) or (0,)
    _put(parameters, _RAMDISK, initrd, 4)
    _put(parameters, _RAMDISK + 4, len(modules[0].data) if modules else 0, 4)
    parameters[_TYPE_OF_LOADER] = _UNKNOWN_LOADER
    _put(parameters, _CODE32_START, kernel.gpa, 4)
    _put(parameters, _ACPI_RSDP, rsdp, 8)
    table = e820(memory)
    parameters[_E820_TABLE : _E820_TABLE + len(table)] = table
    parameters[_E820_ENTRIES] = len(areas(memory))
    regs = Regs(rip=image.entry, rsi=low.place("boot parameters", bytes(parameters), 0x1000), rsp=STACK_TOP)
    return regs, _sregs(memory, reset)


def _sregs(memory: GuestMemory, reset: Sregs) -> Sregs:
    """64-bit mode, the first 4 GiB mapped, with the protocol's own selectors and a table that has them."""
    _, code, data, *_, tss, rest = struct.unpack("<7Q", long_mode.gdt(TSS))
    memory.write(GDT, struct.pack("<7Q", 0, 0, code, data, 0, tss, rest))
    memory.write(TSS, long_mode.task_state(STACK_TOP))
    write_page_tables(memory)
    sregs = long_mode.sregs(reset, PML4, GDT, TSS)
    flat = Segment(_DATA, 0, 0xFFFFFFFF, sregs.ds.attributes)
    return sregs._replace(cs=sregs.cs._replace(selector=_CODE), ds=flat, es=flat, fs=flat, gs=flat, ss=flat)


def _get(data: Content | bytearray, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def _put(data: bytearray, offset: int, value: int, size: int) -> None:
    data[offset : offset + size] = value.to_bytes(size, "little")

"""Linux's own boot protocol, which other programs speak too: a bzImage, entered in 64-bit mode, or in 32-bit mode where
it has no 64-bit entry. (An uncompressed vmlinux is booted by PVH.)

Source: Linux, Documentation/arch/x86/boot.rst and zero-page.rst. The file's numbers are checked before they are used.
"""

from __future__ import annotations

import struct

from pyhv.accel import long_mode
from pyhv.accel.data import Regs, Segment, Sregs
from pyhv.boot import protected32
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
_TYPE_OF_LOADER, _LOADFLAGS, _CODE32_START, _RAMDISK, _COMMAND_LINE = 0x210, 0x211, 0x214, 0x218, 0x228
_INITRD_ADDR_MAX, _RELOCATABLE_KERNEL, _XLOADFLAGS, _CMDLINE_SIZE = 0x22C, 0x234, 0x236, 0x238
_PREF_ADDRESS, _INIT_SIZE = 0x258, 0x260
_HEADER_MAX = 0x290  # the E820 map is at 0x2d0, after the EDD buffer

# Other fields of the boot parameters ("zero page").
_PARAMETERS_SIZE = 4096
_ACPI_RSDP, _E820_ENTRIES, _E820_TABLE = 0x070, 0x1E8, 0x2D0

_LOADED_HIGH = 1 << 0  # in loadflags: the kernel belongs at 1 MiB and not, as in the beginning, at 64 KiB
_KERNEL_64 = 1 << 0  # in xloadflags: there is a 64-bit entry, at 0x200
_ENTRY_64 = 0x200
_HIGH = 0x100000

# Versions of the protocol: with a pointer to the command line, the first that is spoken here; with all of syssize;
# with cmdline_size; with pref_address and init_size; with xloadflags.
_LEAST, _WIDE_SYSSIZE, _HAS_CMDLINE_SIZE, _HAS_INIT_SIZE, _HAS_XLOADFLAGS = (
    0x202, 0x204, 0x206, 0x20A, 0x20C,
)  # fmt: skip
_OLD_CMDLINE_SIZE, _OLD_INITRD_MAX = 255, 0x37FFFFFF
# How much of its size an old kernel needs to unpack itself, which it does not tell; GRUB's figure.
_OLD_UNPACKED = 3
_UNKNOWN_LOADER = 0xFF

_CODE, _DATA = 0x10, 0x18  # the selectors that the protocol asks for
_CODE_32, _DATA_32 = 0x00CF9B000000FFFF, 0x00CF93000000FFFF


def parse(data: Content, name: str) -> Image:
    """The image of a bzImage's bytes. Raises BadInput."""
    if data[_MAGIC : _MAGIC + 4] != b"HdrS":
        what = "is an ELF file: an uncompressed kernel, which PVH boots" if data[:4] == b"\x7fELF" else ""
        magic = data[_MAGIC : _MAGIC + 4].hex(" ") or "the file ends before"
        raise BadInput(name, what or f"is no Linux kernel: no HdrS at 0x202, but {magic}", "name no boot protocol")
    if len(data) < _PREF_ADDRESS + 16:
        raise BadInput(name, f"is a Linux kernel cut off in its set-up header ({len(data)} bytes)")
    version, boot_flag = _get(data, _VERSION, 2), _get(data, _BOOT_FLAG, 2)
    shown = f"{version >> 8}.{version & 0xFF:02}"
    if boot_flag != 0xAA55:
        raise BadInput(name, f"is a damaged Linux kernel: its boot flag is 0x{boot_flag:04x}, not 0xaa55")
    if version < _LEAST:
        raise BadInput(name, f"speaks boot protocol {shown}, too old: 2.02 (Linux 2.4) is the first that pyhv speaks")
    if not data[_LOADFLAGS] & _LOADED_HIGH:
        raise BadInput(name, "is a zImage, which its 16-bit code puts into its place: it needs a BIOS")
    setup = ((data[_SETUP_SECTS] or 4) + 1) * 512
    header_end = min(_JUMP + 1 + data[_JUMP], _HEADER_MAX)
    if len(data) <= setup:
        raise BadInput(name, f"is cut off in its set-up ({len(data)} of {setup} bytes), before the kernel")
    kernel = memoryview(data)[setup:]
    # In units of 16 bytes, the last of which need not be whole.
    if version >= _WIDE_SYSSIZE and -(-len(kernel) // 16) < _get(data, _SYSSIZE, 4):
        raise BadInput(name, f"is cut off ({len(kernel)} of {_get(data, _SYSSIZE, 4) * 16} bytes of the kernel)")
    header = bytes(data[_HEADER:header_end]).ljust(_HEADER_MAX - _HEADER, b"\0")
    address, end = _place(data, version, len(kernel))
    if not _HIGH <= address < 1 << 32 or end - address < len(kernel):
        needed = f"{len(kernel)} bytes that need 0x{end - address:x} at 0x{address:x}"
        raise BadInput(name, f"is a damaged Linux kernel: {needed}")
    entry = _ENTRY_64 if _is_64(data) else _get(data, _CODE32_START, 4) - _HIGH
    if not 0 <= entry < len(kernel):
        if _get(data, _CODE32_START, 4) == 0 and not _is_64(data):
            raise BadInput(name, "has a 16-bit entry only, which needs a BIOS (its code32_start is 0)")
        raise BadInput(name, f"is a damaged Linux kernel: it is entered 0x{entry:x} bytes behind its beginning")
    longest = _get(data, _CMDLINE_SIZE, 4) if version >= _HAS_CMDLINE_SIZE else _OLD_CMDLINE_SIZE
    piece = Piece(address, kernel, end - address)
    return Image(name, "linux", address + entry, (piece,), (), None, longest_line=longest, header=header)


def _is_64(data: Content | bytearray) -> bool:
    """Whether the kernel has a 64-bit entry. data: with its header in its place."""
    return _get(data, _VERSION, 2) >= _HAS_XLOADFLAGS and bool(_get(data, _XLOADFLAGS, 2) & _KERNEL_64)


def _place(data: Content, version: int, size: int) -> tuple[int, int]:
    """Where a kernel of `size` bytes belongs, and where what it needs ends."""
    if version < _HAS_INIT_SIZE:
        return _HIGH, _HIGH + size * _OLD_UNPACKED
    preferred = _get(data, _PREF_ADDRESS, 8)
    end = preferred + _get(data, _INIT_SIZE, 4)
    return preferred if data[_RELOCATABLE_KERNEL] else _HIGH, end


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
    limit = (_get(parameters, _INITRD_ADDR_MAX, 4) or _OLD_INITRD_MAX) + 1
    (initrd,) = place_at_top(modules, memory, image.name, kernel.gpa + kernel.size, limit) or (0,)
    _put(parameters, _RAMDISK, initrd, 4)
    _put(parameters, _RAMDISK + 4, len(modules[0].data) if modules else 0, 4)
    parameters[_TYPE_OF_LOADER] = _UNKNOWN_LOADER
    is_64 = _is_64(parameters)
    _put(parameters, _CODE32_START, kernel.gpa if is_64 else image.entry, 4)
    _put(parameters, _ACPI_RSDP, rsdp, 8)
    table = e820(memory)
    parameters[_E820_TABLE : _E820_TABLE + len(table)] = table
    parameters[_E820_ENTRIES] = len(areas(memory))
    regs = Regs(rip=image.entry, rsi=low.place("boot parameters", bytes(parameters), 0x1000), rsp=STACK_TOP)
    return regs, _sregs_64(memory, reset) if is_64 else _sregs_32(memory, reset)


def _sregs_64(memory: GuestMemory, reset: Sregs) -> Sregs:
    """64-bit mode, the first 4 GiB mapped, with the protocol's own selectors and a table that has them."""
    _, code, data, *_, tss, rest = struct.unpack("<7Q", long_mode.gdt(TSS))
    memory.write(GDT, struct.pack("<7Q", 0, 0, code, data, 0, tss, rest))
    memory.write(TSS, long_mode.task_state(STACK_TOP))
    write_page_tables(memory)
    sregs = long_mode.sregs(reset, PML4, GDT, TSS)
    return _select(sregs, Segment(_DATA, 0, 0xFFFFFFFF, sregs.ds.attributes))


def _sregs_32(memory: GuestMemory, reset: Sregs) -> Sregs:
    """32-bit protected mode without paging, likewise."""
    table = struct.pack("<4Q", 0, 0, _CODE_32, _DATA_32)
    memory.write(GDT, table)
    sregs = protected32.sregs(reset)._replace(gdt_base=GDT, gdt_limit=len(table) - 1)
    return _select(sregs, sregs.ds._replace(selector=_DATA))


def _select(sregs: Sregs, data: Segment) -> Sregs:
    return sregs._replace(cs=sregs.cs._replace(selector=_CODE), ds=data, es=data, fs=data, gs=data, ss=data)


def _get(data: Content | bytearray, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def _put(data: bytearray, offset: int, value: int, size: int) -> None:
    data[offset : offset + size] = value.to_bytes(size, "little")

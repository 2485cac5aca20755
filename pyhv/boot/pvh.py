"""PVH: an ELF kernel (Linux' vmlinux is one) that is entered in 32-bit protected mode with a start-info structure.

Sources: Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct

from pyhv.accel.data import Regs, Sregs
from pyhv.boot import elf as elf_file
from pyhv.boot import protected32
from pyhv.boot.image import Image, Module
from pyhv.boot.memory_map import LowMemory, areas
from pyhv.boot.start64 import command_line_for, encode_command_line, write_segments
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.boot.elf import Elf
    from pyhv.boot.image import Content
    from pyhv.vm.memory import GuestMemory

_MAGIC = 0x336EC578
_VERSION = 1
_START_INFO = struct.Struct("<IIII4QII")
_MODULE = struct.Struct("<4Q")
_AREA = struct.Struct("<QQII")

# Linux copies 2,048 bytes, the NUL among them, and gets lost before its console where there is none (asm/setup.h,
# COMMAND_LINE_SIZE). What other kernels take, nothing tells.
_LINUX_LONGEST_LINE = 2047


def parse(elf: Elf, data: Content, name: str) -> Image:
    """The image of an ELF file that was read. Raises BadInput."""
    entry = elf.pvh_entry
    if entry is None:
        raise BadInput(name, "has no note that says where PVH enters it", "name no boot protocol")
    loaded = elf_file.segments(elf, data, name)
    elf_file.check_entry(entry, loaded, name)
    image = Image(name, "pvh", entry, loaded, (), None, elf.isa_level)
    return image._replace(longest_line=_LINUX_LONGEST_LINE) if elf.is_linux else image


def load(
    image: Image, memory: GuestMemory, command_line: str, modules: tuple[Module, ...], rsdp: int, reset: Sregs
) -> tuple[Regs, Sregs]:
    """Puts the kernel, its modules and the start info into memory; returns vCPU 0's registers.

    rsdp: where the ACPI tables begin. reset: the vCPU's registers after reset. Raises BadInput when something does not
    fit.
    """
    write_segments(image, memory)
    low = LowMemory(memory)
    end = max(segment.gpa + segment.size for segment in image.segments)
    entries = b""
    for module, gpa in zip(modules, place_at_top(modules, memory, image.name, end), strict=True):
        words = encode_command_line(module.arguments, f"string of module {module.name}")
        entries += _MODULE.pack(gpa, len(module.data), low.place(module.name, words) if module.arguments else 0, 0)
    list_gpa = low.place("module list", entries) if entries else 0
    line_gpa = low.place("command line", command_line_for(image, command_line))
    table = b"".join(_AREA.pack(*area, 0) for area in areas(memory))
    map_gpa = low.place("memory map", table)
    info = _START_INFO.pack(
        _MAGIC, _VERSION, 0, len(modules), list_gpa, line_gpa, rsdp, map_gpa, len(table) // _AREA.size, 0
    )
    regs = Regs(rip=image.entry, rbx=low.place("start info", info))
    return regs, protected32.sregs(reset)


def place_at_top(
    modules: tuple[Module, ...], memory: GuestMemory, kernel: str, kernel_end: int, limit: int = 1 << 32
) -> list[int]:
    """Puts each module, the first one highest, on a page below `limit` and below the hole under 4 GiB, and above the
    kernel; where they are. Raises BadInput where they do not fit."""
    places = []
    top = min(memory.low_size, limit)
    for module in modules:
        top = (top - len(module.data)) & ~0xFFF
        if top < kernel_end:
            raise BadInput(
                module.name,
                f"its {len(module.data)} bytes do not fit between the end of {kernel} at 0x{kernel_end:x} and "
                f"0x{min(memory.low_size, limit):x}",
                "give the guest more memory",
            )
        memory.write(top, module.data)
        places.append(top)
    return places

"""Multiboot 1: kernels that carry a header of that name, as ELF files or with their addresses in it (the a.out kludge).

Source: Multiboot Specification 0.6.96. As boot loaders do, the command line begins with the image's name, and a
module's string is all that stood on pyhv's command line for it.
"""

from __future__ import annotations

import os
import struct

from pyhv.accel.data import Regs, Sregs
from pyhv.boot import elf as elf_file
from pyhv.boot import protected32
from pyhv.boot.image import Image, Module, Segment
from pyhv.boot.memory_map import LOW_END, RAM, TABLES_END, LowMemory, areas
from pyhv.boot.start64 import encode_command_line, write_segments
from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.boot.elf import Elf
    from pyhv.boot.image import Content
    from pyhv.vm.memory import GuestMemory

_MAGIC, _BOOTED = 0x1BADB002, 0x2BADB002
_LOWEST = 0x1000  # where a kernel may be loaded; below are real mode's vectors and the BIOS's data
_SEARCH = 8192  # the header is in the first so many bytes, aligned to 4
_HEADER, _ADDRESSES = struct.Struct("<III"), struct.Struct("<5I")

# Bits of the header's flags; those below 16 are demands.
_PAGE_ALIGN, _MEMORY, _VIDEO, _HAS_ADDRESSES = 1 << 0, 1 << 1, 1 << 2, 1 << 16
_MET = _PAGE_ALIGN | _MEMORY  # modules are always aligned, memory is always told

# Bits of the information's flags: mem_lower and mem_upper, command line, modules, memory map, the loader's name.
_INFO_FLAGS = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
_INFO = struct.Struct("<17I")
_MODULE, _AREA = struct.Struct("<4I"), struct.Struct("<IQQI")


class Header(NamedTuple):
    """A multiboot header. at: its offset in the file."""

    at: int
    flags: int


def find(data: Content) -> Header | None:
    """The header in an image; None: there is none."""
    magic = _MAGIC.to_bytes(4, "little")
    at = -1
    while (at := data.find(magic, at + 1, _SEARCH)) >= 0:
        if at % 4 == 0 and at + _HEADER.size <= len(data):
            _, flags, checksum = _HEADER.unpack_from(data, at)
            if (_MAGIC + flags + checksum) & 0xFFFFFFFF == 0:
                return Header(at, flags)
    return None


def parse(data: Content, name: str, elf: Elf | None = None) -> Image:
    """The image of a kernel's bytes. elf: what was read where it is an ELF file; addresses in the multiboot header go
    before those in an ELF file's. Raises BadInput."""
    header = _find(data, name)
    if header.flags & _HAS_ADDRESSES:
        return _parse_flat(header, data, name)
    if elf is None:
        raise BadInput(name, "is a multiboot kernel that is neither an ELF file nor tells its addresses in the header")
    loaded = elf_file.segments(elf, data, name, low=True)
    entry = elf.entry
    for part in elf.headers:  # kernels that are linked high have a virtual address here
        if part.type == elf_file.PT_LOAD and part.vaddr <= entry < part.vaddr + part.memsz:
            entry += part.paddr - part.vaddr
            break
    _check_places(loaded, name)
    elf_file.check_entry(entry, loaded, name)
    return Image(name, "multiboot", entry, loaded, (), None, elf.isa_level)


def _parse_flat(header: Header, data: Content, name: str) -> Image:
    """The image of a file with addresses in its multiboot header."""
    if header.at + _HEADER.size + _ADDRESSES.size > len(data):
        raise BadInput(name, "is cut off in its multiboot header")
    header_gpa, start, load_end, bss_end, entry = _ADDRESSES.unpack_from(data, header.at + _HEADER.size)
    shown = f"header 0x{header_gpa:x}, load 0x{start:x} to 0x{load_end:x}, bss to 0x{bss_end:x}, entry 0x{entry:x}"
    offset = header.at - (header_gpa - start)
    if header_gpa < start or offset < 0:
        raise BadInput(name, f"the addresses in its multiboot header cannot be ({shown}): it lies before the file")
    size = load_end - start if load_end else len(data) - offset
    if size <= 0 or offset + size > len(data):
        raise BadInput(name, f"the addresses in its multiboot header ({shown}) ask for more than the file has")
    memory_size = bss_end - start if bss_end else size
    if memory_size < size:
        raise BadInput(name, f"the addresses in its multiboot header cannot be ({shown}): the bss ends before the data")
    loaded = (Segment(start, memoryview(data)[offset : offset + size], memory_size),)
    _check_places(loaded, name)
    elf_file.check_entry(entry, loaded, name)
    return Image(name, "multiboot", entry, loaded, (), None)


def _check_places(loaded: tuple[Segment, ...], name: str) -> None:
    """Raises BadInput where something is to be loaded where a PC has no RAM for it."""
    for segment in loaded:
        if segment.gpa < _LOWEST or (segment.gpa < TABLES_END and segment.gpa + segment.size > LOW_END):
            place = f"0x{segment.gpa:x} to 0x{segment.gpa + segment.size:x}"
            advice = "link it at 0x100000 or above"
            raise BadInput(name, f"is to be loaded at {place}, where a PC has no RAM for it", advice)


def load(
    image: Image, memory: GuestMemory, command_line: str, modules: tuple[Module, ...], rsdp: int, reset: Sregs
) -> tuple[Regs, Sregs]:
    """Puts the kernel, its modules and the information structure into memory; returns vCPU 0's registers.

    rsdp: not told; such kernels look for it below 1 MiB. reset: the vCPU's registers after reset. Raises BadInput when
    something does not fit.
    """
    write_segments(image, memory)
    ends = [segment.gpa + segment.size for segment in image.segments]
    low = LowMemory(memory, max([LowMemory.START, *(end for end in ends if end <= LOW_END)]))
    entries = b""
    gpa = max(TABLES_END, *ends)
    for module in modules:
        gpa += -gpa % 0x1000
        if gpa + len(module.data) > memory.low_size:
            raise BadInput(
                module.name,
                f"its {len(module.data)} bytes do not fit between 0x{gpa:x} and 0x{memory.low_size:x}",
                "give the guest more memory",
            )
        memory.write(gpa, module.data)
        words = encode_command_line(f"{module.name} {module.arguments}".rstrip(), f"string of module {module.name}")
        entries += _MODULE.pack(gpa, gpa + len(module.data), low.place(module.name, words), 0)
        gpa += len(module.data)
    list_gpa = low.place("module list", entries)
    line = f"{os.path.basename(image.name)} {command_line}".rstrip()
    line_gpa = low.place("command line", encode_command_line(line))
    # Each entry begins with its size, which does not count itself.
    table = b"".join(_AREA.pack(_AREA.size - 4, *area) for area in areas(memory))
    map_gpa = low.place("memory map", table)
    name_gpa = low.place("loader's name", b"pyhv\0")
    upper = next(area.size for area in areas(memory) if area.gpa == TABLES_END and area.kind == RAM)
    info = _INFO.pack(
        *(_INFO_FLAGS, LOW_END >> 10, upper >> 10, 0, line_gpa, len(modules), list_gpa, 0, 0, 0, 0),
        *(len(table), map_gpa, 0, 0, 0, name_gpa),
    )
    regs = Regs(rip=image.entry, rax=_BOOTED, rbx=low.place("multiboot information", info))
    return regs, protected32.sregs(reset)


def _find(data: Content, name: str) -> Header:
    header = find(data)
    if header is None:
        raise BadInput(name, f"has no multiboot header in its first {_SEARCH} bytes", "name no boot protocol")
    if unmet := header.flags & 0xFFFF & ~_MET:
        if unmet == _VIDEO:
            raise BadInput(name, "its multiboot header demands a video mode, and the guest has no screen")
        raise BadInput(name, f"its multiboot header demands what pyhv does not know (flags 0x{header.flags:x})")
    return header

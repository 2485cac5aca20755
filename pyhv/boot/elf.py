"""ELF: what a file says, and ELF64 executables, which are entered in 64-bit mode with the start state of start64.py.

Sources: System V ABI, "Object Files"; AMD64 ABI supplement, and its "Program Property" for the ISA level. Every number
in the file is checked before it is used.
"""

from __future__ import annotations

import struct

from pyhv.boot.image import Image, Segment
from pyhv.boot.memory_map import LOW_END
from pyhv.boot.start64 import LOAD_BASE
from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyhv.boot.image import Content

_EHDR32, _EHDR64 = struct.Struct("<16sHHIIIIIHHHHHH"), struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR32, _PHDR64 = struct.Struct("<IIIIIIII"), struct.Struct("<IIQQQQQQ")
_NHDR = struct.Struct("<III")

_ET_REL, _ET_EXEC, _ET_DYN, _ET_CORE = 1, 2, 3, 4
_KINDS = {
    _ET_REL: "that is not linked: an object file or a kernel module",
    _ET_DYN: "position-independent or shared, not an executable",
    _ET_CORE: "that is a core dump",
}
EM_386, EM_X86_64 = 3, 62
_MACHINES = {
    EM_386: "i386",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC64",
    2: "SPARC",
    22: "S/390",
    40: "ARM",
    43: "SPARC64",
    50: "IA-64",
    EM_X86_64: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}
_MAX_HEADERS = 256  # each may name all of the file as its notes

PT_LOAD, PT_INTERP, _PT_NOTE, _PT_GNU_PROPERTY = 1, 3, 4, 0x6474E553

# The notes of owner "pyhv" (documented in guest_images/README.md).
_NOTE_OWNER = b"pyhv\0"
_NOTE_CPUID_SITES, _NOTE_USER_MODE, _NOTE_PC = 1, 2, 3
_MAX_SITES = 4  # the processor has four breakpoints

# Xen's public/elfnote.h: what kernel it is, and where it is entered by PVH.
_XEN_OWNER, _XEN_GUEST_OS, _XEN_PHYS32_ENTRY = b"Xen\0", 6, 18
_LINUX_OWNER = b"Linux\0"

# NT_GNU_ABI_TAG, which C libraries put into every program; NT_GNU_PROPERTY_TYPE_0 and in it
# GNU_PROPERTY_X86_ISA_1_NEEDED: bit n for level n + 1.
_GNU_OWNER, _GNU_ABI_TAG, _GNU_PROPERTY, _X86_ISA_NEEDED = b"GNU\0", 1, 5, 0xC0008002


class Header(NamedTuple):
    """A program header."""

    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int


class Elf(NamedTuple):
    """What an executable for x86 says about itself."""

    bits: int
    machine: int
    entry: int
    headers_end: int
    """Where the file's own headers end in it."""
    headers: tuple[Header, ...]
    notes: tuple[tuple[bytes, int, bytes], ...]
    """(owner, type, descriptor) of each note."""

    @property
    def is_ours(self) -> bool:
        """Whether it carries notes of pyhv's."""
        return any(owner == _NOTE_OWNER for owner, _, _ in self.notes)

    @property
    def pvh_entry(self) -> int | None:
        """Where PVH enters it; None: it does not say that it can be."""
        for owner, kind, value in self.notes:
            if (owner, kind) == (_XEN_OWNER, _XEN_PHYS32_ENTRY):
                return int.from_bytes(value[:8], "little")
        return None

    @property
    def is_linux(self) -> bool:
        """Whether its notes are those of Linux (include/linux/elfnote-lto.h, build-salt.h; arch/x86/xen/xen-head.S)."""
        return any(
            owner == _LINUX_OWNER or ((owner, kind) == (_XEN_OWNER, _XEN_GUEST_OS) and value.startswith(b"linux"))
            for owner, kind, value in self.notes
        )

    @property
    def is_for_an_os(self) -> bool:
        """Whether a C library has marked it as a program for its operating system."""
        return any((owner, kind) == (_GNU_OWNER, _GNU_ABI_TAG) for owner, kind, _ in self.notes)

    @property
    def isa_level(self) -> int:
        """The x86-64 level that it needs: 1 to 4; 1 where it says nothing."""
        level = 1
        for owner, kind, value in self.notes:
            if (owner, kind) == (_GNU_OWNER, _GNU_PROPERTY):
                level = max(level, _needed_level(value, self.bits // 8))
        return min(level, 4)


def read(data: Content, name: str) -> Elf:
    """The headers and notes of an executable for x86, of 32 or 64 bits. Raises BadInput."""
    bits = 32 if data[4:5] == b"\1" else 64
    ehdr, phdr = (_EHDR32, _PHDR32) if bits == 32 else (_EHDR64, _PHDR64)
    if len(data) < ehdr.size:
        raise BadInput(name, f"is an ELF file cut off in its header ({len(data)} of {ehdr.size} bytes)")
    ident, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = ehdr.unpack_from(data)
    if machine not in (EM_386, EM_X86_64) or (machine == EM_386 and bits == 64):
        raise BadInput(name, f"is not an x86 image but ELF for {_describe(bits, machine)}")
    if ident[5] != 1:
        raise BadInput(name, "is a big-endian ELF file, x86-64 is little-endian")
    if kind != _ET_EXEC:
        what = _KINDS.get(kind, f"of type {kind}, not an executable")
        raise BadInput(name, f"is an ELF file {what}", "" if kind == _ET_CORE else "link it with -static -no-pie")
    if phentsize != phdr.size or phoff + phnum * phdr.size > len(data):
        raise BadInput(name, f"its program headers ({phnum} of {phentsize} bytes at 0x{phoff:x}) lie outside the file")
    if phnum > _MAX_HEADERS:
        raise BadInput(name, f"has {phnum} program headers, more than any image needs (the most is {_MAX_HEADERS})")
    headers, notes = [], []
    for index in range(phnum):
        if bits == 32:
            p_type, offset, vaddr, paddr, filesz, memsz, _, align = phdr.unpack_from(data, phoff + index * phdr.size)
        else:
            p_type, _, offset, vaddr, paddr, filesz, memsz, align = phdr.unpack_from(data, phoff + index * phdr.size)
        if p_type in (PT_LOAD, _PT_NOTE, _PT_GNU_PROPERTY) and offset + filesz > len(data):
            raise BadInput(name, f"segment {index} (0x{filesz:x} bytes at offset 0x{offset:x}) lies outside the file")
        if p_type in (_PT_NOTE, _PT_GNU_PROPERTY):
            notes += _notes(data[offset : offset + filesz], align)
        headers.append(Header(p_type, offset, vaddr, paddr, filesz, memsz))
    return Elf(bits, machine, entry, phoff + phnum * phdr.size, tuple(headers), tuple(notes))


def segments(elf: Elf, data: Content, name: str, low: bool = False) -> tuple[Segment, ...]:
    """What is to be loaded. low: below 640 KiB too. Raises BadInput where that cannot be."""
    found: list[Segment] = []
    view = memoryview(data)
    for index, header in enumerate(elf.headers):
        _, offset, _, paddr, filesz, memsz = header
        if header.type != PT_LOAD or not memsz:
            continue
        if memsz < filesz:
            sizes = f"more bytes in the file (0x{filesz:x}) than in memory (0x{memsz:x})"
            raise BadInput(name, f"segment {index} has {sizes}")
        below = min(LOAD_BASE - paddr, filesz)
        if paddr >= (LOW_END if low else 0) and below > 0 and _is_headers_only(elf, data, offset, below):
            # Linkers put the file's headers in front of the first page of what was linked at 1 MiB.
            skipped = min(LOAD_BASE - paddr, memsz)
            offset, paddr, filesz, memsz = offset + skipped, LOAD_BASE, max(0, filesz - skipped), memsz - skipped
            if not memsz:
                continue
        if paddr < LOAD_BASE and not low:
            advice = "link it at 0x100000 or above"
            if not offset:
                advice += ", by ld -n, which leaves the file's headers out of its first segment"
            place = f"0x{paddr:x}, below 1 MiB, where the start state lies"
            raise BadInput(name, f"segment {index} is to be loaded at {place}", advice)
        found.append(Segment(paddr, view[offset : offset + filesz], memsz))
    if not found:
        raise BadInput(name, "has no segment to load")
    return tuple(found)


def _is_headers_only(elf: Elf, data: Content, offset: int, size: int) -> bool:
    """Whether the first `size` bytes of the file, a piece of a segment at `offset`, are its headers and notes."""
    if offset or size < elf.headers_end:
        return False
    rest = bytearray(data[:size])
    rest[: elf.headers_end] = bytes(elf.headers_end)
    for header in elf.headers:
        if header.type in (_PT_NOTE, _PT_GNU_PROPERTY) and header.offset + header.filesz <= size:
            rest[header.offset : header.offset + header.filesz] = bytes(header.filesz)
    return not any(rest)


def parse(data: Content, name: str) -> Image:
    """The image of an ELF64 executable's bytes. Raises BadInput."""
    return image(read(data, name), data, name)


def image(elf: Elf, data: Content, name: str) -> Image:
    """As parse(), of a file that was read."""
    if elf.bits != 64:
        raise BadInput(
            name,
            f"is not an x86-64 image but ELF for {_describe(elf.bits, elf.machine)}",
            "32-bit kernels are booted by multiboot and PVH",
        )
    sites: tuple[int, ...] = ()
    user_word: str | None = None
    wants_pc = False
    for owner, note, value in elf.notes:
        if owner != _NOTE_OWNER:
            continue
        if note == _NOTE_CPUID_SITES:
            sites = _parse_sites(value, name)
        elif note == _NOTE_USER_MODE:
            user_word = value.rstrip(b"\0").decode("ascii", "replace")
        elif note == _NOTE_PC:
            wants_pc = True
    loaded = segments(elf, data, name)
    check_entry(elf.entry, loaded, name)
    return Image(name, "elf64", elf.entry, loaded, sites, user_word, elf.isa_level, wants_pc)


def check_entry(entry: int, loaded: tuple[Segment, ...], name: str) -> None:
    """Raises BadInput for an entry point outside what is loaded."""
    if not any(s.gpa <= entry < s.gpa + s.size for s in loaded):
        raise BadInput(name, f"its entry point 0x{entry:x} lies in none of its segments")


def _describe(bits: int, machine: int) -> str:
    return f"{bits}-bit {_MACHINES.get(machine, f'machine {machine}')}"


def _notes(content: bytes, alignment: int) -> list[tuple[bytes, int, bytes]]:
    """(owner, type, descriptor) of each note in a note segment; whatever follows a malformed one is not looked at.

    Names and descriptors are padded to 4 bytes, or to 8 where that is the segment's alignment. Some files have the one
    and say the other: what counts is by which of them the notes end where the segment does.
    """
    first = 8 if alignment == 8 else 4
    found, whole = _padded_notes(content, first)
    if not whole:
        others, whole = _padded_notes(content, 12 - first)
        found = others if whole else found
    return found


def _padded_notes(content: bytes, padding: int) -> tuple[list[tuple[bytes, int, bytes]], bool]:
    """The notes, and whether they end where the content does."""
    found: list[tuple[bytes, int, bytes]] = []
    at = 0
    while at + _NHDR.size <= len(content):
        namesz, descsz, note = _NHDR.unpack_from(content, at)
        desc = at + _NHDR.size + namesz
        desc += -desc % padding
        if desc + descsz > len(content):
            return found, False
        found.append((content[at + _NHDR.size : at + _NHDR.size + namesz], note, content[desc : desc + descsz]))
        at = desc + descsz
        at += -at % padding
    return found, at >= len(content)


def _needed_level(properties: bytes, alignment: int) -> int:
    """The highest level among the properties of a note; whatever follows a malformed one is not looked at."""
    at = 0
    while at + 8 <= len(properties):
        kind, size = struct.unpack_from("<II", properties, at)
        value = properties[at + 8 : at + 8 + size]
        if kind == _X86_ISA_NEEDED and len(value) == 4:
            return int.from_bytes(value, "little").bit_length()
        at += 8 + size + -size % alignment
    return 1


def _parse_sites(value: bytes, name: str) -> tuple[int, ...]:
    if len(value) % 8 or not 1 <= len(value) // 8 <= _MAX_SITES:
        raise BadInput(name, f"its note of CPUID addresses has {len(value)} bytes, not 1 to {_MAX_SITES} times 8")
    return struct.unpack(f"<{len(value) // 8}Q", value)

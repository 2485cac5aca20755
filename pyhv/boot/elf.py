"""ELF64 executables, entered in 64-bit mode with the start state of start64.py.

Sources: System V ABI, "Object Files"; AMD64 ABI supplement. Every number in the file is checked before it is used.
"""

from __future__ import annotations

import struct

from pyhv.boot.image import Image, Segment
from pyhv.boot.start64 import LOAD_BASE
from pyhv.errors import BadInput

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_NHDR = struct.Struct("<III")

_ET_EXEC, _ET_DYN = 2, 3
_EM_X86_64 = 62
_MACHINES = {
    3: "i386",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC64",
    22: "S/390",
    40: "ARM",
    183: "AArch64",
    243: "RISC-V",
}
_PT_LOAD, _PT_NOTE = 1, 4

# The notes of owner "pyhv" (documented in guest_images/README.md).
_NOTE_OWNER = b"pyhv\0"
_NOTE_CPUID_SITES, _NOTE_USER_MODE = 1, 2
_MAX_SITES = 4  # the processor has four breakpoints


def parse(data: bytes, name: str) -> Image:
    """The image for an ELF file's bytes. Raises BadInput."""
    if len(data) < _EHDR.size:
        raise BadInput(name, f"is an ELF file cut off in its header ({len(data)} of {_EHDR.size} bytes)")
    ident, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = _EHDR.unpack_from(data)
    if ident[4] != 2 or machine != _EM_X86_64:
        what = f"{'64' if ident[4] == 2 else '32'}-bit {_MACHINES.get(machine, f'machine {machine}')}"
        raise BadInput(name, f"is not an x86-64 image but ELF for {what}")
    if ident[5] != 1:
        raise BadInput(name, "is a big-endian ELF file, x86-64 is little-endian")
    if kind != _ET_EXEC:
        what = "position-independent or shared" if kind == _ET_DYN else f"of type {kind}"
        raise BadInput(name, f"is an ELF file {what}, not an executable", "link it with -static -no-pie")
    if phentsize != _PHDR.size or phoff + phnum * _PHDR.size > len(data):
        raise BadInput(name, f"its program headers ({phnum} of {phentsize} bytes at 0x{phoff:x}) lie outside the file")

    segments: list[Segment] = []
    sites: tuple[int, ...] = ()
    user_word: str | None = None
    for index in range(phnum):
        p_type, _, offset, _, paddr, filesz, memsz, _ = _PHDR.unpack_from(data, phoff + index * _PHDR.size)
        if p_type not in (_PT_LOAD, _PT_NOTE):
            continue
        if offset + filesz > len(data):
            raise BadInput(name, f"segment {index} (0x{filesz:x} bytes at offset 0x{offset:x}) lies outside the file")
        content = data[offset : offset + filesz]
        if p_type == _PT_NOTE:
            for note, value in _notes(content):
                if note == _NOTE_CPUID_SITES:
                    sites = _parse_sites(value, name)
                elif note == _NOTE_USER_MODE:
                    user_word = value.rstrip(b"\0").decode("ascii", "replace")
        elif memsz:
            if memsz < filesz:
                sizes = f"more bytes in the file (0x{filesz:x}) than in memory (0x{memsz:x})"
                raise BadInput(name, f"segment {index} has {sizes}")
            if paddr < LOAD_BASE:
                raise BadInput(
                    name,
                    f"segment {index} is to be loaded at 0x{paddr:x}, below 1 MiB, where the start state lies",
                    "link it at 0x100000 or above",
                )
            segments.append(Segment(paddr, content, memsz))
    if not segments:
        raise BadInput(name, "has no segment to load")
    if not any(s.gpa <= entry < s.gpa + s.size for s in segments):
        raise BadInput(name, f"its entry point 0x{entry:x} lies in none of its segments")
    return Image(name, "elf64", entry, tuple(segments), sites, user_word)


def _notes(content: bytes) -> list[tuple[int, bytes]]:
    """(type, value) of each note of ours in a note segment; whatever follows a malformed note is not looked at."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while at + _NHDR.size <= len(content):
        namesz, descsz, note = _NHDR.unpack_from(content, at)
        desc = at + _NHDR.size + (namesz + 3 & ~3)
        if desc + descsz > len(content):
            break
        if content[at + _NHDR.size : at + _NHDR.size + namesz] == _NOTE_OWNER:
            found.append((note, content[desc : desc + descsz]))
        at = desc + (descsz + 3 & ~3)
    return found


def _parse_sites(value: bytes, name: str) -> tuple[int, ...]:
    if len(value) % 8 or not 1 <= len(value) // 8 <= _MAX_SITES:
        raise BadInput(name, f"its note of CPUID addresses has {len(value)} bytes, not 1 to {_MAX_SITES} times 8")
    return struct.unpack(f"<{len(value) // 8}Q", value)

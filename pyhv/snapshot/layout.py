"""Where things are in a snapshot file: header and table of sections, as bytes and back (docs/snapshot-format.md).

Pure functions: nothing here opens a file. What comes from a file is not trusted; what parse_header() and parse_table()
let through lies within the file, overlaps nothing, and is no larger than the limits below.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from pyhv._native import ffi, lib
from pyhv.errors import BadInput
from pyhv.state import codec

MAGIC = b"PYHVSNAP"
VERSION = 1
PAGE_SIZE: int = lib.PYHV_PAGE_SIZE
CHUNK_SIZE: int = lib.PYHV_CHUNK_SIZE
"""What one checksum of the memory covers, in bytes; the last chunk may be shorter."""

# magic, format version, number of sections, size of the file, XXH64 of the table, 24 bytes of zeros, XXH64 of all that.
_HEADER = struct.Struct("<8sIIQQ24sQ")
HEADER_SIZE = _HEADER.size  # 64
# name, number, kind, flags, zero, offset, length, XXH64 of the content, zero
_ENTRY = struct.Struct("<16sIIIIQQQQ")
ENTRY_SIZE = _ENTRY.size  # 64

RECORD, SUMS, MEMORY = 1, 2, 3  # kinds
_MANDATORY = 1  # the one flag

# Far more than any VM has, so that no number in a file makes its reader allocate or read without bound.
MAX_SECTIONS = 4096
MAX_STATE_BYTES = 64 << 20  # all records
MAX_MEMORY_BYTES = 16 << 40

_NAME = "name a file that pyhv save wrote"
_COPY = "use another copy of it"


class Section(NamedTuple):
    """One entry of the table. number tells sections of one name apart, as vcpu 0, 1, 2; offset and length are bytes."""

    name: str
    number: int
    kind: int
    mandatory: bool
    """A reader that does not know the section must refuse the file."""
    offset: int
    length: int
    checksum: int
    """XXH64 of the content; of the memory: that of its chunks' sums."""

    @property
    def title(self) -> str:
        return f"{self.name}[{self.number}]"

    @property
    def end(self) -> int:
        return self.offset + self.length


def checksum(data: bytes | bytearray | memoryview) -> int:
    """XXH64, seed 0."""
    result: int = lib.pyhv_xxh64(ffi.from_buffer(data), len(data), 0)
    return result


def chunks(memory_size: int) -> int:
    """How many checksums memory of so many bytes has."""
    return -(-memory_size // CHUNK_SIZE)


def place(kind: int, end: int) -> int:
    """Where a section of this kind stands when the one before it ends at `end`: memory at a page, so that it can be
    mapped, everything else at a multiple of 8. There is no other gap in a file."""
    alignment = PAGE_SIZE if kind == MEMORY else 8
    return -(-end // alignment) * alignment


def pack(sections: Sequence[Section]) -> bytes:
    """Header and table of a file with these sections, which are placed already."""
    table = b"".join(
        _ENTRY.pack(s.name.encode("ascii"), s.number, s.kind, int(s.mandatory), 0, s.offset, s.length, s.checksum, 0)
        for s in sections
    )
    header = _HEADER.pack(MAGIC, VERSION, len(sections), sections[-1].end, checksum(table), bytes(24), 0)[:-8]
    return header + checksum(header).to_bytes(8, "little") + table


class Header(NamedTuple):
    """What the header says of the table."""

    section_count: int
    table_checksum: int


def parse_header(data: bytes, file_size: int, path: str) -> Header:
    """The header in the first HEADER_SIZE bytes of a file of `file_size` bytes. Raises BadInput about `path`."""
    if file_size == 0:
        raise BadInput(path, "is empty, and no snapshot", _NAME)
    if data[: len(MAGIC)] != MAGIC:
        raise BadInput(path, f"is no snapshot: it does not begin with {MAGIC.decode()}", _NAME)
    if len(data) < HEADER_SIZE:
        raise BadInput(path, f"was cut short: the header has {HEADER_SIZE} bytes, the file {file_size}", _COPY)
    # The checksum comes before the version: it keeps its place in all versions to come, and damage is not the future.
    if checksum(data[:-8]) != int.from_bytes(data[-8:], "little"):
        raise BadInput(path, "is damaged: the header at offset 0x0 does not have its checksum", _COPY)
    _, version, count, size, table_checksum, zeros, _ = _HEADER.unpack(data)
    if version != VERSION:
        problem = f"has format version {version}, this pyhv reads version {VERSION}"
        raise BadInput(path, problem, "use a newer pyhv" if version > VERSION else _COPY)
    if any(zeros):
        raise BadInput(path, "has something at offset 0x20 of the header, where version 1 has zeros")
    if size != file_size:
        how = "was cut short" if file_size < size else "goes on behind its end"
        raise BadInput(path, f"{how}: it should have {size} bytes, and has {file_size}", _COPY)
    if not 1 <= count <= MAX_SECTIONS or HEADER_SIZE + count * ENTRY_SIZE > file_size:
        raise BadInput(path, f"has an impossible number of sections in the header at offset 0xc: {count}")
    return Header(count, table_checksum)


def parse_table(header: Header, table: bytes, file_size: int, known: Collection[str], path: str) -> tuple[Section, ...]:
    """The sections, every one checked, in the order of the file, the memory last. known: the records that the caller
    understands. Raises BadInput about `path`."""
    if checksum(table) != header.table_checksum:
        raise BadInput(path, f"is damaged: the table at offset {HEADER_SIZE:#x} does not have its checksum", _COPY)
    sections: list[Section] = []
    seen: set[tuple[str, int]] = set()
    end = HEADER_SIZE + len(table)
    state = 0
    for at in range(0, len(table), ENTRY_SIZE):
        where = f"{path}: table entry {at // ENTRY_SIZE} at offset {HEADER_SIZE + at:#x}"
        section = _entry(_ENTRY.unpack_from(table, at), where)
        where = f"{path}: section {section.title}"
        if (section.name, section.number) in seen:
            raise BadInput(where, "is there twice")
        seen.add((section.name, section.number))
        if section.mandatory and not _is_known(section, known):
            problem = "is unknown to this pyhv, and the VM cannot be restored without it"
            raise BadInput(where, problem, "use a newer pyhv")
        if sections and sections[-1].kind == MEMORY:
            raise BadInput(where, "comes after the memory, which must be the last")
        _check_place(section, end, file_size, where)
        if section.kind not in (SUMS, MEMORY):
            state += section.length
            if section.length > codec.MAX_BYTES:
                raise BadInput(where, f"is too large: {section.length} bytes, at most {codec.MAX_BYTES} are possible")
            if state > MAX_STATE_BYTES:
                raise BadInput(path, f"has more than {MAX_STATE_BYTES} bytes of records, which no VM has")
        end = section.end
        sections.append(section)
    if end != file_size:
        raise BadInput(path, f"has {file_size} bytes, but its sections end at {end:#x}")
    _check_memory(sections, path)
    return tuple(sections)


def _entry(fields: tuple[Any, ...], where: str) -> Section:
    padded, number, kind, flags, zero, offset, length, content, other_zero = fields
    raw = padded.rstrip(b"\0")
    name = raw.decode("ascii", "replace")
    if not name.replace("-", "").replace(".", "").isalnum() or not name.isascii():
        raise BadInput(where, f"has no name of letters, digits, - and . but {padded!r}")
    if flags & ~_MANDATORY or zero or other_zero:
        raise BadInput(where, f"uses what version 1 has no meaning for: flags {flags:#x}, {zero:#x}, {other_zero:#x}")
    return Section(name, number, kind, bool(flags & _MANDATORY), offset, length, content)


def _is_known(section: Section, known: Collection[str]) -> bool:
    return section.name in known if section.kind == RECORD else section.kind in (SUMS, MEMORY)


def _check_place(section: Section, end: int, file_size: int, where: str) -> None:
    expected = place(section.kind, end)
    if section.offset != expected:
        problem = "overlaps what is before it" if section.offset < end else "is not where it must be"
        raise BadInput(where, f"{problem}: it begins at {section.offset:#x}, not at {expected:#x}")
    if section.length > file_size - section.offset:
        problem = f"goes beyond the file: {section.length:#x} bytes at {section.offset:#x} of {file_size:#x}"
        raise BadInput(where, problem)


def _check_memory(sections: Sequence[Section], path: str) -> None:
    memories = [s for s in sections if s.kind == MEMORY]
    sums = [s for s in sections if s.kind == SUMS]
    if len(memories) != 1 or len(sums) != 1:
        raise BadInput(path, f"has {len(memories)} memory sections and {len(sums)} of sums; there must be one of each")
    memory, sum_section = memories[0], sums[0]
    if memory.length % PAGE_SIZE or not 0 < memory.length <= MAX_MEMORY_BYTES:
        raise BadInput(path, f"has an impossible size of memory: {memory.length:#x} bytes")
    if sum_section.length != 8 * chunks(memory.length):
        problem = f"has {sum_section.length} bytes of sums for {chunks(memory.length)} chunks of memory"
        raise BadInput(path, problem)
    if memory.checksum != sum_section.checksum:
        raise BadInput(path, "has sums that are not those of its memory")

"""A snapshot file: state records and guest memory, written all at once and read with suspicion.

The format is in docs/snapshot-format.md and layout.py, how one file takes another's place in replace.py.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from pyhv._native import check, ffi, lib, new_error
from pyhv.errors import BadInput, HostError
from pyhv.snapshot import layout
from pyhv.snapshot.layout import MEMORY, RECORD, SUMS, Section
from pyhv.snapshot.replace import Replacement
from pyhv.state import codec

R = TypeVar("R", bound=tuple[Any, ...])

# Called now and then with the bytes of memory that are done, and all that there are. What it raises ends the work.
Progress = Callable[[int, int], None]

# Bytes of memory between two calls of a Progress, and between two looks at Ctrl-C; whole chunks.
_STEP = 256 << 20

_NONE_MADE = "no snapshot was made"

# So many bad ranges are named in one error; the others are counted.
_SHOWN_RANGES = 4


class Ram(NamedTuple):
    """Guest RAM to be saved: `size` bytes (whole pages) at `offset` of the memfd or file behind it.

    mapped: where in this process they are mapped (uint8_t *); without it every page is copied once more. is_private:
    the mapping is a private one of a file, as that of a restored VM; what was written since is taken from there.
    """

    fd: int
    size: int
    offset: int = 0
    mapped: Any = None
    is_private: bool = False


class Writer:
    """Writes a snapshot to `path`: add() each record, write_memory() once, commit().

    Needs: a directory that may be written to. Does: see Replacement. On failure, and when it is closed before commit():
    what was at `path` is untouched, and nothing is left of the new file.

    Raises BadInput for a path that cannot be used or a record that cannot be encoded, HostError for what the host
    refuses (a full disk). Needs close(), or use as a context manager.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._records: list[tuple[Section, bytes]] = []
        self._sections: list[Section] = []
        """All that will be in the file, once it is known where."""
        self._sums = b""
        """Of the memory, once it is written."""
        self._file = Replacement(path)

    def add(self, record: tuple[Any, ...], number: int = 0, *, mandatory: bool = True) -> None:
        """Adds a state record, before the memory. number: tells several records of one kind apart, from 0 on.
        mandatory: a pyhv that does not know the record must not restore the VM without it."""
        if self._sections:
            raise ValueError("records come before the memory")
        name = codec.name_of(type(record))
        data = codec.encode(record, f"{name}[{number}]")
        section = Section(name, number, RECORD, mandatory, 0, len(data), layout.checksum(data))
        self._records.append((section, data))

    def write_memory(self, ram: Ram, progress: Progress | None = None) -> None:
        """Writes guest RAM, which nobody may change meanwhile: once this returns, the VM may run on."""
        if self._sections:
            raise ValueError("there is one memory")
        self._place(ram.size)
        sums = ffi.new("uint64_t[]", layout.chunks(ram.size))
        piece = ffi.new("struct pyhv_pages *", {"fd": ram.fd, "is_private": ram.is_private})
        for at in range(0, ram.size, _STEP):
            piece.offset, piece.size = ram.offset + at, min(_STEP, ram.size - at)
            piece.mapped = ffi.NULL if ram.mapped is None else ram.mapped + at
            self._save(piece, self._sections[-1].offset + at, sums + at // layout.CHUNK_SIZE)
            if progress is not None:
                progress(at + piece.size, ram.size)
        self._sums = bytes(ffi.buffer(sums))

    def _save(self, piece: Any, offset: int, sums: Any) -> None:
        error = new_error()
        try:
            check(lib.pyhv_pages_save(piece, self._file.fd, offset, sums, error), error)
        except HostError as failure:
            detail = f"{failure.what} {failure.detail}".strip()
            raise HostError(f"write {self.path}", failure.errnum, detail, _NONE_MADE) from None

    def _place(self, memory_size: int) -> None:
        """Decides where everything stands; the checksums of memory and sums are to be filled in."""
        sections = [section for section, _ in self._records]
        sections.append(Section("memory-sums", 0, SUMS, True, 0, 8 * layout.chunks(memory_size), 0))
        sections.append(Section("memory", 0, MEMORY, True, 0, memory_size, 0))
        end = layout.HEADER_SIZE + layout.ENTRY_SIZE * len(sections)
        for i, section in enumerate(sections):
            sections[i] = section._replace(offset=layout.place(section.kind, end))
            end = sections[i].end
        # Better no file than one that the reader will refuse.
        start = layout.pack(sections)
        header = layout.parse_header(start[: layout.HEADER_SIZE], end, self.path)
        layout.parse_table(header, start[layout.HEADER_SIZE :], end, {s.name for s in sections}, self.path)
        try:
            os.ftruncate(self._file.fd, end)
        except OSError as error:
            raise HostError(f"write {self.path}", error.errno or 0, f"ftruncate to {end} bytes", _NONE_MADE) from None
        self._sections = sections

    def commit(self) -> None:
        """Completes the file, syncs it and puts it at `path`; ends the writer in any case."""
        try:
            if not self._sums:
                raise ValueError("the memory is missing")
            sums_checksum = layout.checksum(self._sums)
            sections = [s if s.kind == RECORD else s._replace(checksum=sums_checksum) for s in self._sections]
            contents = [data for _, data in self._records] + [self._sums]
            head = bytearray(sections[-1].offset)  # all that comes before the memory
            start = layout.pack(sections)
            head[: len(start)] = start
            for section, content in zip(sections, contents, strict=False):
                head[section.offset : section.end] = content
            self._write(head)
            self._file.commit()
        finally:
            self.close()

    def _write(self, head: bytearray) -> None:
        view, at = memoryview(head), 0
        try:
            while at < len(head):
                at += os.pwrite(self._file.fd, view[at:], at)
        except OSError as error:
            detail = f"pwrite {len(head)} bytes at offset 0x0"
            raise HostError(f"write {self.path}", error.errno or 0, detail, _NONE_MADE) from None

    def close(self) -> None:
        """Gives the new file up, unless commit() has put it in place; closing twice is allowed."""
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Reader:
    """An open snapshot file, of which everything but the memory has been checked: structure, checksums, known sections.

    path: the file. known: the records (classes with @codec.record) that the caller understands; a section of another
    name is passed over, or, if it is mandatory, refused. The memory is in memory_fd at memory_offset, memory_size
    bytes, page-aligned, to be mapped privately; verify() checks it.

    Raises BadInput that says what is wrong, where, and what to do. Needs close(), or use as a context manager.
    """

    def __init__(self, path: str, known: Iterable[type[tuple[Any, ...]]]) -> None:
        self.path = path
        self.memory_fd = _open(path)
        try:
            self.file_size = os.fstat(self.memory_fd).st_size
            header = layout.parse_header(self._read(0, min(layout.HEADER_SIZE, self.file_size)), self.file_size, path)
            table = self._read(layout.HEADER_SIZE, header.section_count * layout.ENTRY_SIZE)
            names = {codec.name_of(cls) for cls in known}
            self.sections = layout.parse_table(header, table, self.file_size, names, path)
            """What is in the file, in order, the unknown ones too."""
            self._head_start = layout.HEADER_SIZE + len(table)
            self.memory_offset, self.memory_size = self.sections[-1].offset, self.sections[-1].length
            self._head = memoryview(self._read(self._head_start, self.memory_offset - self._head_start))
            self._check_contents()
        except BaseException:
            self.close()
            raise

    def _read(self, offset: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = os.pread(self.memory_fd, size - len(data), offset + len(data))
            except OSError as error:
                where = f"pread {size} bytes at offset {offset:#x}"
                raise HostError(f"read {self.path}", error.errno or 0, where) from None
            if not part:
                raise BadInput(self.path, f"became shorter while it was read: it ends before {offset + size:#x}")
            data = data + part if data else part
        return data

    def _content(self, section: Section) -> memoryview:
        start = section.offset - self._head_start
        return self._head[start : start + section.length]

    def _check_contents(self) -> None:
        end = self._head_start
        for section in self.sections:
            gap = self._head[end - self._head_start : section.offset - self._head_start]
            if gap.tobytes().strip(b"\0"):  # any() looks at each byte, and up to a page of them 70 microseconds long
                raise BadInput(self.path, f"is damaged: there must be zeros from {end:#x} to {section.offset:#x}")
            if section.kind == MEMORY:
                return
            if layout.checksum(self._content(section)) != section.checksum:
                where = f"{section.length} bytes at offset {section.offset:#x}"
                problem = f"is damaged: section {section.title}, {where}, does not have its checksum"
                raise BadInput(self.path, problem, "use another copy of it")
            end = section.end

    def records(self, cls: type[R]) -> tuple[R, ...]:
        """All records of a kind, in the order of their numbers, which must be 0, 1, 2 and so on."""
        name = codec.name_of(cls)
        found = sorted((s for s in self.sections if s.kind == RECORD and s.name == name), key=lambda s: s.number)
        for expected, section in enumerate(found):
            if section.number != expected:
                raise BadInput(self.path, f"has no section {name}[{expected}], but {section.title}")
        return tuple([codec.decode(cls, self._content(s).tobytes(), f"{self.path}: {s.title}") for s in found])

    def optional(self, cls: type[R]) -> R | None:
        """The one record of its kind, or None where there is none."""
        found = self.records(cls)
        if len(found) > 1:
            raise BadInput(self.path, f"has {len(found)} sections {codec.name_of(cls)}; there must be one")
        return found[0] if found else None

    def record(self, cls: type[R]) -> R:
        """The one record of its kind."""
        found = self.optional(cls)
        if found is None:
            raise BadInput(self.path, f"has no section {codec.name_of(cls)}, which every snapshot of a VM has")
        return found

    def verify(self, progress: Progress | None = None) -> None:
        """Reads the memory and compares it with its checksums. Raises BadInput that names the ranges of bad pages."""
        section = next(s for s in self.sections if s.kind == SUMS)
        sums = ffi.from_buffer("uint64_t[]", self._content(section).tobytes())
        pages = ffi.new("struct pyhv_pages *", {"fd": self.memory_fd})
        bad: list[tuple[int, int]] = []
        at = 0
        while at < self.memory_size:
            pages.offset, pages.size = self.memory_offset + at, min(_STEP, self.memory_size - at)
            found = self._bad_chunk(pages, sums + at // layout.CHUNK_SIZE)
            if found is None:
                at += pages.size
            else:
                start = at + found * layout.CHUNK_SIZE
                at = min(start + layout.CHUNK_SIZE, self.memory_size)
                if bad and bad[-1][1] == start:
                    start = bad.pop()[0]
                bad.append((start, at))
            if progress is not None:
                progress(at, self.memory_size)
        if bad:
            raise BadInput(self.path, f"is damaged: {self._describe(bad)}", "use another copy of it")

    def _bad_chunk(self, pages: Any, sums: Any) -> int | None:
        """The number of the first bad chunk in a piece of the memory."""
        error, chunk = new_error(), ffi.new("uint64_t *")
        try:
            differs = check(lib.pyhv_pages_verify(pages, sums, chunk, error), error)
        except HostError as failure:
            if failure.errnum:
                raise HostError(f"read {self.path}", failure.errnum, f"{failure.what} {failure.detail}") from None
            raise BadInput(self.path, f"became shorter while it was read: {failure.detail}") from None
        return int(chunk[0]) if differs else None

    def _describe(self, bad: list[tuple[int, int]]) -> str:
        page, offset = layout.PAGE_SIZE, self.memory_offset
        texts = [
            f"pages {start // page:#x} to {end // page - 1:#x} (offset {offset + start:#x} to {offset + end - 1:#x})"
            for start, end in bad[:_SHOWN_RANGES]
        ]
        more = f" and {len(bad) - len(texts)} more ranges" if len(bad) > len(texts) else ""
        return f"memory {', '.join(texts)}{more}: bytes that do not have their checksum"

    def close(self) -> None:
        """Closes the file. What was mapped from it stays mapped; closing twice is allowed."""
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: str) -> int:
    try:
        # O_NONBLOCK: a FIFO must not hold us up before we see that it is one.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadInput(path, f"cannot be read: {reason}", "name a file that pyhv save wrote") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BadInput(path, "is no regular file", "name a file that pyhv save wrote")
    return fd

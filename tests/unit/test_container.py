"""The snapshot file: what is written comes back, damage is found, and writing is all or nothing.

Memory is a memfd filled by the tests. Whatever is said to be found here is also shown to be missed by something worse:
the tests named *_can_fail give each checker a plant.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyhv._native import ffi, lib
from pyhv.errors import BadInput, HostError, PyhvError
from pyhv.snapshot import layout, replace
from pyhv.snapshot.container import Ram, Reader, Writer
from pyhv.snapshot.layout import CHUNK_SIZE, ENTRY_SIZE, HEADER_SIZE, MEMORY, PAGE_SIZE, RECORD, SUMS, Section
from pyhv.state import codec
from pyhv.state.codec import record
from pyhv.state.schema import U64

# More for a long run by hand: the seeds of a failure are hypothesis's own.
FUZZ_EXAMPLES = int(os.environ.get("PYHV_FUZZ_EXAMPLES", "300"))


@record("vcpu", 1)
class Vcpu(NamedTuple):
    rip: U64
    xsave: bytes


@record("clock", 2)
class Clock(NamedTuple):
    nanoseconds: U64


@record("news", 1)
class News(NamedTuple):
    """A record of some later pyhv."""

    text: str


KNOWN = (Vcpu, Clock)


class Memory:
    """Guest RAM: a memfd."""

    def __init__(self, size: int, pages: dict[int, bytes] | None = None) -> None:
        self.size = size
        self.fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        for page, content in (pages or {}).items():
            os.pwrite(self.fd, content, page * PAGE_SIZE)

    @property
    def ram(self) -> Ram:
        return Ram(self.fd, self.size)

    @property
    def content(self) -> bytes:
        return os.pread(self.fd, self.size, 0)

    def close(self) -> None:
        os.close(self.fd)


def page(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE_SIZE)


# Three chunks, the last a short one: something in the first and the last, nothing in the second.
SIZE = 2 * CHUNK_SIZE + 3 * PAGE_SIZE
PAGES = {0: page(0), 5: page(5), 6: page(6), 255: page(255), 514: page(514)}


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory(SIZE, PAGES)
    yield memory
    memory.close()


def write(path: Path, memory: Memory, *records: Any) -> None:
    with Writer(str(path)) as writer:
        for value in records:
            writer.add(value)
        writer.write_memory(memory.ram)
        writer.commit()


def example(path: Path) -> Path:
    """A file with two vCPUs, a clock and the memory above."""
    memory = Memory(SIZE, PAGES)
    with Writer(str(path)) as writer:
        writer.add(Vcpu(0x1000, b"\1\2\3"), 0)
        writer.add(Vcpu(0x2000, b"\4" * 50), 1)
        writer.add(Clock(7))
        writer.write_memory(memory.ram)
        writer.commit()
    memory.close()
    return path


@pytest.fixture(scope="session")
def example_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return example(tmp_path_factory.mktemp("example") / "vm.pyhv").read_bytes()


def check(path: Path) -> tuple[tuple[Vcpu, ...], Clock]:
    """Reads all that there is."""
    with Reader(str(path), KNOWN) as reader:
        reader.verify()
        return reader.records(Vcpu), reader.record(Clock)


def refuse(path: Path, *words: str) -> BadInput:
    """The reader must refuse the file, in one line that names it and has these words."""
    with pytest.raises(BadInput) as caught:
        Reader(str(path), KNOWN).close()
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for word in words:
        assert word in message
    return caught.value


def open_files() -> list[str]:
    """What the descriptors of this process stand for."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that is needed to look
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


# ------------------------------------------------------------------------------------------------- there and back


def test_round_trip(tmp_path: Path, memory: Memory) -> None:
    path = example(tmp_path / "vm.pyhv")
    with Reader(str(path), KNOWN) as reader:
        assert reader.records(Vcpu) == (Vcpu(0x1000, b"\1\2\3"), Vcpu(0x2000, b"\4" * 50))
        assert reader.record(Clock) == reader.optional(Clock) == Clock(7)
        assert reader.optional(News) is None and reader.records(News) == ()
        assert [s.title for s in reader.sections] == ["vcpu[0]", "vcpu[1]", "clock[0]", "memory-sums[0]", "memory[0]"]
        reader.verify()
        # The memory can be mapped as it is.
        assert reader.memory_size == SIZE and reader.memory_offset % PAGE_SIZE == 0
        with mmap.mmap(
            reader.memory_fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=reader.memory_offset
        ) as mapped:
            assert mapped[:] == memory.content
            mapped[0:4] = b"mine"
        reader.verify()
    assert names(tmp_path) == {"vm.pyhv"}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pages=st.dictionaries(st.integers(0, 700), st.binary(min_size=1, max_size=64), max_size=12),
    size=st.integers(701, 900),
    vcpus=st.lists(st.builds(Vcpu, st.integers(0, 2**64 - 1), st.binary(max_size=300)), max_size=5),
)
def test_any_content(tmp_path: Path, pages: dict[int, bytes], size: int, vcpus: list[Vcpu]) -> None:
    memory, path = Memory(size * PAGE_SIZE, pages), tmp_path / "vm.pyhv"
    with Writer(str(path)) as writer:
        for number, vcpu in enumerate(vcpus):
            writer.add(vcpu, number)
        writer.write_memory(memory.ram)
        writer.commit()
    with Reader(str(path), KNOWN) as reader:
        assert list(reader.records(Vcpu)) == vcpus
        reader.verify()
        assert os.pread(reader.memory_fd, reader.memory_size, reader.memory_offset) == memory.content
    memory.close()


def test_bytes_are_these(tmp_path: Path) -> None:
    """docs/snapshot-format.md, by hand: what is on disks does not change by accident."""
    memory, path = Memory(PAGE_SIZE, {0: b"guest"}), tmp_path / "vm.pyhv"
    write(path, memory, Clock(7))
    memory.close()
    data = path.read_bytes()
    body = b'{"fields":{"nanoseconds":7},"record":"clock","version":2}'
    assert len(data) == 2 * PAGE_SIZE and data[256 : 256 + len(body)] == body and len(body) == 57
    assert data[PAGE_SIZE:] == b"guest".ljust(PAGE_SIZE, b"\0")
    assert data[:8] == b"PYHVSNAP"
    assert struct.unpack_from("<IIQ", data, 8) == (1, 3, 2 * PAGE_SIZE)
    assert data[32:56] == bytes(24)
    assert struct.unpack_from("<16sIIIIQQ", data, 64) == (b"clock".ljust(16, b"\0"), 0, 1, 1, 0, 256, 57)
    assert struct.unpack_from("<16sIIIIQQ", data, 128) == (b"memory-sums".ljust(16, b"\0"), 0, 2, 1, 0, 320, 8)
    assert struct.unpack_from("<16sIIIIQQ", data, 192) == (b"memory".ljust(16, b"\0"), 0, 3, 1, 0, 4096, 4096)
    xxhash = pytest.importorskip("xxhash", reason="the xxhash package, an oracle for checksums, is not installed")
    sums = {
        24: data[64:256],  # the table
        56: data[:56],  # the header
        64 + 48: body,
        128 + 48: data[320:328],
        192 + 48: data[320:328],
        320: data[PAGE_SIZE:],
    }
    for place, summed in sums.items():
        assert struct.unpack_from("<Q", data, place)[0] == xxhash.xxh64(summed).intdigest()


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_xxh64_against_the_xxhash_package(data: bytes, seed: int) -> None:
    xxhash = pytest.importorskip("xxhash", reason="the xxhash package, an oracle for checksums, is not installed")
    assert lib.pyhv_xxh64(data, len(data), seed) == xxhash.xxh64(data, seed=seed).intdigest()


def test_xxh64_of_large_data() -> None:
    xxhash = pytest.importorskip("xxhash", reason="the xxhash package, an oracle for checksums, is not installed")
    data = random.Random(1).randbytes(3 * CHUNK_SIZE + 17)
    for size in (CHUNK_SIZE, CHUNK_SIZE - 1, len(data)):
        assert lib.pyhv_xxh64(data, size, 0) == xxhash.xxh64(data[:size]).intdigest()


def test_progress(tmp_path: Path) -> None:
    size = (512 << 20) + PAGE_SIZE
    memory, path, said = Memory(size), tmp_path / "vm.pyhv", list[tuple[int, int]]()
    with Writer(str(path)) as writer:
        writer.write_memory(memory.ram, lambda done, total: said.append((done, total)))
        writer.commit()
    memory.close()
    assert said == [(256 << 20, size), (512 << 20, size), (size, size)]
    said.clear()
    with Reader(str(path), ()) as reader:
        reader.verify(lambda done, total: said.append((done, total)))
    assert said == [(256 << 20, size), (512 << 20, size), (size, size)]


def test_ram_of_a_restored_vm(tmp_path: Path) -> None:
    """Saved again, over the file that its memory is mapped from: clean pages from there, changed ones from here."""
    path = example(tmp_path / "vm.pyhv")
    with Reader(str(path), KNOWN) as reader:
        mapped = mmap.mmap(reader.memory_fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE,
                           offset=reader.memory_offset)  # fmt: skip
        mapped[300 * PAGE_SIZE] = 1  # where the file has a hole
        mapped[6 * PAGE_SIZE : 7 * PAGE_SIZE] = bytes(PAGE_SIZE)  # where it has something
        expected = mapped[:]
        with Writer(str(path)) as writer:
            host = ffi.cast("uint8_t *", ffi.from_buffer(mapped))
            writer.write_memory(Ram(reader.memory_fd, SIZE, reader.memory_offset, host, is_private=True))
            writer.commit()
    with Reader(str(path), ()) as reader:
        reader.verify()
        assert os.pread(reader.memory_fd, SIZE, reader.memory_offset) == expected


def test_sparse_memory_takes_little_of_everything(tmp_path: Path) -> None:
    """4 GiB with four pages in use: disk, and the guest's memory itself, grow by what is used."""
    size = 4 << 30
    memory = Memory(size, {0: page(0), 1: bytes(PAGE_SIZE), 70000: page(1), size // PAGE_SIZE - 1: page(2)})
    used = os.fstat(memory.fd).st_blocks
    path = tmp_path / "vm.pyhv"
    write(path, memory, Clock(1))
    assert os.fstat(memory.fd).st_blocks == used == 4 * PAGE_SIZE // 512
    status = path.stat()
    assert status.st_size > size
    # Three pages that are not zero; 32 kB of sums, header and state; what the file system needs for extents.
    assert status.st_blocks * 512 <= 3 * PAGE_SIZE + layout.chunks(size) * 8 + 8 * PAGE_SIZE
    with Reader(str(path), KNOWN) as reader:
        reader.verify()
        assert os.pread(reader.memory_fd, PAGE_SIZE, reader.memory_offset + 70000 * PAGE_SIZE) == page(1)
    memory.close()


# ------------------------------------------------------------------------------------------------ damaged files


def cuts(data: bytes) -> list[int]:
    """Every border in the file, the bytes around them, and some places between."""
    table = struct.unpack_from("<I", data, 12)[0] * ENTRY_SIZE
    borders = {0, 8, HEADER_SIZE, HEADER_SIZE + table, len(data)}
    for at in range(HEADER_SIZE, HEADER_SIZE + table, ENTRY_SIZE):
        offset, length = struct.unpack_from("<QQ", data, at + 32)
        borders |= {at, offset, offset + length}
    numbers = random.Random(2)
    places = {b + d for b in borders for d in (-1, 0, 1)} | {numbers.randrange(len(data)) for _ in range(100)}
    return sorted(place for place in places if 0 <= place < len(data))


def test_cut_short(tmp_path: Path, example_bytes: bytes) -> None:
    path = tmp_path / "vm.pyhv"
    path.write_bytes(example_bytes)
    for size in reversed(cuts(example_bytes)):
        os.truncate(path, size)
        refuse(path, "is empty" if size == 0 else "is no snapshot" if size < 8 else "cut short")
    path.write_bytes(example_bytes + b"\0")
    refuse(path, "goes on behind its end")


def flipped(path: Path, bits: Iterator[int] | range) -> Iterator[int]:
    """The file with each bit flipped in turn, and put right again."""
    fd = os.open(path, os.O_RDWR)
    for bit in bits:
        byte = os.pread(fd, 1, bit // 8)
        os.pwrite(fd, bytes([byte[0] ^ 1 << bit % 8]), bit // 8)
        yield bit
        os.pwrite(fd, byte, bit // 8)
    os.close(fd)


def test_every_bit_before_the_memory(tmp_path: Path, example_bytes: bytes) -> None:
    """Header, table, records, sums, and the gaps between them: every reader finds each flipped bit at once."""
    path = tmp_path / "vm.pyhv"
    path.write_bytes(example_bytes)
    with Reader(str(path), KNOWN) as reader:
        head = reader.memory_offset
        end = reader.sections[-2].end
    # Behind the sums comes a gap of zeros as long as a page: a few bits of it stand for all.
    found = 0
    for _ in flipped(path, itertools.chain(range(end * 8), range(end * 8, head * 8, 997))):  # type: ignore[arg-type]
        refuse(path)
        found += 1
    assert found > end * 8
    check(path)


def test_bits_of_the_memory(tmp_path: Path, example_bytes: bytes) -> None:
    """In pages and in holes: the reader opens the file, and verify() names the pages."""
    path = tmp_path / "vm.pyhv"
    path.write_bytes(example_bytes)
    with Reader(str(path), KNOWN) as reader:
        offset = reader.memory_offset
    numbers = random.Random(3)
    places = [numbers.randrange(SIZE * 8) for _ in range(200)] + [0, SIZE * 8 - 1]
    for bit in flipped(path, (offset * 8 + place for place in places)):
        with Reader(str(path), KNOWN) as reader:
            reader.records(Vcpu)
            with pytest.raises(BadInput) as caught:
                reader.verify()
        chunk = (bit // 8 - offset) // CHUNK_SIZE
        first, last = chunk * 256, min(chunk * 256 + 255, SIZE // PAGE_SIZE - 1)
        assert f"memory pages {first:#x} to {last:#x} (offset" in str(caught.value)


def test_bad_ranges_are_joined_and_counted(tmp_path: Path) -> None:
    size = 20 * CHUNK_SIZE
    memory, path = Memory(size), tmp_path / "vm.pyhv"
    write(path, memory, Clock(1))
    memory.close()
    with Reader(str(path), KNOWN) as reader, path.open("r+b") as file:
        for chunk in (1, 2, 3, 5, 7, 9, 11, 19):
            os.pwrite(file.fileno(), b"x", reader.memory_offset + chunk * CHUNK_SIZE + 4097)
        with pytest.raises(BadInput) as caught:
            reader.verify()
    assert "pages 0x100 to 0x3ff (" in caught.value.problem
    assert "pages 0x500 to 0x5ff (" in caught.value.problem
    assert "and 2 more ranges" in caught.value.problem


def test_file_that_shrinks_behind_the_reader(tmp_path: Path, example_bytes: bytes) -> None:
    path = tmp_path / "vm.pyhv"
    path.write_bytes(example_bytes)
    with Reader(str(path), KNOWN) as reader:
        os.truncate(path, reader.memory_offset + PAGE_SIZE)
        assert len(reader.records(Vcpu)) == 2  # what was checked is what is used
        with pytest.raises(BadInput, match="became shorter"):
            reader.verify()


@pytest.mark.parametrize("checker", ["a reader without checksums", "a verify() that looks at the first chunk alone"])
def test_finding_damage_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example_bytes: bytes, checker: str
) -> None:
    """What the two tests above would say of a worse reader."""
    if checker == "a reader without checksums":
        monkeypatch.setattr(layout, "checksum", lambda data: 0)
        blank = bytearray(example_bytes)
        for place in (24, 56, *range(64 + 48, 64 + 5 * 64, 64)):
            blank[place : place + 8] = bytes(8)
        example_bytes = bytes(blank)
        test = test_every_bit_before_the_memory
    else:
        verify = lib.pyhv_pages_verify

        class Lib:
            def pyhv_pages_verify(self, pages: Any, *arguments: Any) -> Any:
                size, pages.size = pages.size, CHUNK_SIZE
                result = verify(pages, *arguments)
                pages.size = size
                return result

        monkeypatch.setattr("pyhv.snapshot.container.lib", Lib())
        test = test_bits_of_the_memory
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test(tmp_path, example_bytes)


# ------------------------------------------------------------------------------------- files that never were right


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.mkdir(), "is no regular file"),
        (lambda path: os.mkfifo(path), "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"\x7fELF" + bytes(5000)), "does not begin with PYHVSNAP"),
        (lambda path: path.write_bytes(b"PYHVSNAP"), "was cut short"),
        (lambda path: path.write_bytes(b"PYHVSNAP" + bytes(5000)), "the header at offset 0x0 does not have its"),
    ],
)
def test_no_snapshot(tmp_path: Path, make: Callable[[Path], object], problem: str) -> None:
    path = tmp_path / "vm.pyhv"
    make(path)
    refuse(path, problem, "name a file that pyhv save wrote" if problem.startswith(("cannot", "is", "does")) else "")


def test_nothing_stays_open(tmp_path: Path, example_bytes: bytes) -> None:
    path = tmp_path / "vm.pyhv"
    files = open_files()
    path.write_bytes(example_bytes[:-1] + b"\0")
    Reader(str(path), KNOWN).close()
    for data in (b"", b"no snapshot", example_bytes[:-1], example_bytes + b"x"):
        path.write_bytes(data)
        refuse(path)
        assert open_files() == files


def test_path_with_a_zero() -> None:
    with pytest.raises(BadInput):
        Reader("vm\0.pyhv", KNOWN)


class Forger:
    """A file with its checksums right and its structure wrong: the good sections of `data`, to be changed."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        path.write_bytes(data)
        with Reader(str(path), KNOWN) as reader:
            self.sections = list(reader.sections)
        self.data = data

    def change(self, title: str, **fields: Any) -> None:
        for i, section in enumerate(self.sections):
            if section.title == title:
                self.sections[i] = section._replace(**fields)

    def save(
        self, file_size: int | None = None, version: int = 1, count: int | None = None, zeros: bytes = b""
    ) -> Path:
        start = bytearray(layout.pack(self.sections))
        data = bytearray(self.data)
        data[: len(start)] = start
        size = len(data) if file_size is None else file_size
        struct.pack_into("<IIQ", data, 8, version, len(self.sections) if count is None else count, size)
        data[32 : 32 + len(zeros)] = zeros
        struct.pack_into("<Q", data, 56, layout.checksum(data[:56]))
        self.path.write_bytes(data)
        if size > len(data):
            os.truncate(self.path, min(size, 1 << 40))
        return self.path


@pytest.fixture
def forger(tmp_path: Path, example_bytes: bytes) -> Forger:
    return Forger(tmp_path / "vm.pyhv", example_bytes)


def test_the_forger_makes_good_files_too(forger: Forger) -> None:
    """Or all its files would be refused for the same wrong reason."""
    check(forger.save())


def test_versions_to_come(forger: Forger) -> None:
    refuse(forger.save(version=2), "has format version 2, this pyhv reads version 1", "use a newer pyhv")
    refuse(forger.save(version=(1 << 32) - 1), "use a newer pyhv")
    refuse(forger.save(version=0), "has format version 0")
    refuse(forger.save(zeros=b"\1"), "at offset 0x20")


@pytest.mark.parametrize("count", [0, 1, 4, 6, 4096, 4097, (1 << 32) - 1])
def test_wrong_number_of_sections(forger: Forger, count: int) -> None:
    refuse(forger.save(count=count))


OFFSET = 64 + 5 * 64

FORGERIES: list[tuple[str, dict[str, Any], str]] = [
    ("vcpu[0]", {"offset": 0}, "overlaps what is before it: it begins at 0x0"),
    ("vcpu[0]", {"offset": OFFSET - 8}, "overlaps"),
    ("vcpu[1]", {"offset": OFFSET}, "section vcpu[1]: overlaps"),
    ("vcpu[0]", {"offset": OFFSET + 8}, "is not where it must be"),
    ("vcpu[0]", {"offset": (1 << 64) - 8}, "is not where it must be"),
    ("vcpu[0]", {"length": (1 << 64) - 1}, "goes beyond the file"),
    ("vcpu[0]", {"length": 1 << 22}, "goes beyond the file"),
    ("vcpu[0]", {"length": 0}, "section vcpu[1]: is not where it must be"),
    ("clock[0]", {"checksum": 5}, "section clock[0]"),
    ("clock[0]", {"name": "clock\0x"}, "has no name of letters"),
    ("clock[0]", {"name": ""}, "has no name of letters"),
    ("clock[0]", {"name": "clo ck"}, "has no name of letters"),
    ("clock[0]", {"name": "vcpu"}, "vcpu[0]: is there twice"),
    ("clock[0]", {"name": "tablets"}, "section tablets[0]: is unknown to this pyhv"),
    ("clock[0]", {"kind": 9}, "clock[0]: is unknown to this pyhv"),
    ("clock[0]", {"kind": MEMORY}, "section clock[0]: is not where it must be"),
    ("clock[0]", {"kind": SUMS}, "there must be one of each"),
    ("memory[0]", {"kind": RECORD, "name": "vcpu", "number": 2}, "is not where it must be"),
    ("memory[0]", {"offset": 8192}, "section memory[0]: is not where it must be"),
    ("memory[0]", {"length": SIZE - PAGE_SIZE}, "but its sections end at"),
    ("memory[0]", {"length": SIZE + PAGE_SIZE}, "goes beyond the file"),
    ("memory[0]", {"length": 0}, "but its sections end at"),
    ("memory[0]", {"checksum": 1}, "has sums that are not those of its memory"),
    ("memory-sums[0]", {"length": 16}, "has 16 bytes of sums for 3 chunks"),
    ("memory-sums[0]", {"kind": RECORD, "name": "vcpu", "number": 2}, "1 memory sections and 0 of sums"),
]


@pytest.mark.parametrize(("title", "fields", "problem"), FORGERIES)
def test_forged_table(forger: Forger, title: str, fields: dict[str, Any], problem: str) -> None:
    forger.change(title, **fields)
    refuse(forger.save(), problem)


def test_sections_in_another_order(forger: Forger) -> None:
    forger.sections[0], forger.sections[1] = forger.sections[1], forger.sections[0]
    refuse(forger.save())
    forger.sections = forger.sections[-1:] + forger.sections[:-1]
    refuse(forger.save())


def test_something_behind_the_memory(forger: Forger) -> None:
    forger.sections.append(Section("clock", 1, RECORD, True, 0, 16, 0))
    end = HEADER_SIZE + ENTRY_SIZE * len(forger.sections)
    for i, section in enumerate(forger.sections):
        forger.sections[i] = section._replace(offset=layout.place(section.kind, end))
        end = forger.sections[i].end
    refuse(forger.save(end), "section clock[1]: comes after the memory")


def test_memory_of_no_whole_pages(forger: Forger) -> None:
    forger.change("memory[0]", length=SIZE - 100)
    path = forger.save(forger.sections[-1].end)
    os.truncate(path, forger.sections[-1].end)
    refuse(path, "has an impossible size of memory")


def test_reserved_fields(forger: Forger) -> None:
    path = forger.save()
    good = path.read_bytes()
    for place, value in ((64 + 24, 3), (64 + 28, 1), (64 + 56, 1)):
        data = bytearray(good)
        data[place] = value
        struct.pack_into("<Q", data, 24, layout.checksum(data[64:OFFSET]))
        struct.pack_into("<Q", data, 56, layout.checksum(data[:56]))
        path.write_bytes(data)
        refuse(path, "table entry 0 at offset 0x40", "version 1 has no meaning for")


def test_records_that_are_missing_or_too_many(forger: Forger) -> None:
    forger.change("vcpu[1]", number=2)
    with Reader(str(forger.save()), KNOWN) as reader, pytest.raises(BadInput, match=r"has no section vcpu\[1\]"):
        reader.records(Vcpu)


def test_one_record_or_many(tmp_path: Path, memory: Memory) -> None:
    path = tmp_path / "vm.pyhv"
    with Writer(str(path)) as writer:
        writer.add(Clock(1), 0)
        writer.add(Clock(2), 1)
        writer.write_memory(memory.ram)
        writer.commit()
    with Reader(str(path), KNOWN) as reader:
        assert reader.records(Clock) == (Clock(1), Clock(2))
        for get in (reader.record, reader.optional):
            with pytest.raises(BadInput, match="has 2 sections clock; there must be one"):
                get(Clock)
        with pytest.raises(BadInput, match="has no section vcpu, which every snapshot"):
            reader.record(Vcpu)


def test_a_record_says_where_it_is_wrong(tmp_path: Path, memory: Memory) -> None:
    @record("vcpu", 1)
    class OtherVcpu(NamedTuple):
        rip: str
        xsave: bytes

    path = tmp_path / "vm.pyhv"
    write(path, memory, OtherVcpu("no", b""))
    with Reader(str(path), KNOWN) as reader, pytest.raises(BadInput) as caught:
        reader.records(Vcpu)
    assert caught.value.subject == f"{path}: vcpu[0].rip"


def test_unknown_sections(tmp_path: Path, memory: Memory) -> None:
    """An optional one is passed over, its checksum looked at all the same; a mandatory one is refused by name."""
    path = tmp_path / "vm.pyhv"
    for mandatory in (False, True):
        with Writer(str(path)) as writer:
            writer.add(Clock(3))
            writer.add(News("?" * 50), mandatory=mandatory)
            writer.write_memory(memory.ram)
            writer.commit()
        if mandatory:
            refuse(path, "section news[0]: is unknown to this pyhv", "use a newer pyhv")
            with Reader(str(path), (Clock, News)) as reader:
                assert reader.record(News).text == "?" * 50
        else:
            with Reader(str(path), KNOWN) as reader:
                assert reader.record(Clock) == Clock(3)
                reader.verify()
                place = reader.sections[1].offset + 20
            with path.open("r+b") as file:
                os.pwrite(file.fileno(), b"!", place)
            refuse(path, "section news[0]", "does not have its checksum")
    # A kind of section that does not exist yet.
    with Writer(str(path)) as writer:
        writer.add(Clock(3))
        writer.add(News("x"), mandatory=False)
        writer.write_memory(memory.ram)
        writer.commit()
    forger = Forger(path, path.read_bytes())
    forger.change("news[0]", kind=77)
    with Reader(str(forger.save()), KNOWN) as reader:
        assert reader.record(Clock) == Clock(3)


def huge_files(forger: Forger) -> Iterator[tuple[str, str, Path]]:
    """Files of 1 TiB, nearly all of it hole, whose lengths fit into them: what is huge, and what must be said of it."""
    size = 1 << 40
    yield "the header's count", "impossible number of sections", forger.save(size, count=(1 << 32) - 1)
    good = list(forger.sections)
    for length in (codec.MAX_BYTES + 1, size - good[2].offset):
        forger.change("clock[0]", length=length)
        yield "a record", "section clock[0]: is too large", forger.save(size)
    forger.sections = list(good)
    forger.change("memory-sums[0]", length=size - good[3].offset)
    yield "the sums", "section memory[0]: overlaps", forger.save(size)
    forger.sections = list(good)
    forger.change("memory[0]", length=size - good[4].offset)
    yield "the memory", "bytes of sums for", forger.save(size)
    forger.sections, end = [], HEADER_SIZE + 5 * ENTRY_SIZE
    for number in range(5):
        forger.sections.append(Section("vcpu", number, RECORD, False, end, codec.MAX_BYTES, 0))
        end += codec.MAX_BYTES
    yield "all records together", "bytes of records", forger.save(size)


def test_absurd_lengths_allocate_nothing(forger: Forger) -> None:
    for what, problem, path in huge_files(forger):
        tracemalloc.start()
        refuse(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20, what
        refuse(path, problem)


def test_the_check_of_allocations_can_fail(forger: Forger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that believes a length until it has read that much."""

    def believe(header: layout.Header, table: bytes, file_size: int, known: object, path: str) -> tuple[Section, ...]:
        large = Section("clock", 0, RECORD, True, OFFSET, 32 << 20, 0)
        return (large, Section("memory", 0, MEMORY, True, large.end, 0, 0))

    monkeypatch.setattr(layout, "parse_table", believe)
    with pytest.raises(AssertionError, match=r"the header's count|a record"):
        test_absurd_lengths_allocate_nothing(forger)


# -------------------------------------------------------------------------------------------------------- fuzzing


def mend(data: bytearray) -> None:
    """Puts the checksums of header and table right, so that what is behind them is reached."""
    if len(data) < HEADER_SIZE:
        return
    count = min(struct.unpack_from("<I", data, 12)[0], 5000)
    struct.pack_into("<Q", data, 24, layout.checksum(bytes(data[64 : 64 + 64 * count])))
    struct.pack_into("<Q", data, 56, layout.checksum(bytes(data[:56])))


def check_answer(path: Path) -> str:
    """However the file is: read to its end, or BadInput in one line."""
    try:
        with Reader(str(path), KNOWN) as reader:
            try:
                reader.records(Vcpu)
                reader.optional(Clock)
                reader.verify()
            except BadInput as error:
                assert "\n" not in str(error)
                return "opened"
            return "accepted"
    except BadInput as error:
        assert "\n" not in str(error)
        return "refused"


edits = st.tuples(
    st.sampled_from([0, 8, 12, 16, 24, 32, 64, 88, 96, 104, 112, 128, 160, 168, 192, 256, 320, 352, 360, 384, 440, 600])
    | st.integers(0, 5000),
    st.integers(0, 40),
    st.binary(min_size=1, max_size=8) | st.integers(0, 5000).map(lambda number: number.to_bytes(8, "little")),
)


@settings(max_examples=FUZZ_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(edits, min_size=1, max_size=4),
    cut=st.none() | st.integers(-9000, 9000),
    mended=st.sampled_from([True, True, False]),
)
def test_fuzz(
    tmp_path: Path, example_bytes: bytes, changes: list[tuple[int, int, bytes]], cut: int | None, mended: bool
) -> None:
    data = bytearray(example_bytes)
    for place, more, content in changes:
        data[place + more : place + more + len(content)] = content
    if cut is not None:
        data = data[:cut] if cut < 0 else data + bytes(cut)
        struct.pack_into("<Q", data, 16, len(data))
    if mended:
        mend(data)
    path = tmp_path / "vm.pyhv"
    path.write_bytes(data)
    if check_answer(path) == "accepted" and not mended:
        assert bytes(data) == example_bytes  # without new checksums nothing else gets through


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.booleans())
def test_fuzz_from_nothing(tmp_path: Path, noise: bytes, mended: bool) -> None:
    data = bytearray(b"PYHVSNAP\1\0\0\0\2\0\0\0" + noise)
    if len(data) >= 24:
        struct.pack_into("<Q", data, 16, len(data))
    if mended:
        mend(data)
    path = tmp_path / "vm.pyhv"
    path.write_bytes(data)
    assert check_answer(path) == "refused"


# ------------------------------------------------------------------------------------- writing: all or nothing


OLD = b"the old file"


def test_mode_is_kept(tmp_path: Path, memory: Memory) -> None:
    path = tmp_path / "vm.pyhv"
    old_umask = os.umask(0)
    try:
        write(path, memory, Clock(1))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600  # guest memory holds secrets
        path.chmod(0o640)
        write(path, memory, Clock(2))
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(old_umask)


def test_link_is_followed(tmp_path: Path, memory: Memory) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "vm.pyhv"
    link.symlink_to("there/real.pyhv")
    for _ in range(2):
        write(link, memory, Clock(1))
        assert link.is_symlink() and names(tmp_path / "there") == {"real.pyhv"}


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("missing/vm.pyhv", "cannot be written: No such file or directory"),
        ("file/vm.pyhv", "cannot be written: Not a directory"),
        ("directory", "is a directory"),
        ("directory/", "is a directory"),
        ("fifo", "no regular file"),
        ("null", "no regular file"),
    ],
)
def test_place_that_cannot_be_used(tmp_path: Path, place: str, problem: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    before, files = names(tmp_path), len(os.listdir("/proc/self/fd"))
    with pytest.raises(BadInput, match=problem):
        Writer(f"{tmp_path}/{place}")
    assert names(tmp_path) == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_directory_that_may_not_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="Permission denied"):
        Writer(str(tmp_path / "vm.pyhv"))


@pytest.fixture(params=["without a name", "with a name"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to keep a file that is not complete: the second is that of file systems without O_TMPFILE."""
    if request.param == "with a name":
        monkeypatch.setattr(replace.Replacement, "_open", replace.Replacement._open_named)
    return str(request.param)


def test_given_up(tmp_path: Path, memory: Memory, way: str) -> None:
    """Whenever a writer is closed before its end, or its user fails: the old file is there, and nothing else."""
    path = tmp_path / "vm.pyhv"
    path.write_bytes(OLD)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with Writer(str(path)):
        pass
    with Writer(str(path)) as writer:
        writer.write_memory(memory.ram)
    with pytest.raises(KeyboardInterrupt), Writer(str(path)) as writer:
        writer.write_memory(memory.ram, fail)
    with pytest.raises(BadInput), Writer(str(path)) as writer:
        writer.add(Clock(-1))
    with pytest.raises(BadInput, match="is there twice"), Writer(str(path)) as writer:
        writer.add(Clock(1))
        writer.add(Clock(2))
        writer.write_memory(memory.ram)
    for size in (0, PAGE_SIZE + 1):
        with pytest.raises(PyhvError), Writer(str(path)) as writer:
            writer.write_memory(Ram(memory.fd, size))
    with pytest.raises(HostError, match="Bad file descriptor"), Writer(str(path)) as writer:
        writer.write_memory(Ram(-1, PAGE_SIZE))
    with pytest.raises(HostError, match="the file ends at offset"), Writer(str(path)) as writer:
        writer.write_memory(Ram(memory.fd, SIZE + PAGE_SIZE))
    with pytest.raises(ValueError, match="memory is missing"), Writer(str(path)) as writer:
        writer.commit()
    with pytest.raises(ValueError, match="memory is missing"), Writer(str(path)) as writer:
        with pytest.raises(KeyboardInterrupt):
            writer.write_memory(memory.ram, fail)
        writer.commit()  # the memory is there in part only
    with Writer(str(path)) as writer:
        writer.write_memory(memory.ram)
        with pytest.raises(ValueError, match="one memory"):
            writer.write_memory(memory.ram)
        with pytest.raises(ValueError, match="before the memory"):
            writer.add(Clock(1))
    assert path.read_bytes() == OLD and names(tmp_path) == {"vm.pyhv"}


CALLS = ["ftruncate", "pwrite", "fchmod", "fsync", "link", "rename", "fstat"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_call_that_fails(
    tmp_path: Path, memory: Memory, way: str, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Each system call of the writer fails at its first, second ... use, until it has no more."""
    path = tmp_path / "vm.pyhv"
    path.write_bytes(OLD)
    real = getattr(os, call)
    files = len(os.listdir("/proc/self/fd"))
    for nth in itertools.count():
        used = itertools.count()

        def faulty(*arguments: Any, nth: int = nth, used: Iterator[int] = used, **options: Any) -> Any:
            if next(used) == nth:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        error: PyhvError | None = None
        with monkeypatch.context() as patch:
            patch.setattr(os, call, faulty)
            try:
                write(path, memory, Vcpu(1, b""), Clock(1))
            except PyhvError as caught:
                error = caught
        assert len(os.listdir("/proc/self/fd")) == files
        assert names(tmp_path) == {"vm.pyhv"}
        if error is None:
            break
        assert str(path) in str(error) and os.strerror(number) in str(error)
        if "the new file is in place" in str(error):
            assert call == "fsync" and nth == 1
            check(path)
            path.write_bytes(OLD)
        assert path.read_bytes() == OLD
    assert nth == {"fsync": 2, "link": 1 if way == "without a name" else 0}.get(call, nth)
    with Reader(str(path), KNOWN) as reader:
        reader.verify()


def test_file_size_limit(tmp_path: Path, memory: Memory) -> None:
    """RLIMIT_FSIZE is the one way to have a write refused that needs no privilege and no device."""
    path = tmp_path / "vm.pyhv"
    path.write_bytes(OLD)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_SIZE, old[1]))
    try:
        with pytest.raises(HostError, match="File too large") as caught:
            write(path, memory, Clock(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert f"this process may have {CHUNK_SIZE} bytes in a file (ulimit -f); no snapshot was made" in str(caught.value)
    assert path.read_bytes() == OLD and names(tmp_path) == {"vm.pyhv"}


FULL_DISK = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.test_container import *
os.environ["TMPDIR"] = place = {place!r}
path = Path(place, "vm.pyhv")
small, large = Memory(1 << 20, {{0: page(0)}}), Memory(8 << 20, {{n: page(n) for n in range(0, 2048, 2)}})
write(path, small, Clock(1))
for _ in range(3):
    try:
        write(path, large, Clock(2))
    except HostError as error:
        print(error.errnum, error)
    else:
        print("written")
    with Reader(str(path), KNOWN) as reader:
        reader.verify()
        print(reader.record(Clock).nanoseconds, sorted(os.listdir(place)), os.statvfs(place).f_bavail > 700)
"""


def test_full_disk(tmp_path: Path) -> None:
    """On a tmpfs of 4 MiB in a mount namespace of its own; with a user namespace around it where we are not root, which
    most distributions allow. /dev/full will not do: a snapshot needs a file that has a size and holes."""
    if not shutil.which("unshare"):
        pytest.skip("unshare (util-linux) is not installed")
    place, root = tmp_path / "disk", Path(__file__).resolve().parents[2]
    place.mkdir()
    code = FULL_DISK.format(root=str(root), place=str(place))
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    mount = f"mount -t tmpfs -o size=4m none {place} && exec {sys.executable} -c \"$0\""
    tried = subprocess.run([*unshare, "sh", "-c", f"mount -t tmpfs none {place}"], capture_output=True, timeout=60)
    if tried.returncode:
        pytest.skip("no mount namespace with a tmpfs can be had here: not as root, nor in a user namespace")
    done = subprocess.run([*unshare, "sh", "-c", mount, code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for failed, after in zip(lines[::2], lines[1::2], strict=True):
        assert failed.startswith(f"{errno.ENOSPC} write ") and "No space left on device, pwrite" in failed
        assert after == "1 ['vm.pyhv'] True"  # the old file, nothing beside it, its space free again


# ---------------------------------------------------------------------------------------- leftovers, and two at once


def new_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.pyhv-new")


def test_leftover_of_a_killed_writer_is_removed(tmp_path: Path, memory: Memory, way: str) -> None:
    path = tmp_path / "vm.pyhv"
    for _ in range(2):
        new_name(path).write_bytes(b"half a file")
        write(path, memory, Clock(1))
        assert names(tmp_path) == {"vm.pyhv"}


def test_living_writer_is_left_alone(
    tmp_path: Path, memory: Memory, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vm.pyhv"
    path.write_bytes(OLD)
    monkeypatch.setattr(replace, "_PATIENCE", 0.05)
    with new_name(path).open("wb") as living:
        living.write(b"half a file")
        living.flush()
        fcntl.flock(living, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="is being written by another process"):
            write(path, memory, Clock(1))
        assert new_name(path).read_bytes() == b"half a file" and path.read_bytes() == OLD
    write(path, memory, Clock(2))
    assert names(tmp_path) == {"vm.pyhv"}


def test_writer_that_is_about_to_rename_is_left_alone(
    tmp_path: Path, memory: Memory, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One writer comes while another has its file beside the old one: it waits, and takes nothing away."""
    path = tmp_path / "vm.pyhv"
    monkeypatch.setattr(replace, "_PATIENCE", 0.05)
    rename = os.rename

    def come_between(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(BadInput, match="is being written by another process"):
            write(path, memory, Clock(2))
        rename(*arguments, **options)

    monkeypatch.setattr(os, "rename", come_between)
    write(path, memory, Clock(1))
    with Reader(str(path), KNOWN) as reader:
        assert reader.record(Clock) == Clock(1)
    assert names(tmp_path) == {"vm.pyhv"}


def test_planted_link_is_not_followed(tmp_path: Path, memory: Memory, way: str) -> None:
    path, other = tmp_path / "vm.pyhv", tmp_path / "other"
    other.write_bytes(OLD)
    new_name(path).symlink_to(other)
    with pytest.raises(PyhvError, match="symbolic links"):
        write(path, memory, Clock(1))
    assert other.read_bytes() == OLD


def in_child(work: Callable[[], None]) -> int:
    """Starts `work` in a child process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def save_for_ever(path: Path, memory: Memory, save: Callable[[Path, Memory, Clock], None]) -> None:
    for count in itertools.count(1):
        # The clock and the memory go together: a mixture of two files would show.
        os.pwrite(memory.fd, struct.pack("<Q", count), 5 * PAGE_SIZE)
        save(path, memory, Clock(count))


def check_after_kill(path: Path) -> int:
    """The file is a whole one; its number."""
    _, clock = check(path)
    with Reader(str(path), KNOWN) as reader:
        stamp = os.pread(reader.memory_fd, 8, reader.memory_offset + 5 * PAGE_SIZE)
    assert stamp == struct.pack("<Q", clock.nanoseconds)
    return clock.nanoseconds


def kill_at_random(path: Path, save: Callable[[Path, Memory, Clock], None], times: int) -> int:
    """Kills writers of `path` at random moments and looks at what they leave; how many had written something."""
    numbers, wrote = random.Random(4), 0
    for _ in range(times):
        memory = Memory(SIZE, PAGES)
        save(path, memory, Clock(0))
        os.pwrite(memory.fd, bytes(8), 5 * PAGE_SIZE)
        save(path, memory, Clock(0))
        begun, begins = os.pipe()

        def work(memory: Memory = memory, begins: int = begins) -> None:
            os.write(begins, b"x")
            save_for_ever(path, memory, save)

        child = in_child(work)
        os.read(begun, 1)  # where others need the processors too, it may begin late
        time.sleep(numbers.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(begun)
        os.close(begins)
        memory.close()
        wrote += check_after_kill(path) > 0
        # At most the one file that the next writer will remove.
        assert names(path.parent) <= {path.name, new_name(path).name}
    return wrote


def test_kill_at_any_moment(tmp_path: Path, way: str) -> None:
    path = tmp_path / "vm.pyhv"
    assert kill_at_random(path, write, 25) > 0
    memory = Memory(SIZE, PAGES)
    write(path, memory, Clock(1))
    memory.close()
    assert names(tmp_path) == {"vm.pyhv"}


def test_kill_between_name_and_rename(tmp_path: Path, memory: Memory, way: str) -> None:
    """The moments that a random kill hardly ever meets."""
    path = tmp_path / "vm.pyhv"
    for call, after in (("rename", False), ("rename", True), ("link", True)):
        write(path, memory, Clock(1))

        def work(call: str = call, after: bool = after) -> None:
            real = getattr(os, call)

            def die(*arguments: Any, **options: Any) -> None:
                if after:
                    real(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)

            setattr(os, call, die)
            write(path, memory, Clock(2))

        os.waitpid(in_child(work), 0)
        expected = 2 if (call, after) == ("rename", True) or (call == "link" and way == "with a name") else 1
        assert check(path)[1] == Clock(expected)
        assert names(tmp_path) <= {path.name, new_name(path).name}
    write(path, memory, Clock(3))
    assert names(tmp_path) == {"vm.pyhv"}


def test_the_check_of_kills_can_fail(tmp_path: Path) -> None:
    """Writers that are no good: one writes in place, one leaves a new file behind each time."""

    def in_place(path: Path, memory: Memory, clock: Clock) -> None:
        write(tmp_path / "good", memory, clock)
        data = (tmp_path / "good").read_bytes()
        (tmp_path / "good").unlink()
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(0)
            for at in range(0, len(data), 65536):
                file.write(data[at : at + 65536])
                time.sleep(0.0005)

    def untidy(path: Path, memory: Memory, clock: Clock) -> None:
        half = path.with_name(f"{path.name}.{os.urandom(4).hex()}")
        write(half, memory, clock)
        time.sleep(0.001)
        half.rename(path)

    for number, save in enumerate((in_place, untidy)):
        directory = tmp_path / str(number)
        directory.mkdir()
        with pytest.raises((BadInput, AssertionError)):
            kill_at_random(directory / "vm.pyhv", save, 200)


def test_two_writers_of_one_file(tmp_path: Path, way: str) -> None:
    """Each time one of them wins with a whole file; neither disturbs the other beyond a wait."""
    path = tmp_path / "vm.pyhv"

    def work(first: int) -> None:
        memory = Memory(SIZE, PAGES)
        for count in range(first, first + 15):
            os.pwrite(memory.fd, struct.pack("<Q", count), 5 * PAGE_SIZE)
            write(path, memory, Clock(count))

    children = [in_child(lambda first=first: work(first)) for first in (100, 200, 300)]  # type: ignore[misc]
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert check_after_kill(path) in (114, 214, 314)
    assert names(tmp_path) == {"vm.pyhv"}

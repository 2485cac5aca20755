"""Loaders: each way in which an image can be wrong has its own line, and no bytes bring them down."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.boot import elf, image, recognise, start64
from pyhv.errors import BadInput

MEMORY = 64 << 20


def make_elf(
    *,
    bits: int = 2,
    endian: int = 1,
    kind: int = 2,
    machine: int = 62,
    entry: int = 0x100000,
    segments: tuple[tuple[int, int, bytes, int], ...] = ((1, 0x100000, b"\xf4", 0x1000),),
) -> bytes:
    """An ELF file of (type, physical address, bytes, size in memory) segments."""
    headers, body = b"", b""
    base = 64 + 56 * len(segments)
    for p_type, paddr, data, memsz in segments:
        headers += struct.pack("<IIQQQQQQ", p_type, 7, base + len(body), paddr, paddr, len(data), memsz, 1)
        body += data
    ident = bytes([0x7F, *b"ELF", bits, endian, 1]).ljust(16, b"\0")
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, kind, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    return head + headers + body


def make_elf32(entry: int = 0x100000, segments: tuple[tuple[int, int, bytes, int], ...] = ()) -> bytes:
    """The same for i386; without segments there is one."""
    segments = segments or ((1, 0x100000, b"\xf4", 0x1000),)
    headers, body = b"", b""
    base = 52 + 32 * len(segments)
    for p_type, paddr, data, memsz in segments:
        headers += struct.pack("<8I", p_type, base + len(body), paddr, paddr, len(data), memsz, 7, 1)
        body += data
    ident = bytes([0x7F, *b"ELF", 1, 1, 1]).ljust(16, b"\0")
    head = struct.pack("<16sHHIIIIIHHHHHH", ident, 2, 3, 1, entry, 52, 0, 0, 52, 32, len(segments), 0, 0, 0)
    return head + headers + body


def note(kind: int, value: bytes, owner: bytes = b"pyhv\0") -> bytes:
    pad = lambda b: b + b"\0" * (-len(b) % 4)  # noqa: E731
    return struct.pack("<III", len(owner), len(value), kind) + pad(owner) + pad(value)


def test_a_good_image() -> None:
    notes = note(9, b"other") + note(1, struct.pack("<2Q", 0x100010, 0x100020)) + note(2, b"cpl3\0")
    parsed = elf.parse(
        make_elf(segments=((1, 0x100000, b"code", 0x1000), (4, 0, notes, len(notes)), (1, 0x200000, b"", 16))), "image"
    )
    assert parsed.segments == (image.Segment(0x100000, b"code", 0x1000), image.Segment(0x200000, b"", 16))
    assert parsed.cpuid_sites == (0x100010, 0x100020)
    assert parsed.enters_user_mode("a cpl3 b") and not parsed.enters_user_mode("cpl30")


def test_an_image_without_notes_may_do_anything() -> None:
    parsed = elf.parse(make_elf(), "image")
    assert parsed.cpuid_sites == () and parsed.enters_user_mode("")


def test_notes_of_others_are_not_ours() -> None:
    notes = note(1, struct.pack("<Q", 1), owner=b"GNU\0")
    assert elf.parse(make_elf(segments=((1, 0x100000, b"x", 9), (4, 0, notes, 0))), "image").cpuid_sites == ()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (make_elf()[:40], "cut off in its header (40 of 64 bytes)"),
        (make_elf32(), "not an x86-64 image but ELF for 32-bit i386; 32-bit kernels are booted by"),
        (make_elf32()[:51], "cut off in its header (51 of 52 bytes)"),
        (make_elf(machine=3), "not an x86 image but ELF for 64-bit i386"),
        (make_elf(machine=183), "64-bit AArch64"),
        (make_elf(machine=4711), "machine 4711"),
        (make_elf(endian=2), "big-endian"),
        (make_elf(kind=3), "position-independent or shared"),
        (make_elf(kind=1), "that is not linked: an object file or a kernel module; link it"),
        (make_elf(kind=4), "that is a core dump"),
        (make_elf(kind=9), "of type 9, not an executable"),
        (make_elf()[:100], "program headers"),
        (make_elf(segments=((1, 0x100000, b"12345678", 8),))[:-1], "segment 0 (0x8 bytes at offset 0x78) lies outside"),
        (make_elf(segments=((1, 0x100000, b"12", 1),)), "more bytes in the file (0x2) than in memory (0x1)"),
        (make_elf(segments=((1, 0x1000, b"1", 1),)), "loaded at 0x1000, below 1 MiB"),
        (make_elf(segments=()), "no segment to load"),
        (make_elf(entry=0x500000), "entry point 0x500000 lies in none"),
        (make_elf(segments=((6, 0, b"", 0),) * 257), "has 257 program headers, more than any image needs"),
        (make_elf(segments=((4, 0, note(1, b"123"), 0),)), "note of CPUID addresses has 3 bytes"),
        (make_elf(segments=((4, 0, note(1, b"1" * 40), 0),)), "note of CPUID addresses has 40 bytes"),
    ],
)
def test_each_fault_has_its_line(data: bytes, words: str) -> None:
    with pytest.raises(BadInput) as error:
        elf.parse(data, "image")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_parsed(tail: bytes) -> None:
    try:
        elf.parse(b"\x7fELF" + tail, "image")
    except BadInput:
        pass


@given(st.data())
def test_a_damaged_image_is_refused_or_parsed(data: st.DataObject) -> None:
    notes = note(1, struct.pack("<2Q", 1, 2)) + note(2, b"word\0")
    good = bytearray(make_elf(segments=((1, 0x100000, b"code", 0x1000), (4, 0, notes, len(notes)))))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = elf.parse(bytes(good), "image")
    except BadInput:
        return
    for segment in parsed.segments:
        assert len(segment.data) <= segment.size and segment.gpa >= start64.LOAD_BASE


def test_files_that_are_no_images(tmp_path: Path) -> None:
    def problem(path: Path, memory: int = MEMORY, kind: str = "") -> str:
        with pytest.raises(BadInput) as error:
            recognise.read(str(path), memory, kind)
        return str(error.value)

    assert "is a directory" in problem(tmp_path)
    assert "No such file" in problem(tmp_path / "missing")
    assert "not a regular file" in problem(Path("/dev/zero"))
    empty = tmp_path / "empty"
    empty.touch()
    assert problem(empty) == f"{empty}: is empty"
    large = tmp_path / "large"
    large.write_bytes(bytes(5000))
    assert "is 5000 bytes, the guest has 4096 bytes of memory" in problem(large, 4096, "flat")
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(bytes(0x202) + b"HdrS" + bytes(50))
    assert "is a Linux kernel cut off in its set-up header (568 bytes)" in problem(kernel)


def test_a_flat_binary_goes_to_1_mib(tmp_path: Path) -> None:
    path = tmp_path / "flat"
    path.write_bytes(b"\xf4")
    flat = recognise.read(str(path), MEMORY, "flat")
    assert (flat.kind, flat.entry, flat.segments) == ("flat", 0x100000, (image.Segment(0x100000, b"\xf4", 1),))
    assert flat.user_word is None


def test_a_large_image_is_the_same_though_it_is_mapped(tmp_path: Path) -> None:
    path, content = tmp_path / "large", bytes(range(256)) * (image._MAP_FROM // 256)
    for size in (len(content) - 1, len(content)):
        path.write_bytes(content[:size])
        (piece,) = recognise.read(str(path), 4 * MEMORY, "flat").segments
        assert piece == image.Segment(0x100000, content[:size], size)


def test_command_lines() -> None:
    assert start64.encode_command_line("ä b") == b"\xc3\xa4 b\0"
    assert len(start64.encode_command_line("x" * 4095)) == 4096
    for bad in ("x" * 4096, "a\0b", "\udcff"):
        with pytest.raises(BadInput, match="command line"):
            start64.encode_command_line(bad)

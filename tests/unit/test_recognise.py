"""What a file is: nothing but an image is run, and what is no image is named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.boot import elf, foreign, image, multiboot, recognise
from pyhv.errors import BadInput
from pyhv.snapshot import layout
from tests.unit.test_boot import make_elf, make_elf32, note

MEMORY = 4 << 20
NEEDS_GCC = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc and binutils")


def problem(data: bytes, tmp_path: Path, kind: str = "") -> str:
    path = tmp_path / "image"
    path.write_bytes(data)
    with pytest.raises(BadInput) as error:
        recognise.read(str(path), MEMORY, kind)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


def at(offset: int, magic: bytes, size: int = 1024) -> bytes:
    """Bytes that are no text and no image but for those at `offset`."""
    return b"\xf4".ljust(offset, b"\xf4")[:offset] + magic + b"\xf4" * size


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    return file.getvalue()


def make_pe(machine: int = 0x8664, subsystem: int = 10, sections: tuple[bytes, ...] = (b".text",)) -> bytes:
    """The headers of a PE32+ file."""
    optional = bytearray(112)
    struct.pack_into("<H", optional, 0, 0x20B)
    struct.pack_into("<H", optional, 68, subsystem)
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", machine, len(sections), 0, 0, 0, len(optional), 0)
    table = b"".join(name.ljust(8, b"\0") + bytes(32) for name in sections)
    return head.ljust(0x80, b"\0") + coff + optional + table


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (layout.MAGIC + bytes(100), "is a pyhv snapshot; pyhv restore FILE lets it go on"),
        (gzip.compress(b"x" * 1000), "is compressed by gzip; unpack it first"),
        (lzma.compress(b"x" * 1000), "is compressed by xz; unpack it first"),
        (lzma.compress(b"x" * 1000, lzma.FORMAT_ALONE), "is compressed by lzma"),
        (bz2.compress(b"x" * 1000), "is compressed by bzip2"),
        (at(0, b"\x28\xb5\x2f\xfd"), "is compressed by zstd"),
        (at(0, b"\x02\x21\x4c\x18"), "is compressed by lz4"),
        (tar(), "is a tar archive"),
        (zipped(), "is a zip archive"),
        (b"!<arch>\ndebian-binary   ", "is an ar archive, such as a Debian package"),
        (at(0, b"07070100000000"), "is a cpio archive, as initial RAM disks are; give the kernel, and this by"),
        (at(0, b"QFI\xfb"), "is a disk image (qcow2); pyhv has no disks"),
        (at(0x8001, b"CD001"), "is an ISO 9660 image; pyhv has no disks"),
        (at(510, b"\x55\xaa"), "is a boot sector or a disk image, which needs a BIOS"),
        (at(512, b"EFI PART"), "is a disk image with a partition table (GPT)"),
        (at(0, b"hsqs"), "is a file system (squashfs)"),
        (b"MZ".ljust(56, b"\0") + b"ARMd" + bytes(100), "is a Linux kernel for arm64 (Image); give a kernel"),
        (at(56, b"RSC\5"), "is a Linux kernel for RISC-V (Image)"),
        (b"MZ\0\0zimg" + bytes(100), "is a Linux kernel packed for UEFI firmware (zboot)"),
        (make_pe(), "is a program for UEFI firmware (x86-64), which pyhv does not have"),
        (make_pe(machine=0xAA64), "is a program for UEFI firmware (AArch64)"),
        (make_pe(sections=(b".osrel", b".linux", b".initrd")), "is a unified kernel image for UEFI firmware (x86-64)"),
        (make_pe(subsystem=3), "is a Windows program (x86-64)"),
        (make_pe()[:200], "is a DOS program, or a PE file that is cut off"),
        (b"#!/bin/sh\nexit 0\n", "is a script (/bin/sh)"),
        (b"#! /usr/bin/env python3 -u\n", "is a script (/usr/bin/env python3 -u)"),
        (b"console=ttyS0\n" * 2000, "is a text file"),
        (("Grüße, " * 1000).encode(), "is a text file"),
        (at(0, b"\xd6\x50\x52\xe8" + struct.pack("<III", 0, 16, -(0xE85250D6 + 16) & 0xFFFFFFFF)), "is a multiboot 2"),
        (make_elf(machine=183), "is not an x86 image but ELF for 64-bit AArch64"),
        (make_elf32(), "is an ELF file for 32-bit i386 that has neither a multiboot header nor a PVH note"),
        (b"\xf4", 'is not recognised as an image; if it is code for 1 MiB, boot="flat" runs it'),
        (b"\x7fEL", "is not recognised as an image"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, words: str, tmp_path: Path) -> None:
    assert words in problem(data, tmp_path)


def test_a_file_is_named_before_its_size_counts(tmp_path: Path) -> None:
    assert "is an ISO 9660 image" in problem(at(0x8001, b"CD001", 2 * MEMORY), tmp_path)


@pytest.mark.parametrize("data", [b"\xf4", b"#!/bin/sh\n", gzip.compress(b"x"), make_elf32(), layout.MAGIC])
def test_flat_is_flat_when_it_is_asked_for(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    assert recognise.read(str(path), MEMORY, "flat").segments == (image.Segment(1 << 20, data, len(data)),)


@given(st.sampled_from([b"", b"MZ", b"#!", *(magic for _, magic, *_ in foreign._SIGNATURES)]), st.binary(max_size=400))
def test_any_bytes_have_a_name(magic: bytes, tail: bytes) -> None:
    what, advice = foreign.describe(magic + tail)
    assert what.startswith("is ") and "\n" not in what + advice


# ------------------------------------------------------------------------------------------------ ELF


def make_vmlinux(maker: object = make_elf, notes: bytes = b"") -> bytes:
    """A kernel that is linked where Linux is."""
    data = b"code Linux version 6.1.0 (somebody@somewhere)"
    made = make_elf if maker is make_elf else make_elf32
    kernel = bytearray(made(segments=((1, 0x100000, data, 0x1000), (4, 0, notes, len(notes)))))
    if made is make_elf:
        struct.pack_into("<Q", kernel, 64 + 16, 0xFFFFFFFF80100000)
    else:
        struct.pack_into("<I", kernel, 52 + 8, 0xC0100000)
    return bytes(kernel)


@pytest.mark.parametrize("maker", [make_elf, make_elf32])
def test_a_vmlinux_without_pvh_is_named(maker: object, tmp_path: Path) -> None:
    assert problem(make_vmlinux(maker), tmp_path) == (
        "is a Linux kernel (vmlinux) without CONFIG_PVH: no note says where to enter it; "
        "give its bzImage, or build it with CONFIG_PVH"
    )
    path = tmp_path / "image"
    path.write_bytes(make_vmlinux(maker, note(18, struct.pack("<I", 0x100000), owner=b"Xen\0")))
    assert recognise.read(str(path), MEMORY).kind == "pvh"


def test_a_program_is_no_guest(tmp_path: Path) -> None:
    abi_tag = note(1, bytes(16), owner=b"GNU\0")
    for segment in ((4, 0, abi_tag, len(abi_tag)), (3, 0, b"/lib64/ld-linux-x86-64.so.2\0", 28)):
        made = make_elf(segments=((1, 0x100000, b"code", 0x1000), segment))
        assert "is a program for an operating system, not a guest" in problem(made, tmp_path)


def pad(data: bytes, to: int) -> bytes:
    return data + bytes(-len(data) % to)


def padded_note(kind: int, value: bytes, owner: bytes, to: int) -> bytes:
    return pad(pad(struct.pack("<III", len(owner), len(value), kind) + owner, to) + value, to)


@pytest.mark.parametrize("alignment", [1, 4, 8])
@pytest.mark.parametrize("to", [4, 8])
def test_notes_are_read_however_they_are_padded(alignment: int, to: int) -> None:
    """By the segment's alignment, or by the other one where they come out even by that only."""
    notes = padded_note(2, b"a word\0", b"pyhv\0", to) + padded_note(1, struct.pack("<Q", 0x100000), b"pyhv\0", to)
    made = bytearray(make_elf(segments=((1, 0x100000, b"code", 0x1000), (4, 0, notes, len(notes)))))
    struct.pack_into("<Q", made, 64 + 56 + 48, alignment)
    parsed = elf.parse(bytes(made), "image")
    assert (parsed.user_word, parsed.cpuid_sites) == ("a word", (0x100000,))


def build(source: str, tmp_path: Path, *options: str, bits: int = 64) -> Path:
    """An ELF executable of this assembly."""
    code, made = tmp_path / "a.S", tmp_path / "a"
    code.write_text(source + '\n.section .note.GNU-stack,"",@progbits\n')
    command = ["gcc", f"-m{bits}", "-nostdlib", "-static", "-no-pie", *options, "-o", str(made), str(code)]
    subprocess.run(command, check=True, timeout=60)
    return made


_CODE = ".globl _start\n_start: movb $7, %al\n outb %al, $0xf4\n"


@NEEDS_GCC
@pytest.mark.parametrize(
    "options",
    [
        "-Wl,-z,separate-code",
        "-Wl,-z,noseparate-code",
        "-Wl,-z,separate-code -Wl,--build-id",
        "-Wl,-z,noseparate-code -Wl,--build-id",
        "-Wl,-n",
    ],
)
def test_the_headers_that_a_linker_puts_in_front_are_not_loaded(options: str, tmp_path: Path) -> None:
    """It was linked at 1 MiB, and the linker put a page with the file's headers below."""
    made = build(_CODE, tmp_path, "-Wl,-Ttext=0x100000", *options.split())
    parsed = recognise.read(str(made), MEMORY)
    assert (parsed.kind, parsed.entry) == ("elf64", 1 << 20)
    assert [(bytes(s.data[:4]), s.gpa) for s in parsed.segments if s.gpa == 1 << 20] == [(b"\xb0\x07\xe6\xf4", 1 << 20)]
    assert all(s.gpa >= 1 << 20 for s in parsed.segments)


@NEEDS_GCC
def test_what_else_is_below_1_mib_is_refused(tmp_path: Path) -> None:
    made = build(_CODE + ".byte 1\n", tmp_path, "-Wl,-Ttext=0xff800", "-Wl,-z,noseparate-code")
    with pytest.raises(BadInput, match="link it at 0x100000 or above, by ld -n, which leaves the file's headers out"):
        recognise.read(str(made), MEMORY)


def test_memory_that_only_follows_the_headers_is_loaded() -> None:
    """A segment without bytes in the file is nobody's header, wherever it says that it begins."""
    made = bytearray(make_elf(segments=((1, 0x100000, b"code", 0x1000), (1, 0x90000, b"", 0x1000))))
    struct.pack_into("<Q", made, 64 + 56 + 8, 0)
    with pytest.raises(BadInput, match="segment 1 is to be loaded at 0x90000"):
        elf.parse(bytes(made), "image")


_MULTIBOOT2 = """
.section .mb2,"a"
.balign 8
h: .long 0xE85250D6, 0, end-h, -(0xE85250D6 + end-h)
.short 0, 0
.long 8
end:
.text
"""


@NEEDS_GCC
@pytest.mark.parametrize("bits", [32, 64])
def test_a_multiboot_2_kernel_is_named(bits: int, tmp_path: Path) -> None:
    """Its entry is 32-bit code, whatever the file is."""
    made = build(_MULTIBOOT2 + _CODE, tmp_path, "-Wl,-Ttext=0x100000", bits=bits)
    assert multiboot.find(made.read_bytes()) is None
    with pytest.raises(BadInput, match="is a multiboot 2 kernel; pyhv speaks multiboot 1"):
        recognise.read(str(made), MEMORY)
    if bits == 64:
        assert recognise.read(str(made), MEMORY, "elf64").kind == "elf64"

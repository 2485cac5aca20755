"""Linux, PVH and multiboot: what is recognised, what each loader leaves for its kernel, each fault's own line, and that
no damaged image brings a loader down."""

from __future__ import annotations

import itertools
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.accel.data import Segment, Sregs
from pyhv.boot import elf, image, isa, linux, memory_map, multiboot, pvh, recognise
from pyhv.boot.image import Image, Module
from pyhv.errors import BadInput
from pyhv.vm.memory import GuestMemory
from tests.unit.test_boot import make_elf, make_elf32, note

MIB = 1 << 20
RSDP = 0xE0000
NOTHING = Segment(0, 0, 0, 0)
RESET = Sregs(*[NOTHING] * 8, *[0] * (len(Sregs._fields) - 8))

CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(32 * MIB)
    yield made
    made.close()


def problem(call: Callable[[], Any]) -> str:
    with pytest.raises(BadInput) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def text_at(memory: GuestMemory, gpa: int) -> str:
    return memory.read(gpa, 4096).partition(b"\0")[0].decode()


def test_the_memory_map(memory: GuestMemory) -> None:
    areas = memory_map.areas(memory)
    assert areas[0] == (0, 639 * 1024, memory_map.RAM)
    assert (MIB, 31 * MIB, memory_map.RAM) in areas
    for before, after in itertools.pairwise(areas):
        assert before.gpa + before.size <= after.gpa
    assert memory_map.e820(memory)[:20] == struct.pack("<QQI", 0, 639 * 1024, 1)


def test_the_memory_map_has_what_lies_above_the_hole() -> None:
    memory = GuestMemory(5 << 30)
    try:
        areas = memory_map.areas(memory)
    finally:
        memory.close()
    assert areas[-1] == (4 << 30, 2 << 30, memory_map.RAM)
    assert (MIB, (3 << 30) - MIB, memory_map.RAM) in areas


def test_low_memory_is_not_endless(memory: GuestMemory) -> None:
    low = memory_map.LowMemory(memory)
    assert low.place("one", b"x", 0x1000) == low.START
    assert low.place("two", b"y") == low.START + 8
    assert "big: its 700000 bytes do not fit below 640 KiB" in problem(lambda: low.place("big", bytes(700000)))


# ------------------------------------------------------------------------------------------------ Linux


def make_bzimage(
    *,
    magic: bytes = b"HdrS",
    version: int = 0x20F,
    setup_sects: int = 4,
    kernel: bytes = b"K" * 0x1000,
    flags: int = 1,
    boot_flag: int = 0xAA55,
    address: int = 16 * MIB,
    init_size: int = 4 * MIB,
    initrd_max: int = 0x7FFFFFFF,
    cmdline_size: int = 2047,
    syssize: int | None = None,
    loadflags: int = 1,
    code32_start: int = MIB,
    relocatable: int = 1,
) -> bytes:
    data = bytearray(((setup_sects or 4) + 1) * 512)

    def put(offset: int, form: str, value: Any) -> None:
        struct.pack_into("<" + form, data, offset, value)

    put(0x1F1, "B", setup_sects)
    put(0x1F4, "I", len(kernel) // 16 if syssize is None else syssize)
    put(0x1FE, "H", boot_flag)
    data[0x200:0x202] = b"\xeb\x6a"
    data[0x202:0x206] = magic
    put(0x206, "H", version)
    put(0x211, "B", loadflags)
    put(0x214, "I", code32_start)
    # Each field is there from its version of the protocol on; before, there is code in its place.
    for since, offset, form, value in (
        (0x203, 0x22C, "I", initrd_max),
        (0x205, 0x234, "B", relocatable),
        (0x20C, 0x236, "H", flags),
        (0x206, 0x238, "I", cmdline_size),
        (0x20A, 0x258, "Q", address),
        (0x20A, 0x260, "I", init_size),
    ):
        if version >= since:
            put(offset, form, value)
        else:
            data[offset : offset + struct.calcsize(form)] = b"\xcc" * struct.calcsize(form)
            data[0x201] = min(data[0x201], offset - 0x202)
    return bytes(data) + kernel


def test_a_bzimage_is_loaded_as_its_protocol_says(memory: GuestMemory) -> None:
    parsed = linux.parse(make_bzimage(), "bz")
    assert (parsed.kind, parsed.entry, parsed.declares_itself) == ("linux", 16 * MIB + 0x200, False)
    initrd = Module("initrd", "", b"I" * 5000)
    regs, sregs = linux.load(parsed, memory, "console=ttyS0", (initrd,), RSDP, RESET)
    assert memory.read(16 * MIB, 0x1000) == b"K" * 0x1000
    zero = memory.read(regs.rsi, 4096)
    field = lambda offset, form: struct.unpack_from("<" + form, zero, offset)[0]  # noqa: E731
    header = bytearray(make_bzimage()[0x1F1:0x268])
    for start, end in ((0x210, 0x211), (0x214, 0x220), (0x228, 0x22C)):  # the loader's to fill in
        header[start - 0x1F1 : end - 0x1F1] = zero[start:end]
    assert zero[0x1F1:0x268] == header
    assert field(0x210, "B") == 0xFF and field(0x070, "Q") == RSDP
    assert text_at(memory, field(0x228, "I")) == "console=ttyS0"
    assert (field(0x218, "I"), field(0x21C, "I")) == (32 * MIB - 8192, 5000)
    assert memory.read(field(0x218, "I"), 5000) == initrd.data
    count = field(0x1E8, "B")
    assert zero[0x2D0 : 0x2D0 + 20 * count] == memory_map.e820(memory)
    # __BOOT_CS and __BOOT_DS, and a descriptor table that has them.
    assert (sregs.cs.selector, sregs.ds.selector, sregs.ss.selector, sregs.cr0 >> 31) == (0x10, 0x18, 0x18, 1)
    descriptors = struct.unpack("<7Q", memory.read(sregs.gdt_base, 56))
    assert (descriptors[2], descriptors[3]) == (0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    assert descriptors[sregs.tr.selector // 8] >> 40 & 0xF == 0x9 and not regs.rflags & 1 << 9


@pytest.mark.parametrize(
    ("header", "address", "size", "line"),
    [
        ({"flags": 0}, 16 * MIB, 4 * MIB, 2047),  # no 64-bit entry
        ({"flags": 4, "relocatable": 0}, MIB, 19 * MIB, 2047),  # memory where it runs in the end counts as well
        ({"version": 0x20B}, 16 * MIB, 4 * MIB, 2047),
        ({"version": 0x209}, MIB, 3 * 0x1000, 2047),
        ({"version": 0x205}, MIB, 3 * 0x1000, 255),
        ({"version": 0x203}, MIB, 3 * 0x1000, 255),
        ({"version": 0x202}, MIB, 3 * 0x1000, 255),
    ],
    ids=str,
)
def test_a_kernel_without_a_64_bit_entry_is_entered_in_32_bit_mode(
    header: dict[str, int], address: int, size: int, line: int, memory: GuestMemory
) -> None:
    parsed = linux.parse(make_bzimage(**header, code32_start=MIB + 0x10), "bz")  # type: ignore[arg-type]
    assert (parsed.kind, parsed.entry, parsed.longest_line) == ("linux", address + 0x10, line)
    assert parsed.segments == (image.Segment(address, b"K" * 0x1000, size),)
    regs, sregs = linux.load(parsed, memory, "x" * line, (Module("i", "", b"I" * 4096),), RSDP, RESET)
    assert (regs.rip, regs.rbx, regs.rbp, regs.rdi) == (address + 0x10, 0, 0, 0)
    # Protected mode, no paging, no long mode; 32-bit code; the descriptors are where the selectors say.
    assert (sregs.cr0 & 0x80000001, sregs.cr4, sregs.efer, sregs.cs.attributes >> 13 & 3) == (1, 0, 0, 2)
    assert {s.selector for s in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss)} == {0x18}
    assert (sregs.cs.selector, sregs.gdt_limit) == (0x10, 31)
    assert struct.unpack("<4Q", memory.read(sregs.gdt_base, 32))[2:] == (0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    zero = memory.read(regs.rsi, 4096)
    assert struct.unpack_from("<I", zero, 0x214)[0] == address + 0x10
    assert text_at(memory, struct.unpack_from("<I", zero, 0x228)[0]) == "x" * line
    assert struct.unpack_from("<II", zero, 0x218) == (32 * MIB - 4096, 4096)
    assert zero[0x2D0 : 0x2D0 + 20] == memory_map.e820(memory)[:20]
    assert "takes at most" in problem(lambda: linux.load(parsed, memory, "x" * (line + 1), (), RSDP, RESET))


@pytest.mark.parametrize("size", [0x1000 - 15, 0x1000 - 8, 0x1000])
def test_the_last_paragraph_of_a_kernel_need_not_be_whole(size: int) -> None:
    """syssize counts 16 bytes; Debian's memory tester ends in the middle of some."""
    (piece,) = linux.parse(make_bzimage(kernel=b"K" * size, syssize=0x100), "bz").segments
    assert len(piece.data) == size
    line = problem(lambda: linux.parse(make_bzimage(kernel=b"K" * (0x1000 - 16), syssize=0x100), "bz"))
    assert "cut off (4080 of 4096 bytes of the kernel)" in line
    # Two of its bytes were there before version 2.04, and meant nothing for a kernel at 1 MiB.
    assert linux.parse(make_bzimage(version=0x203, syssize=0xFFFFFFFF), "bz").segments


def test_no_initrd_is_no_initrd(memory: GuestMemory) -> None:
    regs, _ = linux.load(linux.parse(make_bzimage(), "bz"), memory, "", (), RSDP, RESET)
    assert memory.read(regs.rsi + 0x218, 8) == bytes(8)


def test_an_initrd_stays_below_what_the_header_allows(memory: GuestMemory) -> None:
    parsed = linux.parse(make_bzimage(initrd_max=24 * MIB - 1), "bz")
    regs, _ = linux.load(parsed, memory, "", (Module("i", "", b"I" * 4096),), RSDP, RESET)
    assert struct.unpack("<I", memory.read(regs.rsi + 0x218, 4))[0] == 24 * MIB - 4096


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x7fELF" + bytes(600), "is an ELF file: an uncompressed kernel, which PVH boots"),
        (make_bzimage(magic=b"SrdH"), "no HdrS at 0x202, but 53 72 64 48"),
        (b"short", "the file ends before"),
        (make_bzimage()[:0x230], "cut off in its set-up header (560 bytes)"),
        (make_bzimage(version=0x201), "speaks boot protocol 2.01, too old: 2.02"),
        (make_bzimage(boot_flag=0), "its boot flag is 0x0000, not 0xaa55"),
        (make_bzimage(flags=0, code32_start=0), "has a 16-bit entry only, which needs a BIOS"),
        (make_bzimage(version=0x207, code32_start=0), "has a 16-bit entry only, which needs a BIOS"),
        (make_bzimage(flags=0, code32_start=2 * MIB), "is entered 0x100000 bytes behind its beginning"),
        (make_bzimage(version=0x203, loadflags=0), "is a zImage, which its 16-bit code puts into its place"),
        (make_bzimage(setup_sects=20)[:0x1000], "cut off in its set-up (4096 of 10752 bytes)"),
        (make_bzimage()[:-16], "cut off (4080 of 4096 bytes of the kernel)"),
        (make_bzimage(init_size=100), "4096 bytes that need 0x64 at 0x1000000"),
        (make_bzimage(address=0x10000), "at 0x10000"),
        (make_bzimage(kernel=b"tiny"), "is entered 0x200 bytes behind its beginning"),
    ],
)
def test_each_fault_of_a_bzimage_has_its_line(data: bytes, words: str) -> None:
    assert words in problem(lambda: linux.parse(data, "bz"))


def test_what_does_not_fit_with_linux(memory: GuestMemory) -> None:
    def load(line: str = "", initrd: bytes = b"", **header: Any) -> str:
        modules = (Module("rd", "", initrd),) if initrd else ()
        return problem(lambda: linux.load(linux.parse(make_bzimage(**header), "bz"), memory, line, modules, 0, RESET))

    assert "bz: needs memory up to 0x2100000, the guest has 0x2000000 bytes" in load(init_size=17 * MIB)
    assert "command line: is 2048 bytes long, bz takes at most 2047" in load("x" * 2048)
    fits_not = load(initrd=bytes(13 * MIB))
    assert fits_not.startswith("rd: its 13631488 bytes do not fit between the end of bz at 0x1400000 and 0x2000000")
    assert "rd: its 1 bytes do not fit" in load(initrd=b"1", initrd_max=18 * MIB)


# ------------------------------------------------------------------------------------------------ PVH

PHYS32 = note(18, struct.pack("<I", 0x100004), owner=b"Xen\0")


def make_pvh(maker: Callable[..., bytes] = make_elf, notes: bytes = PHYS32) -> bytes:
    return maker(segments=((1, 0x100000, b"kernel", 0x1000), (4, 0, notes, len(notes))))


@pytest.mark.parametrize("maker", [make_elf, make_elf32])
def test_a_pvh_kernel_finds_its_start_info(maker: Callable[..., bytes], memory: GuestMemory) -> None:
    data = make_pvh(maker)
    parsed = pvh.parse(elf.read(data, "k"), data, "k")
    assert (parsed.kind, parsed.entry) == ("pvh", 0x100004)
    modules = (Module("first", "", b"1" * 10), Module("second", "some words", b"2" * 5000))
    regs, sregs = pvh.load(parsed, memory, "a line", modules, RSDP, RESET)
    assert (regs.rip, sregs.cr0 & 0x80000001, sregs.efer, sregs.cs.attributes >> 13 & 3) == (0x100004, 1, 0, 2)
    info = memory.read(regs.rbx, 56)
    magic, version, _, count, module_list, line, rsdp, areas, area_count, _ = struct.unpack("<IIII4QII", info)
    assert (magic, version, count, rsdp) == (0x336EC578, 1, 2, RSDP)
    assert text_at(memory, line) == "a line"
    expected = [(*area, 0) for area in memory_map.areas(memory)]
    assert [struct.unpack("<QQII", memory.read(areas + 24 * i, 24)) for i in range(area_count)] == expected
    first, second = (struct.unpack("<4Q", memory.read(module_list + 32 * i, 32)) for i in range(2))
    assert first == (32 * MIB - 4096, 10, 0, 0)
    assert second[:2] == (32 * MIB - 3 * 4096, 5000) and text_at(memory, second[2]) == "some words"
    assert memory.read(second[0], 5000) == b"2" * 5000


LINUX = note(0x100, b"\0", owner=b"Linux\0")
XEN_LINUX = note(6, b"linux\0", owner=b"Xen\0")


@pytest.mark.parametrize(("notes", "most"), [(b"", 4095), (LINUX, 2047), (XEN_LINUX, 2047)])
def test_how_long_a_command_line_a_pvh_kernel_takes(notes: bytes, most: int, memory: GuestMemory) -> None:
    """Linux would die of 2,048 bytes before it has a console."""
    data = make_pvh(notes=PHYS32 + notes)
    parsed = pvh.parse(elf.read(data, "k"), data, "k")
    regs, _ = pvh.load(parsed, memory, "x" * most, (), RSDP, RESET)
    (line,) = struct.unpack("<Q", memory.read(regs.rbx + 24, 8))
    assert memory.read(line, most + 1) == b"x" * most + b"\0"
    told = problem(lambda: pvh.load(parsed, memory, "x" * (most + 1), (), RSDP, RESET))
    assert told.startswith(f"command line: is {most + 1} bytes long, ") and f"at most {most}" in told


def test_faults_of_a_pvh_kernel(memory: GuestMemory) -> None:
    def parse(data: bytes) -> Image:
        return pvh.parse(elf.read(data, "k"), data, "k")

    assert "has no note that says where PVH enters it" in problem(lambda: parse(make_elf()))
    far = note(18, struct.pack("<I", 0x900000), owner=b"Xen\0")
    assert "its entry point 0x900000 lies in none of its segments" in problem(lambda: parse(make_pvh(notes=far)))
    parsed = parse(make_pvh())
    large = (Module("rd", "", bytes(32 * MIB)),)
    assert "rd: its 33554432 bytes do not fit" in problem(lambda: pvh.load(parsed, memory, "", large, 0, RESET))


# ------------------------------------------------------------------------------------------------ multiboot


def header(flags: int = 3, checksum: int | None = None) -> bytes:
    return struct.pack("<III", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF if checksum is None else checksum)


def make_multiboot(maker: Callable[..., bytes] = make_elf32, flags: int = 3) -> bytes:
    return maker(segments=((1, 0x100000, header(flags) + b"code", 0x1000),))


def make_kludge(
    before: bytes = b"", start: int = MIB, load_end: int = 0, bss_end: int = 0, entry: int = MIB + 32, shift: int = 0
) -> bytes:
    """A file with addresses in its header; what stands before the header is loaded too."""
    addresses = struct.pack("<5I", start + len(before) + shift, start, load_end, bss_end, entry)
    return before + header(1 << 16) + addresses + b"code" * 4


@pytest.mark.parametrize("maker", [make_elf, make_elf32])
def test_a_multiboot_kernel_finds_its_information(maker: Callable[..., bytes], memory: GuestMemory) -> None:
    data = make_multiboot(maker)
    parsed = multiboot.parse(data, "/boot/kernel", elf.read(data, "k"))
    assert (parsed.kind, parsed.entry) == ("multiboot", 0x100000)
    modules = (Module("one", "", b"1" * 10), Module("two", "some words", b"2" * 5000))
    regs, sregs = multiboot.load(parsed, memory, "a line", modules, RSDP, RESET)
    assert (regs.rax, regs.rip, sregs.cr0 & 0x80000001, sregs.cr4) == (0x2BADB002, 0x100000, 1, 0)
    info = struct.unpack("<17I", memory.read(regs.rbx, 68))
    assert info[0] == 0b1001001101 and info[1:3] == (639, 31 * 1024)
    assert text_at(memory, info[4]) == "kernel a line" and text_at(memory, info[16]) == "pyhv"
    entries = [struct.unpack("<4I", memory.read(info[6] + 16 * i, 16)) for i in range(info[5])]
    assert [(start, end) for start, end, _, _ in entries] == [(0x101000, 0x10100A), (0x102000, 0x103388)]
    assert [text_at(memory, words) for _, _, words, _ in entries] == ["one", "two some words"]
    assert memory.read(0x102000, 5000) == b"2" * 5000
    table = memory.read(info[12], info[11])
    areas = [struct.unpack_from("<IQQI", table, at) for at in range(0, len(table), 24)]
    assert areas == [(20, *area) for area in memory_map.areas(memory)]


def test_addresses_in_the_header(memory: GuestMemory) -> None:
    whole = make_kludge(bss_end=MIB + 0x3000)
    parsed = multiboot.parse(whole, "k")
    assert (parsed.entry, parsed.segments) == (MIB + 32, (image.Segment(MIB, whole, 0x3000),))
    part = make_kludge(before=b"skip", load_end=MIB + 40)
    assert multiboot.parse(part, "k").segments == (image.Segment(MIB, part[:40], 40),)
    # They go before those of an ELF file.
    data = bytearray(make_elf32(segments=((1, 0x300000, make_kludge(entry=MIB + 32) + bytes(64), 0x1000),)))
    at = data.find(header(1 << 16)[:4])
    struct.pack_into("<I", data, at + 12, MIB + at)
    assert multiboot.parse(bytes(data), "k", elf.read(bytes(data), "k")).segments[0].gpa == MIB


def test_a_kernel_below_1_mib_is_left_alone(memory: GuestMemory) -> None:
    data = make_kludge(start=0x7000, bss_end=0x9000, entry=0x7020)
    regs, _ = multiboot.load(multiboot.parse(data, "k"), memory, "a line", (Module("m", "", b"1"),), RSDP, RESET)
    assert memory.read(0x7000, 0x2000) == data + bytes(0x2000 - len(data)) and regs.rbx >= 0x9000
    assert struct.unpack("<I", memory.read(struct.unpack("<I", memory.read(regs.rbx + 24, 4))[0], 4)) == (MIB,)


def test_a_virtual_entry_point_is_translated() -> None:
    data = bytearray(make_multiboot())
    struct.pack_into("<I", data, 52 + 8, 0xC0100000)  # the segment's virtual address
    struct.pack_into("<I", data, 24, 0xC0100010)
    assert multiboot.parse(bytes(data), "k", elf.read(bytes(data), "k")).entry == 0x100010


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0" * 8192 + make_kludge(), "has no multiboot header in its first 8192 bytes"),
        (b"\0" + make_kludge(), "has no multiboot header"),
        (header(3, checksum=0) + bytes(64), "has no multiboot header"),
        (header(), "neither an ELF file nor tells its addresses"),
        (header(4) + bytes(32), "demands a video mode, and the guest has no screen"),
        (header(0x10) + bytes(32), "demands what pyhv does not know (flags 0x10)"),
        (header(1 << 16) + bytes(19), "is cut off in its multiboot header"),
        (make_kludge(shift=64), "it lies before the file"),
        (make_kludge(shift=-8), "it lies before the file"),
        (make_kludge(start=0x800, entry=0x820), "is to be loaded at 0x800 to 0x830, where a PC has no RAM for it"),
        (make_kludge(start=0x8000, bss_end=0xA0000), "is to be loaded at 0x8000 to 0xa0000, where a PC has no RAM"),
        (make_kludge(start=0xE0000), "is to be loaded at 0xe0000"),
        (make_kludge(load_end=MIB + 4096), "ask for more than the file has"),
        (make_kludge(load_end=MIB - 16), "ask for more than the file has"),
        (make_kludge(bss_end=MIB + 8), "the bss ends before the data"),
        (make_kludge(entry=0x900000), "its entry point 0x900000 lies in none"),
    ],
)
def test_each_fault_of_a_multiboot_kernel_has_its_line(data: bytes, words: str) -> None:
    assert words in problem(lambda: multiboot.parse(data, "k"))


def test_what_does_not_fit_with_multiboot(memory: GuestMemory) -> None:
    parsed = multiboot.parse(make_kludge(), "k")
    large = (Module("m", "", bytes(31 * MIB)),)
    assert "m: its 32505856 bytes do not fit between 0x101000" in problem(
        lambda: multiboot.load(parsed, memory, "", large, 0, RESET)
    )
    wordy = (Module("m", "x" * 4094, b"m"),)
    assert "string of module m: is 4096 bytes" in problem(lambda: multiboot.load(parsed, memory, "", wordy, 0, RESET))
    line = "x" * 4094
    assert "command line: is 4096 bytes long" in problem(lambda: multiboot.load(parsed, memory, line, (), 0, RESET))


# ------------------------------------------------------------------------------------------------ recognition


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (make_bzimage(), "linux"),
        (make_pvh(), "pvh"),
        (make_pvh(make_elf32), "pvh"),
        (make_multiboot(), "multiboot"),
        (make_multiboot(make_elf), "multiboot"),
        (make_kludge(), "multiboot"),
        (make_elf(), "elf64"),
        # Notes of pyhv's own say more than anything else.
        (make_pvh(notes=PHYS32 + note(2, b"\0")), "elf64"),
    ],
)
def test_kinds_are_recognised(data: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    assert recognise.read(str(path), 64 * MIB).kind == kind
    assert recognise.read(str(path), 64 * MIB, kind).kind == kind


def test_a_kind_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "image"

    def read(data: bytes, kind: str) -> Image:
        path.write_bytes(data)
        return recognise.read(str(path), 64 * MIB, kind)

    assert read(make_bzimage(), "flat").kind == "flat"
    assert read(make_pvh(notes=PHYS32 + note(2, b"\0")), "pvh").kind == "pvh"
    assert read(make_pvh(), "elf64").kind == "elf64"
    assert "is not an ELF file, and so not a PVH kernel" in problem(lambda: read(b"\xf4", "pvh"))
    assert "is not an ELF file, and so not an ELF64 image" in problem(lambda: read(make_kludge(), "elf64"))
    assert "has no multiboot header" in problem(lambda: read(b"\xf4", "multiboot"))
    assert "has no multiboot header" in problem(lambda: read(make_elf(), "multiboot"))
    assert "no HdrS" in problem(lambda: read(b"\xf4", "linux"))
    assert "boot protocol efi: is unknown; choose one of elf64," in problem(lambda: read(make_elf(), "efi"))


def test_who_takes_which_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"data")
    file = str(path)

    def of(kind: str) -> Image:
        return Image("x", kind, 0, (), (), None)

    assert image.read_modules(of("linux"), file, (), MIB) == (Module(file, "", b"data"),)
    assert image.read_modules(of("pvh"), file, (f"{file} a  b ",), MIB)[1] == Module(file, "a  b", b"data")
    assert image.read_modules(of("multiboot"), None, (file,), MIB) == (Module(file, "", b"data"),)
    assert image.read_modules(of("elf64"), None, (), MIB) == ()
    for kind, initrd, modules, words in (
        ("elf64", file, (), "initrd: cannot be given: x is an ELF64 image"),
        ("flat", None, (file,), "modules: cannot be given: x is a flat binary"),
        ("multiboot", file, (), "give it as a module"),
        ("linux", None, (file,), "give it as the initrd"),
        ("linux", str(tmp_path), (), "is a directory"),
        ("linux", str(tmp_path / "none"), (), "No such file"),
        ("multiboot", None, (file,) * 65, "modules: 65 were given; the most is 64"),
    ):
        assert words in problem(lambda k=kind, i=initrd, m=modules: image.read_modules(of(k), i, m, MIB))  # type: ignore[misc]


def test_an_elf_file_may_be_larger_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(make_elf() + bytes(2 * MIB))  # debug information
    assert recognise.read(str(path), MIB).kind == "elf64"


# ------------------------------------------------------------------------------------------------ ISA level


def properties(*entries: tuple[int, bytes]) -> bytes:
    content = b"".join(struct.pack("<II", kind, len(v)) + v + bytes(-len(v) % 8) for kind, v in entries)
    return note(5, content, owner=b"GNU\0")


@pytest.mark.parametrize(
    ("notes", "level"),
    [
        (b"", 1),
        (properties((0xC0008002, b"\1\0\0\0")), 1),
        (properties((0xC0000002, b"\3\0\0\0"), (0xC0008002, b"\3\0\0\0")), 2),
        (properties((0xC0008002, b"\x0f\0\0\0")), 4),
        (properties((0xC0008002, b"\xff\xff\xff\xff")), 4),
        (properties((0xC0008002, b"\x07")), 1),
        (properties((0xC0008002, b"\7\0\0\0"))[:-1], 1),
        (note(5, b"\2\x80\0\xc0\4\0\0", owner=b"GNU\0"), 1),
    ],
)
@pytest.mark.parametrize("kind", [4, 0x6474E553])
def test_the_isa_level_is_read(notes: bytes, level: int, kind: int) -> None:
    data = make_elf(segments=((1, 0x100000, b"code", 0x1000), (kind, 0, notes, len(notes))))
    assert elf.parse(data, "image").isa_level == level


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc and binutils")
@pytest.mark.parametrize("level", [2, 3, 4])
def test_the_linker_writes_the_level_that_is_read(level: int, tmp_path: Path) -> None:
    source, made = tmp_path / "a.c", tmp_path / "a"
    source.write_text("void _start(void) { for (;;); }\n")
    command = ["gcc", "-nostdlib", "-static", "-no-pie", f"-Wl,-z,x86-64-v{level}", "-o", str(made), str(source)]
    subprocess.run(command, check=True, timeout=60)
    assert elf.parse(made.read_bytes(), "a").isa_level == level


def test_a_level_that_the_guest_lacks_is_refused() -> None:
    def check(level: int, without: str = "") -> None:
        visible = frozenset(n for names in (isa.LEVELS[2], isa.LEVELS[3]) for n in names) | {"pni", "abm"}
        guest: Any = SimpleNamespace(visible=visible - {without}, profile="mine")
        isa.check(Image("x", "elf64", 0, (), (), None, level), guest)

    for level in (1, 2, 3):
        check(level)
    check(2, without="avx2")
    line = problem(lambda: check(3, without="sse4_2"))
    assert "x: needs x86-64-v3, which profile mine cannot give on this host: without sse4_2;" in line
    assert "without avx512f, avx512bw, avx512cd, avx512dq, avx512vl" in problem(lambda: check(4))


# ------------------------------------------------------------------------------------------------ damage

GOOD = {
    "linux": make_bzimage(address=MIB, init_size=0x2000),
    "linux32": make_bzimage(version=0x205),
    "pvh": make_pvh(),
    "pvh32": make_pvh(make_elf32),
    "multiboot": make_multiboot(),
    "kludge": make_kludge(),
    "isa": make_elf(segments=((1, 0x100000, b"x", 9), (4, 0, properties((0xC0008002, b"\3\0\0\0")), 0))),
}
# The bytes that mean something to a loader.
MEANT = {
    "linux": [*range(0x1F1, 0x270)],
    "linux32": [*range(0x1F1, 0x270)],
    "pvh": [*range(len(GOOD["pvh"]))],
    "pvh32": [*range(len(GOOD["pvh32"]))],
    "multiboot": [*range(len(GOOD["multiboot"]))],
    "kludge": [*range(len(GOOD["kludge"]))],
    "isa": [*range(len(GOOD["isa"]))],
}


@pytest.mark.parametrize("which", GOOD)
@given(changes=CHANGES, cut=st.none() | st.integers(0, 6000), seed=st.integers(0, 1 << 32))
def test_a_damaged_kernel_is_refused_or_loaded(
    which: str, changes: list[tuple[int, int]], cut: int | None, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Recognised or of the kind that it was: refused by BadInput, or loaded, inside guest memory."""
    data = bytearray(GOOD[which])
    for place, value in changes:
        data[MEANT[which][place % len(MEANT[which])]] = value
    kind = random.Random(seed).choice(["", *image.KINDS])
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes((data[:cut] if cut is not None else data) or b"\0")
    memory = GuestMemory(4 * MIB)
    try:
        parsed = recognise.read(str(path), memory.size, kind)
        for segment in parsed.segments:
            assert len(segment.data) <= segment.size
            assert segment.gpa >= (0x1000 if parsed.kind == "multiboot" else MIB)
        assert 1 <= parsed.isa_level <= 4
        if parsed.kind not in ("elf64", "flat"):
            modules = (Module("m", "", b"m" * 5000),)
            regs, _ = recognise.loader(parsed.kind)(parsed, memory, "line", modules, RSDP, RESET)
            assert any(s.gpa <= regs.rip < s.gpa + s.size for s in parsed.segments)
    except BadInput as error:
        assert "\n" not in str(error)
    finally:
        memory.close()

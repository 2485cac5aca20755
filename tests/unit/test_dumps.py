"""Reading CPUID dumps: each format as the tools write it, garbage refused with file and line, nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.cli import check
from pyhv.cpu import dumps
from pyhv.cpu.host import HostDescription, as_kvm_host
from pyhv.cpu.table import CpuidTable, Registers
from pyhv.errors import BadInput

from . import cpus

INTEL = Registers(4, *cpus.INTEL)

CPUID_R = """\
CPU 0:
   0x00000000 0x00: eax=0x00000004 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69
   0x00000001 0x00: eax=0x000306c3 ebx=0x00100800 ecx=0x7ffafbff edx=0xbfebfbff
   0x00000004 0x00: eax=0x1c004121 ebx=0x01c0003f ecx=0x0000003f edx=0x00000000
   0x00000004 0x01: eax=0x1c004122 ebx=0x01c0003f ecx=0x0000003f edx=0x00000000
   0x20000000 0x00: eax=0x00000001 ebx=0x00000002 ecx=0x00000003 edx=0x00000004
   0x40000000 0x00: eax=0x40000001 ebx=0x4b4d564b ecx=0x564b4d56 edx=0x0000004d
   0x40000001 0x00: eax=0x01007efb ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x40000100 0x00: eax=0x00000000 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x80000000 0x00: eax=0x80000001 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x80000001 0x00: eax=0x00000000 ebx=0x00000000 ecx=0x00000021 edx=0x2c100800
   0x80860000 0x00: eax=0x00000001 ebx=0x00000002 ecx=0x00000003 edx=0x00000004
   0xc0000000 0x00: eax=0x00000001 ebx=0x00000002 ecx=0x00000003 edx=0x00000004
CPU 1:
   0x00000000 0x00: eax=0x00000004 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69
   0x00000001 0x00: eax=0x000306c3 ebx=0x01100800 ecx=0x7ffafbff edx=0xbfebfbff
"""

KCPUID_R = """\
Basic Leafs :
================
0x00000000: EAX=0x00000004, EBX=0x756e6547, ECX=0x6c65746e, EDX=0x49656e69
0x00000001: EAX=0x000306c3, EBX=0x00100800, ECX=0x7ffafbff, EDX=0xbfebfbff
0x00000004: subleafs:
  0: EAX=0x1c004121, EBX=0x01c0003f, ECX=0x0000003f, EDX=0x00000000
 12: EAX=0x1c004122, EBX=0x01c0003f, ECX=0x0000003f, EDX=0x00000000
Extended Leafs :
================
0x80000000: EAX=0x80000001, EBX=0x00000000, ECX=0x00000000, EDX=0x00000000
0x80000001: EAX=0x00000000, EBX=0x00000000, ECX=0x00000021, EDX=0x2c100800
"""

RAW = """\
CPUID 00000000: 00000004-756E6547-6C65746E-49656E69
CPUID 00000001: 000306C3-00100800-7FFAFBFF-BFEBFBFF
CPUID 00000004: 1C004121-01C0003F-0000003F-00000000
CPUID 00000004: 1C004122-01C0003F-0000003F-00000000
CPUID 00000005: 1C004121-01C0003F-0000003F-00000000
CPUID 80000000: 80000001-00000000-00000000-00000000
CPUID 80000001: 00000000-00000000-00000021-2C100800
CPUID 80000002: 00000001-00000000-00000000-00000000
"""


def test_cpuid_r() -> None:
    dump = dumps.read(CPUID_R, "a")
    assert dump.format == "cpuid -r"
    assert dump.table.get(0) == INTEL
    assert dump.table.get(1).ebx == 0x00100800  # CPU 0's, not CPU 1's
    assert dump.table.get(4, 1) == (0x1C004122, 0x01C0003F, 0x3F, 0)
    assert dump.table.get(0x40000001).eax == 0x01007EFB
    assert dump.table.indexed == {4}
    # The tool asks for the first leaf of every vendor's range, whether or not there is one.
    assert set(dump.out_of_range) == {(0x20000000, 0), (0x40000100, 0), (0x80860000, 0), (0xC0000000, 0)}


def test_cpuid_r_of_one_cpu() -> None:
    whole = dumps.parse(CPUID_R, "a")
    first = CPUID_R[: CPUID_R.index("CPU 1:")]
    assert dumps.parse(first.replace("CPU 0:", "CPU:"), "cpuid -1 -r") == whole
    assert dumps.parse(first.replace("CPU 0:\n", ""), "cut off") == whole
    assert dumps.parse(first.replace("\n", "\r\n"), "from a serial line") == whole
    assert dumps.parse("# CPL 0\n" + first + "# CPL 3\n", "from the guest") == whole


def test_cpuid_r_takes_cpu_0_wherever_it_stands() -> None:
    split = CPUID_R.index("CPU 1:")
    assert dumps.parse(CPUID_R[split:] + CPUID_R[:split], "a") == dumps.parse(CPUID_R, "a")


def test_kcpuid_r() -> None:
    dump = dumps.read(KCPUID_R, "a")
    assert dump.format == "kcpuid -r"
    assert dump.table.get(0) == INTEL
    assert dump.table.get(4, 12) == (0x1C004122, 0x01C0003F, 0x3F, 0)
    assert dump.table.get(0x80000001) == (0, 0, 0x21, 0x2C100800)
    assert not dump.out_of_range


def test_raw() -> None:
    dump = dumps.read(RAW, "a")
    assert dump.format == "raw"
    assert dump.table.get(4, 1) == (0x1C004122, 0x01C0003F, 0x3F, 0)
    assert set(dump.out_of_range) == {(5, 0), (0x80000002, 0)}


def test_a_range_whose_first_leaf_names_no_leaf_of_it_does_not_exist() -> None:
    text = RAW.replace("80000000: 80000001", "80000000: FFFFFFFF")
    text += "CPUID 40000000: 7FFFFFFF-00000001-00000000-00000000\n"
    dump = dumps.read(text, "a")
    assert set(dump.out_of_range) == {(5, 0), (0x40000000, 0), (0x80000000, 0), (0x80000001, 0), (0x80000002, 0)}


AIDA64 = """\
------[ Versions ]------

Program Version : AIDA64 Engineer v7.60.7311 Beta
LLKD Version    : 1014

------[ CPU Info ]------

CPU Type          : Intel\xae processor of no make
CPUID Revision    : 000306C3h

------[ CPUID Registers / Logical CPU #0 ]------

allcpu: Package 0 / Core 0 / Thread 0: Valid, P-core

CPUID 00000000: 00000004-756E6547-6C65746E-49656E69 [GenuineIntel]
CPUID 00000001: 000306C3-00100800-7FFAFBFF-BFEBFBFF
CPUID 00000004: 1C004121-01C0003F-0000003F-00000000 [SL 00] [L1D: 32 KB]
CPUID 00000004: 1C004122-01C0003F-0000003F-00000000 [SL 0C] [L2: 1 MB] / L3: 8 MB]
CPUID 80000000: 80000001-00000000-00000000-00000000
CPUID 80000001: 00000000-00000000-00000021-2C100800

------[ MSR Registers / Logical CPU #0 ]------

MSR 0000001B: 0000-0000-FEE0-0900 [eD = 0]
MSR 00000300: < FAILED >

------[ CPUID Registers / Logical CPU #1 ]------

CPUID 00000000: 00000004-756E6547-6C65746E-49656E69 [GenuineIntel]
CPUID 00000001: 000306C3-01100800-7FFAFBFF-BFEBFBFF
"""


def test_aida64() -> None:
    """By the example of files of InstLatx64: sections, notes in brackets, subleaves in hexadecimal."""
    dump = dumps.read(AIDA64, "a")
    assert dump.format == "AIDA64"
    assert dict(dump.table.entries) == dict(dumps.parse(KCPUID_R, "b").entries)
    assert not dump.out_of_range
    # The first CPU, wherever it stands; CRLF.
    split = AIDA64.index("------[ CPUID Registers / Logical CPU #1")
    assert dumps.read(AIDA64[split:] + AIDA64[:split], "a") == dump
    assert dumps.read(AIDA64.replace("\n", "\r\n"), "a") == dump


@pytest.mark.parametrize(
    "heading",
    [
        "------[ Logical CPU #0 ]------",
        "CPUID Registers (CPU #1):",
        "CPUID Registers (CPU #2 Virtual):",
        "CPU#000 AffMask: 0x0000000000000001 ",
        "CPU#000 AffMask: 0X0000000000000001:0 ",
        "Group: 0x00 Affinity mask: 0x0000000000000001",
    ],
)
def test_aida64s_headings(heading: str) -> None:
    text = heading + AIDA64[AIDA64.index("\nCPUID 00000000") : AIDA64.index("------[ MSR")]
    dump = dumps.read(text, "a")
    assert dump.format == "AIDA64" and dump.table == dumps.parse(AIDA64, "a")


@pytest.mark.parametrize("dash", ["-", " "])
@pytest.mark.parametrize("colon", [": ", " ", " :", " : ", "  \t"])
def test_older_lines_of_aida64(colon: str, dash: str) -> None:
    lines = [line.split(": ") for line in RAW.splitlines()]
    text = "".join(f"{leaf}{colon}{values.replace('-', dash)}  \n" for leaf, values in lines)
    assert dumps.parse(text, "a") == dumps.parse(RAW, "b")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for encoding in ("utf-8-sig", "utf-16", "utf-8", "latin-1"):
        path.write_bytes(AIDA64.encode(encoding))
        assert dumps.load(str(path)) == dumps.parse(AIDA64, "a"), encoding
    path.write_bytes(b"\xef\xbb\xbf" + CPUID_R.encode())
    assert dumps.load(str(path)) == dumps.parse(CPUID_R, "a")


def test_damage_in_aida64s_lines_is_refused() -> None:
    for old, new in (("-BFEBFBFF\nCPUID 00000004", "\nCPUID 00000004"), ("000306C3-00100800", "000306C3-0010080G")):
        with pytest.raises(BadInput, match="a:16: expected a line of CPUID LEAF"):
            dumps.parse(AIDA64.replace(old, new, 1), "a")
    twice = AIDA64.replace("1C004122-01C0003F-0000003F-00000000 [SL 0C]", "1C004122-01C0003F-0000003F-00000000 [SL 00]")
    with pytest.raises(BadInput, match="a:18: leaf 0x4 subleaf 0x0 is there twice"):
        dumps.parse(twice, "a")
    # A line that is there twice and says the same does no harm: some files have one.
    line = "CPUID 00000004: 1C004121-01C0003F-0000003F-00000000 [SL 00] [L1D: 32 KB]\n"
    assert dumps.parse(AIDA64.replace(line, line + line), "a") == dumps.parse(AIDA64, "a")


def test_where_leaf_0_comes_again_another_cpu_begins() -> None:
    other = RAW.replace("00100800", "01100800")
    assert dumps.parse(RAW + "\n" + other, "a") == dumps.parse(RAW, "a")
    with pytest.raises(BadInput, match="a:11: expected a line of CPUID LEAF"):
        dumps.parse(RAW + "\n" + other.replace("-7FFAFBFF", ""), "a")


def raw_xsave(*rows: str) -> str:
    return "CPUID 00000000: 0000000D-756E6547-6C65746E-49656E69\n" + "".join(f"CPUID 0000000D: {r}\n" for r in rows)


@pytest.mark.parametrize(
    ("rows", "subleaves"),
    [
        # In order, as the format promises: what does not exist is there and zero.
        (
            ("00000207-00000340-00000988-00000000", "0000000F-00000340-00001800-00000000")
            + ("00000100-00000240-00000000-00000000", "00000000-00000000-00000000-00000000"),
            {0, 1, 2, 3},
        ),
        # Existing components only: AVX, PKRU, shadow stacks.
        (
            ("00000207-00000340-00000988-00000000", "0000000F-00000340-00001800-00000000")
            + ("00000100-00000240-00000000-00000000", "00000008-00000980-00000000-00000000")
            + ("00000010-00000000-00000001-00000000", "00000018-00000000-00000001-00000000"),
            {0, 1, 2, 9, 11, 12},
        ),
        # The last of them cut off.
        (
            ("00000207-00000340-00000988-00000000", "0000000F-00000340-00001800-00000000")
            + ("00000100-00000240-00000000-00000000", "00000008-00000980-00000000-00000000"),
            {0, 1, 2, 9},
        ),
        # Without subleaf 1 too.
        (("00000007-00000340-00000340-00000000", "00000100-00000240-00000000-00000000"), {0, 2}),
        # AMD's LWP is announced in EDX.
        (
            ("00000007-00000340-000003C0-40000000", "00000000-00000000-00000000-00000000")
            + ("00000100-00000240-00000000-00000000", "00000080-00000340-00000000-00000000"),
            {0, 1, 2, 62},
        ),
        (("00000003-00000240-00000240-00000000",), {0}),
    ],
)
def test_raw_says_which_subleaves_of_leaf_0xd_it_holds_by_their_contents(
    rows: tuple[str, ...], subleaves: set[int]
) -> None:
    table = dumps.parse(raw_xsave(*rows), "a")
    assert {subleaf for leaf, subleaf in table.entries if leaf == 0xD} == subleaves


def test_raw_with_an_impossible_leaf_0xd() -> None:
    with pytest.raises(BadInput, match="a:4: leaf 0xd: its 3 lines fit no set of XSAVE components"):
        dumps.parse(
            raw_xsave(
                "00000007-00000340-00000340-00000000",
                "00000001-00000000-00000000-00000000",
                "00000100-00000001-00000000-00000000",
            ),
            "a",
        )


def xsave_dump(text: str) -> dumps.Dump:
    return dumps.read(f"CPUID 00000001: 00000000-00000000-{0x14000000:08X}-00000000\n" + text, "a")


def test_a_leaf_0xd_that_is_cut_off_is_no_processor_without_avx() -> None:
    """What a guest's XSAVE area rests on is told, or it is known that it is not."""
    rows = ("00000207-00000340-00000988-00000000", "0000000F-00000350-00001800-00000000")
    rows += ("00000100-00000240-00000000-00000000", "00000008-00000980-00000000-00000000")
    whole, cut, none = (xsave_dump(raw_xsave(*rows[:n])) for n in (4, 2, 0))
    guest = whole.table
    assert dumps.untold(whole, guest) == []
    assert dumps.untold(cut, guest) == [2, 9]
    assert dumps.untold(none, guest) == [0, 1, 2, 9]
    # A guest that has nothing there depends on nothing there, and a component that is not announced is none.
    bare = guest.replace({(1, 0): Registers(0, 0, 0, 0)})
    assert dumps.untold(none, bare) == []
    small = guest.replace({key: None for key in guest.entries if key[0] == 0xD and key[1] > 2})
    small = small.replace({(0xD, 0): small.get(0xD)._replace(eax=7)})
    assert dumps.untold(cut, small) == [2] and dumps.untold(whole, small) == []
    more = guest.replace({(0xD, 5): Registers(64, 1088, 0, 0), (0xD, 0): guest.get(0xD)._replace(eax=0x227)})
    assert dumps.untold(whole, more) == []  # the host does not have it: a reason, and no gap
    with pytest.raises(BadInput) as caught:
        check.check_told(cut, guest, "a.txt")
    assert str(caught.value) == (
        "a.txt: leaf 0xd is cut off: it lacks subleaf 2, 9, on which the guest depends; make the dump again by a "
        "program that prints all subleaves, such as cpuid -r"
    )
    check.check_told(whole, guest, "a.txt")
    # pyhv's own tables hold no zeros, and kcpuid prints none.
    assert dumps.untold(dumps.read(json.dumps(cut.table.to_json()), "a"), guest) == []


def test_json(tmp_path: Path) -> None:
    table = dumps.parse(CPUID_R, "a")
    assert dumps.read(json.dumps(table.to_json()), "a") == (table, {}, "json")
    host = HostDescription(table, kernel="6.1")
    path = tmp_path / "host.json"
    path.write_text(json.dumps(host.to_json(), indent=1))
    assert dumps.load(str(path)) == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a: no CPUID dump: empty"),
        ("\n  \n# nothing\n", "a: no CPUID dump: empty"),
        ("\nhello\n", "a:2: no CPUID dump begins like this: 'hello'"),
        ("x" * 100, "a:1: no CPUID dump begins like this: '" + "x" * 57 + r"\.\.\.'"),
        ("CPU 0:\n", "a: no CPUID dump: leaf 0 is missing"),
        ("CPU 0:\nCPU 0:\n", "a:2: CPU 0 is there twice"),
        (CPUID_R.replace("0x00000001 0x00", "0x00000000 0x00", 1), "a:3: leaf 0x0 subleaf 0x0 is there twice"),
        (CPUID_R.replace("ecx=0x7ffafbff ", "", 1), "a:3: expected a line of `cpuid -r`, found"),
        (CPUID_R.replace("0x7ffafbff", "0x7ffafbfg", 1), "a:3: expected a line of `cpuid -r`"),
        (CPUID_R.replace("0x7ffafbff", "0x17ffafbff", 1), "a:3: expected a line of `cpuid -r`"),
        (CPUID_R + "panic: on CPU 1\n", "a:17: expected a line of `cpuid -r`, found 'panic: on CPU 1'"),
        (CPUID_R + "\x1b[2J\n", r"a:17: expected a line of `cpuid -r`, found '\\x1b\[2J'"),
        (CPUID_R.replace("0x00000000 0x00", "0x00000002 0x00", 1), "a: no CPUID dump: leaf 0 is missing"),
        (KCPUID_R.replace("0x00000004: subleafs:\n", ""), "a:5: expected a line of `kcpuid -r`"),
        (KCPUID_R.replace(" 12:", "  0:"), "a:7: leaf 0x4 subleaf 0x0 is there twice"),
        (KCPUID_R.replace(" 12:", "4294967296:"), "a:7: subleaf 4294967296 does not fit 32 bits"),
        (KCPUID_R.replace(", ECX", " ECX", 1), "a:3: expected a line of `kcpuid -r`"),
        (KCPUID_R.replace("Extended Leafs :", "Extended Leaves:"), "a:8: expected a line of `kcpuid -r`"),
        (RAW.replace("-BFEBFBFF", ""), "a:2: expected a line of CPUID LEAF: EAX-EBX-ECX-EDX"),
        (RAW.replace("-BFEBFBFF", "-BFEBFBFFF"), "a:2: expected a line of CPUID LEAF"),
        (RAW.replace("CPUID 00000001", "  CPUID 00000001"), "a:2: expected a line of CPUID LEAF"),
        (RAW.replace("CPUID 00000000", "CPUID 00000002"), "a: no CPUID dump: leaf 0 is missing"),
        ('{"format": "pyhv-cpuid/1",\n', "a:2: not JSON"),
        ('{"format": ' + "9" * 5000 + "}", "a: not JSON that pyhv wrote"),
        ("{" + '"a":{' * 100000, "a: not JSON that pyhv wrote"),
        ("{}", "a: no CPUID table"),
        ('{"format": "pyhv-host/1"}', 'a: the field "processor" is missing'),
        ('{"format": "pyhv-host/2"}', "a: no host description"),
    ],
)
def test_garbage_is_refused_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(BadInput, match="^" + message) as caught:
        dumps.parse(text, "a")
    assert "\n" not in str(caught.value)


def test_load_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="missing: No such file or directory"):
        dumps.load(str(tmp_path / "missing"))
    with pytest.raises(BadInput, match="Is a directory"):
        dumps.load(str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\x7fELF\xff\x00")
    with pytest.raises(BadInput, match="binary: no CPUID dump: not plain text"):
        dumps.load(str(tmp_path / "binary"))
    (tmp_path / "huge").write_bytes(b" " * (dumps.MAX_BYTES + 1))
    with pytest.raises(BadInput, match="huge: no CPUID dump: larger than 4 MiB"):
        dumps.load(str(tmp_path / "huge"))


def test_a_host_may_come_out_of_a_pipe_that_is_slow() -> None:
    """pyhv check FILE --on <(ssh HOST pyhv host --json)"""
    reader, writer = os.pipe()

    def write() -> None:
        time.sleep(0.05)
        os.write(writer, CPUID_R.encode())
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        host, dump = check.read_host(f"/proc/self/fd/{reader}")
        assert dump == dumps.read(CPUID_R, "a") and host == as_kvm_host(dump.table, name="a")
    finally:
        thread.join()
        os.close(reader)


@given(cpus.tables())
def test_cpuid_r_loses_nothing_that_is_in_range(table: CpuidTable) -> None:
    dump = dumps.read(table.to_cpuid_r(), "a")
    inside = {key: r for key, r in table.entries.items() if dumps.in_range(table.entries, key[0])}
    assert dict(dump.table.entries) == inside
    assert {**inside, **dump.out_of_range} == dict(table.entries)


@given(
    st.sampled_from([CPUID_R, KCPUID_R, RAW]),
    st.integers(0, 1000),
    st.integers(0, 20),
    st.text(st.sampled_from("0123456789abcdefxCPU :=,-\n#{}\"'é\x00"), max_size=20),
)
def test_any_damage_is_a_table_or_bad_input(text: str, at: int, cut: int, put: str) -> None:
    with contextlib.suppress(BadInput):
        dumps.parse(text[:at] + put + text[at + cut :], "a")


@given(st.text(max_size=200))
def test_any_text_is_a_table_or_bad_input(text: str) -> None:
    with contextlib.suppress(BadInput):
        dumps.parse(text, "a")


@cpus.needs_processors
def test_real_processors() -> None:
    processors = cpus.processors()
    assert len(processors) == 27
    for name, dump in processors.items():
        vendor = name.split("-")[0]
        assert dump.format == "raw"
        assert dump.table.vendor == vendor, name
        assert dump.table.brand, name
        # Whatever lies beyond is an echo: of the highest basic leaf on Intel, zeros on AMD.
        echo = dump.table.get(dump.table.max_basic) if vendor == "intel" else (0, 0, 0, 0)
        assert all(registers == echo for registers in dump.out_of_range.values()), name
        # Every XSAVE component that exists lies within the size that the processor gives for all of them.
        areas = [area for area in dump.table.xsave_areas().values() if not area.supervisor]
        assert all(area.offset + area.size <= dump.table.get(0xD).ecx for area in areas), name
    beyond = processors["intel-nehalem-core-i7-920"].out_of_range
    assert (0xC, 0) in beyond and (0x8000001D, 0) in beyond
    assert set(processors["intel-raptorlake-core-i7-14700k"].table.xsave_areas()) == {2, 8, 9, 11, 12, 15, 16}
    assert set(processors["amd-bulldozer-opteron-6238"].table.xsave_areas()) == {2, 62}
    assert set(processors["intel-sandybridge-core-i7-2600"].table.xsave_areas()) == {2}


@cpus.needs_processors
def test_the_readme_of_the_dumps_is_no_dump() -> None:
    with pytest.raises(BadInput, match=r"README\.md:3: no CPUID dump begins like this"):
        dumps.load(str(cpus.PROCESSORS / "README.md"))

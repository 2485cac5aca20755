"""The PC's tables: their sums, what they say, and what ACPICA's compiler makes of them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pyhv.boot import acpi, mp_table

DSDT, FACS = 0xE0200, 0xE0400
TABLES = {
    "dsdt": acpi.dsdt(0xE0100, 0, 0x505),
    "facp": acpi.fadt(DSDT, FACS, 0x600, 9),
    "apic": acpi.madt(254, 9),
    "rsdt": acpi.rsdt([1, 2]),
    "xsdt": acpi.xsdt([1, 2]),
}


@pytest.mark.parametrize("name", TABLES)
def test_header(name: str) -> None:
    table = TABLES[name]
    signature, length, _, _, oem = struct.unpack_from("<4sIBB6s", table)
    assert (signature, length, oem) == (name.upper().encode(), len(table), b"PYHV  ")
    assert sum(table) % 256 == 0


def test_rsdp() -> None:
    rsdp = acpi.rsdp(0x11111111, 0x2222222233333333)
    assert len(rsdp) == 36 and sum(rsdp) % 256 == sum(rsdp[:20]) % 256 == 0
    assert struct.unpack("<8sB6sBIIQB3x", rsdp)[4:7] == (0x11111111, 36, 0x2222222233333333)


def test_madt_has_each_vcpu() -> None:
    table, at, seen = TABLES["apic"], 44, []
    while at < len(table):
        if table[at] == 0:
            seen.append(struct.unpack_from("<BBBBI", table, at)[2:])
        at += table[at + 1]
    assert at == len(table) and seen == [(index, index, 1) for index in range(254)]


def test_mp_table() -> None:
    pointer = mp_table.pointer(0xF0010)
    assert len(pointer) == 16 and sum(pointer) % 256 == 0 and pointer[:9] == b"_MP_\x10\0\x0f\0\1"
    table = mp_table.table(3, 0x800F12, 0x178BFBFF, 9)
    signature, length, version, _, _, _, _, _, count, local = struct.unpack_from("<4sHBB8s12sIHHI", table)
    assert (signature, length, version, local) == (b"PCMP", len(table), 4, 0xFEE00000)
    assert sum(table) % 256 == 0
    at, kinds = 44, []
    while at < len(table):
        kinds.append(table[at])
        if table[at] == 0:
            index = len(kinds) - 1
            assert struct.unpack_from("<BBBBII", table, at) == (
                *(0, index, 0x14, 1 if index else 3),
                *(0x800F12, 0x178BFBFF),
            )
        if table[at] == 3:
            _, kind, flags, bus, irq, io_apic, pin = struct.unpack_from("<BBHBBBB", table, at)
            assert (kind, flags, bus, io_apic, pin) == (0, 0xD if irq == 9 else 0, 0, 3, irq)
        at += 20 if table[at] == 0 else 8
    assert at == len(table) and len(kinds) == count
    assert [kinds.count(kind) for kind in range(5)] == [3, 1, 1, 16, 2]


# ------------------------------------------------------------------------------------------------ by ACPICA

iasl = pytest.mark.skipif(shutil.which("iasl") is None, reason="needs iasl (acpica-tools)")


def disassemble(folder: Path, name: str, table: bytes) -> tuple[str, str]:
    """What iasl says, and the source that it makes."""
    (folder / f"{name}.dat").write_bytes(table)
    command = ["iasl", "-d", f"{name}.dat"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout + done.stderr, (folder / f"{name}.dsl").read_text()


@iasl
@pytest.mark.parametrize("name", [*TABLES, "facs"])
def test_iasl_reads_the_tables(name: str, tmp_path: Path) -> None:
    table = TABLES.get(name) or acpi.facs()
    said, source = disassemble(tmp_path, name, table)
    assert not re.search(r"warning|error|invalid|incorrect", said + source, re.IGNORECASE), said + source


@iasl
def test_what_the_fadt_says(tmp_path: Path) -> None:
    _, source = disassemble(tmp_path, "facp", TABLES["facp"])
    fields = dict(re.findall(r"^(?:\[.*\])? +([^:]+?) : ([0-9A-F]+)", source, re.MULTILINE))
    assert fields["SCI Interrupt"] == "0009" and fields["PM1A Control Block Address"] == "00000604"
    assert fields["Value to cause reset"] == "06" and fields["RTC Century Index"] == "32"
    assert fields["Reset Register Supported (V2)"] == fields["32-bit PM Timer (V1)"] == "1"
    assert fields["8042 Present on ports 60/64 (V2)"] == fields["Hardware Reduced (V5)"] == "0"


@iasl
def test_iasl_makes_the_same_dsdt_of_its_own_source(tmp_path: Path) -> None:
    _, source = disassemble(tmp_path, "dsdt", TABLES["dsdt"])
    for words in ("Name (\\_S5, Package (0x04)", "Notify (\\_SB.VGEN, 0x80)", 'EisaId ("PNP0501")', "0x000E0100"):
        assert words in source
    done = subprocess.run(
        ["iasl", "-oa", "-p", "again", "dsdt.dsl"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True
    )
    assert " 0 Errors" in done.stdout, done.stdout
    # Beyond the header, in which iasl names itself.
    assert (tmp_path / "again.aml").read_bytes()[36:] == TABLES["dsdt"][36:]


@iasl
def test_the_check_can_fail(tmp_path: Path) -> None:
    table = bytearray(TABLES["facp"])
    table[50] ^= 1
    said, source = disassemble(tmp_path, "facp", bytes(table))
    assert re.search(r"warning|error|invalid|incorrect", said + source, re.IGNORECASE)


def test_long_aml_packages_have_long_lengths() -> None:
    for size, prefix in ((10, b"\x0b"), (100, b"\x46\x06"), (5000, b"\x8b\x38\x01")):
        assert acpi._sized(bytes(size)) == prefix + bytes(size)

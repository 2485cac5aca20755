"""The PC's tables: their sums, what they say, and what ACPICA's compiler makes of them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import uuid
from pathlib import Path

import pytest

import pyhv
from pyhv.boot import acpi, mp_table, smbios

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


UUID = "00112233-4455-4677-8899-aabbccddeeff"


def test_smbios() -> None:
    tables = smbios.structures(UUID)
    entry = smbios.entry_point(0xF8020, tables)
    assert entry[:4] == b"_SM_" and entry[5] == len(entry) == 31 and sum(entry) % 256 == 0
    assert entry[16:21] == b"_DMI_" and sum(entry[16:]) % 256 == 0
    longest = struct.unpack_from("<H", entry, 8)[0]
    size, gpa, count = struct.unpack_from("<HIH", entry, 22)
    assert (gpa, count, size, longest) == (0xF8020, len(tables), len(b"".join(tables)), max(map(len, tables)))
    found = {}
    for table in tables:
        kind, length, handle = struct.unpack_from("<BBH", table)
        assert handle == kind and table.endswith(b"\0\0")
        found[kind] = table[:length], [text.decode() for text in table[length:].rstrip(b"\0").split(b"\0")]
    assert [*found] == [0, 1, 127]
    firmware, texts = found[0]
    assert (len(firmware), firmware[4:6], firmware[8]) == (24, b"\1\2", 3)
    assert texts[:2] == ["pyhv", pyhv.__version__] and re.fullmatch(r"\d\d/\d\d/20\d\d", texts[2])
    assert firmware[19] == 0x10  # bit 4: virtual
    system, texts = found[1]
    assert (len(system), system[4:8], texts) == (27, b"\1\2\3\0", ["pyhv", "PC", pyhv.__version__])
    assert uuid.UUID(bytes_le=system[8:24]) == uuid.UUID(UUID)
    assert found[127] == (b"\x7f\4\x7f\0", [""])


@pytest.mark.skipif(shutil.which("dmidecode") is None, reason="needs dmidecode")
def test_dmidecode_reads_the_tables(tmp_path: Path) -> None:
    tables = smbios.structures(UUID)
    (tmp_path / "dump").write_bytes(smbios.entry_point(32, tables).ljust(32, b"\0") + b"".join(tables))
    command = ["dmidecode", "--from-dump", str(tmp_path / "dump")]
    text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert "SMBIOS 2.8 present.\n3 structures" in text and f"UUID: {UUID}" in text
    assert "System is a virtual machine" in text and "Wake-up Type: Power Switch" in text
    assert not re.search("(?i)wrong|invalid|truncated|bad|error|unknown", text)


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

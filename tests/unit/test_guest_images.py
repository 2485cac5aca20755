"""The guest images as files: what the loaders and the interception rely on, read by a reader of its own.

What the guests do when they run is for tests/host.
"""

import importlib.util
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from pyhv import guests
from pyhv.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "guest_images" / "build.py"
NAMES = guests.names()
NAMES32 = ("multiboot", "pvh")
MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("objdump") is None,
    reason="needs gcc and binutils to build and read images",
)


class Header(NamedTuple):
    kind: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int


class Elf:
    """What an ELF file says, and what objdump makes of its code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        if self.data[4] == 1:
            self._read32()
            return
        self.type, self.machine = struct.unpack_from("<HH", self.data, 16)
        self.entry, phoff = struct.unpack_from("<QQ", self.data, 24)
        (count,) = struct.unpack_from("<H", self.data, 56)
        self.headers = []
        for at in range(phoff, phoff + 56 * count, 56):
            kind, _, offset, vaddr, paddr, filesz, memsz, _ = struct.unpack_from("<IIQQQQQQ", self.data, at)
            self.headers.append(Header(kind, offset, vaddr, paddr, filesz, memsz))

    def _read32(self) -> None:
        self.type, self.machine = struct.unpack_from("<HH", self.data, 16)
        self.entry, phoff = struct.unpack_from("<II", self.data, 24)
        (count,) = struct.unpack_from("<H", self.data, 44)
        self.headers = []
        for at in range(phoff, phoff + 32 * count, 32):
            kind, offset, vaddr, paddr, filesz, memsz, _, _ = struct.unpack_from("<8I", self.data, at)
            self.headers.append(Header(kind, offset, vaddr, paddr, filesz, memsz))

    @property
    def loads(self) -> list[Header]:
        return [header for header in self.headers if header.kind == 1]

    @property
    def notes(self) -> list[tuple[bytes, int, bytes]]:
        """(owner, type, descriptor) of every note."""
        found = []
        for header in self.headers:
            at = header.offset
            while header.kind == 4 and at < header.offset + header.filesz:
                namesz, descsz, kind = struct.unpack_from("<III", self.data, at)
                at += 12
                name, at = self.data[at : at + namesz], at + (namesz + 3 & ~3)
                found.append((name, kind, self.data[at : at + descsz]))
                at += descsz + 3 & ~3
        return found

    @property
    def sites(self) -> tuple[int, ...]:
        (sites,) = (value for owner, kind, value in self.notes if (owner, kind) == (b"pyhv\0", 1))
        return struct.unpack(f"<{len(sites) // 8}Q", sites)

    def instructions(self) -> list[tuple[int, str]]:
        """(linear address, mnemonic with its REP prefix) of all code."""
        command = ["objdump", "-d", "-w", "--no-show-raw-insn", str(self.path)]
        found = []
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            if match := re.match(r" +([0-9a-f]+):\t(.*)", line):
                words = [word for word in match[2].split() if word not in ("cs", "data16")]
                length = 2 if words[0].startswith(("rep", "lock")) else 1
                found.append((int(match[1], 16), " ".join(words[:length])))
        return found


# The instructions that an interpreting KVM was seen to execute at CPL 0. An allow-list: what the compiler comes up with
# next must be looked at before it is relied on.
INTEGER = """
adc add and bswap bt call cbtw cltq cmp cmpxchg cqto cwtl dec div idiv imul inc jmp lea leave mov movabs movsb movsl
movsw movzb movzw mul neg nop not or pop push ret rol ror sar sbb shl shr sub test xadd xchg xor
"""
SYSTEM = "cli cpuid hlt in lidt out rdtsc ud2"
CONDITIONS = "a ae b be e g ge l le ne no np ns o p s"
PLAIN = {
    *INTEGER.split(),
    *SYSTEM.split(),
    *(kind + condition for kind in ("j", "set", "cmov") for condition in CONDITIONS.split()),
    *("rep outs", "rep movs", "rep stos"),
}
INSTRUCTION_SETS = """
pshufb pmulld pcmpgtq popcnt lzcnt tzcnt extrq pfadd pswapd vfmaddpd vaddps vcvtph2ps vfmadd132ps vpaddd andn
pdep aesenc pclmullqlqdq sha1nexte movbe adcx rdrand rdseed rdtscp clflushopt clwb prefetchw xgetbv xsetbv
"""
# What a guest executes beyond that, and why it may.
EXTRA = {
    "multiboot": {"lgdtl", "ljmp", "shld", "shrd"},  # every such kernel begins so; 64-bit numbers
    "pvh": {"lgdtl", "ljmp", "shrd"},
    "dispatch": {"crc32", "popcnt"},  # paths that it takes only where CPUID shows them
    "faults": {"fninit", "fld1", "faddp", "fstp"},  # on purpose: `fpu`
    "cpuid": {"iretq"},  # to CPL 3
    "pit": {"iretq"},  # it takes NMIs
    "timer": {"iretq", "sti", "wrmsr", "mfence"},  # it takes interrupts
    "msrs": {"rdmsr", "wrmsr"},  # all of them
    "instructions": {"emms", "bts", *INSTRUCTION_SETS.split()},  # one of each, which is what it is for
}


def strange_instructions(elf: Elf) -> set[str]:
    """The mnemonics that are not plain, operand-size suffixes aside."""
    return {name for _, name in elf.instructions() if not PLAIN & {name, re.sub("[bwlq]$", "", name)}}


def undeclared_cpuid(elf: Elf) -> set[int]:
    """Addresses of CPUID instructions that the note does not list, or that it lists wrongly."""
    return {address for address, name in elf.instructions() if name == "cpuid"} ^ set(elf.sites)


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guest_images_build", BUILD)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All images, built from nothing."""
    output = tmp_path_factory.mktemp("images")
    run_build(output, check=True)
    return output


def run_build(output: Path, *, check: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BUILD), "--output", str(output)]
    return subprocess.run(
        command, capture_output=True, text=True, check=check, timeout=60, env={**os.environ, **environment}
    )


@pytest.fixture(params=[name for name in NAMES if name not in NAMES32])
def elf(request: pytest.FixtureRequest, folder: Path) -> Elf:
    return Elf(folder / f"{request.param}.elf")


def test_every_guest_is_named_and_described(folder: Path) -> None:
    assert sorted(path.stem for path in folder.glob("*.elf")) == NAMES
    assert all(guests.describe(name) for name in NAMES)
    readme = (ROOT / "guest_images" / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in NAMES)


def test_unknown_guest_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(BadInput, match=r"helo: .*did you mean hello\?"):
        guests.path("helo")
    with pytest.raises(BadInput, match="there are: acpi, "):
        guests.describe("../../etc/passwd")


def test_layout(elf: Elf) -> None:
    assert elf.data[:7] == b"\x7fELF\x02\x01\x01"
    assert (elf.type, elf.machine) == (2, 62)  # ET_EXEC, EM_X86_64
    assert any(load.paddr <= elf.entry < load.paddr + load.filesz for load in elf.loads)
    for load in elf.loads:
        assert load.vaddr == load.paddr and load.memsz >= load.filesz > 0
        assert load.paddr >= MIB and load.paddr + load.memsz <= 2 * MIB
        assert load.offset + load.filesz <= len(elf.data)
    assert not any(header.kind in (2, 3) for header in elf.headers), "dynamic"
    assert not elf.path.stat().st_mode & stat.S_IXUSR


def test_notes(elf: Elf) -> None:
    kinds = [1, 2, 3] if elf.path.stem in ("acpi", "pit") else [1, 2]
    assert [(owner, kind) for owner, kind, _ in sorted(elf.notes)] == [(b"pyhv\0", kind) for kind in kinds]
    (word,) = (value for _, kind, value in elf.notes if kind == 2)
    assert word == (b"cpl3\0" if elf.path.stem == "cpuid" else b"\0")


def test_cpuid_sites_are_all_cpuid_instructions(elf: Elf) -> None:
    assert 1 <= len(elf.sites) <= 4
    assert not undeclared_cpuid(elf)
    text = elf.loads[0]
    for site in elf.sites:
        assert elf.data[site - text.paddr + text.offset :][:2] == b"\x0f\xa2"


def test_cpuid_bytes_occur_nowhere_else(elf: Elf) -> None:
    """Not even within another instruction, where objdump would not show it."""
    text = elf.loads[0]
    code = elf.data[text.offset : text.offset + text.filesz]
    found = [match.start() + text.paddr for match in re.finditer(rb"(?=\x0f\xa2)", code)]
    assert found == list(elf.sites)


def test_instructions(elf: Elf) -> None:
    assert strange_instructions(elf) == EXTRA.get(elf.path.stem, set())


@pytest.mark.parametrize("name", NAMES32)
def test_32_bit_kernels(name: str, folder: Path) -> None:
    """They are what their protocols ask for, and nothing of pyhv's own."""
    elf = Elf(folder / f"{name}.elf")
    assert (elf.type, elf.machine) == (2, 3)  # ET_EXEC, EM_386
    assert any(load.paddr <= elf.entry < load.paddr + load.filesz for load in elf.loads)
    for load in elf.loads:
        assert load.vaddr == load.paddr and load.paddr >= MIB and load.paddr + load.memsz <= 2 * MIB
    notes = [(b"Xen\0", 18, struct.pack("<I", elf.entry))] if name == "pvh" else []
    assert elf.notes == notes
    assert (elf.data.find(struct.pack("<I", 0x1BADB002)) in range(0, 8192, 4)) == (name == "multiboot")
    assert strange_instructions(elf) == EXTRA[name]


def test_the_checks_can_fail(build: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text(
        '#include "guest.h"\n'
        'NOTE_USER_MODE("");\n'
        "int guest_main(const char *cmdline, uint64_t ram_bytes, uint64_t vcpus)\n"
        "{\n"
        '    __asm__ volatile("cpuid; popcnt %rax, %rcx; tzcnt %rax, %rcx; movaps %xmm0, %xmm1; int $3");\n'
        "    return (int)(*cmdline + ram_bytes + vcpus);\n"
        "}\n"
    )
    image = tmp_path / "bad.elf"
    build.build(["gcc"], image, [*build.common_to("bad"), source])
    elf = Elf(image)
    assert strange_instructions(elf) == {"popcnt", "tzcnt", "movaps", "int3"}
    assert len(undeclared_cpuid(elf)) == 1


def test_only_what_changed_is_built_again(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "images"))
    for image in copy.iterdir():
        os.utime(image)
    done = run_build(copy, check=True)
    assert done.stdout == done.stderr == ""
    before = {image.name: image.stat().st_mtime_ns for image in copy.iterdir()}
    os.utime(copy / "spin.elf", (0, 0))
    (copy / "hello.elf").unlink()
    assert run_build(copy, check=True).stdout == "guest images: hello, spin\n"
    after = {image.name: image.stat().st_mtime_ns for image in copy.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"hello.elf", "spin.elf"}


def test_a_build_is_reproducible(folder: Path, tmp_path: Path) -> None:
    run_build(tmp_path, check=True)
    for image in folder.iterdir():
        same = (tmp_path / image.name).read_bytes() == image.read_bytes()
        assert same, f"{image.name}: without .file in a .S the linker names it after a temporary object"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_missing_tool_is_named_with_its_package(tmp_path: Path) -> None:
    output = tmp_path / "images"
    done = run_build(output, CC="", PATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "gcc: not found" in done.stderr and "apt-get install gcc" in done.stderr

    compiler = script(tmp_path / "cc", 'case "$*" in *=as) echo as ;; *) echo ld-of-nobody ;; esac')
    done = run_build(output, CC=f"{compiler} -O2")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "ld: not found" in done.stderr and "apt-get install binutils" in done.stderr
    assert not list(output.iterdir())


def test_a_failed_build_leaves_the_old_image(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "images"
    output.mkdir()
    old = output / "hello.elf"
    old.write_bytes(b"old")
    os.utime(old, (0, 0))
    compiler = script(tmp_path / "cc", 'case $1 in -print*) echo ld ;; *) echo "no luck: $*"; exit 1 ;; esac')
    done = run_build(output, CC=compiler)
    assert done.returncode == 1 and "no luck" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in output.iterdir()] == ["hello.elf"] and old.read_bytes() == b"old"

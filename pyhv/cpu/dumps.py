"""Reading CPUID dumps: the formats that people have them in, told apart by their first line.

    cpuid -r     "CPU 0:" (or "CPU:"), then "   0x00000001 0x00: eax=0x... ebx=0x... ecx=0x... edx=0x..."; of several
                 CPUs the first is taken. The `cpuid` guest prints this.
    kcpuid -r    "Basic Leafs :", then "0x00000001: EAX=0x..., EBX=0x..., ECX=0x..., EDX=0x..." or
                 "0x00000004: subleafs:" and " 0: EAX=0x..., ..." (tools/arch/x86/kcpuid of the kernel). That tool does
                 not print answers of zeros.
    raw          "CPUID 00000001: EAX-EBX-ECX-EDX", eight hexadecimal digits each; repeated lines of a leaf are its
                 subleaves, in order. "[SL 0B]" after it says which subleaf it is, in hexadecimal; what else stands in
                 brackets are notes. Where leaf 0 comes again, another CPU begins: the first is taken.
    AIDA64       the files of the collection InstLatx64, made by that program: sections under headings such as
                 "------[ CPUID Registers / Logical CPU #0 ]------", "CPUID Registers (CPU #1):", "CPU#000 AffMask: ..."
                 with lines as in raw, older ones also without the colon or with spaces for the dashes. All other lines
                 (MSRs, clocks, the mainboard) are passed over. Of several CPUs the first is taken.
    JSON         what `pyhv host --json` writes ("pyhv-host/1"), or a table alone ("pyhv-cpuid/1").

Lines that start with # are comments; the `cpuid` guest writes some. A line that is none of the format's is an error
that names file and line: a dump is either understood or refused. A byte order mark is passed over.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from pyhv.cpu.features import BY_NAME
from pyhv.cpu.table import EXTENDED, HYPERVISOR, CpuidTable, Registers
from pyhv.errors import BadInput

Entries = dict[tuple[int, int], Registers]

_CENTAUR = 0xC0000000

#: A dump of one processor has some 10 KiB; this is a limit for what is read, not for what is normal.
MAX_BYTES = 4 << 20

# Not compiled here: re compiles a pattern when it is first used and keeps it, and most runs read no dump.
_HEX = "([0-9a-fA-F]{8})"
_CPU = r"CPU(?: (\d{1,6}))?:"
_CPUID_R = rf"\s*0x{_HEX} 0x([0-9a-fA-F]{{2,8}}): eax=0x{_HEX} ebx=0x{_HEX} ecx=0x{_HEX} edx=0x{_HEX}\s*"
_KCPUID_HEADING = r"\w+ Leafs :"
_KCPUID_RULE = r"=+"
_KCPUID_VALUES = rf" EAX=0x{_HEX}, EBX=0x{_HEX}, ECX=0x{_HEX}, EDX=0x{_HEX}\s*"
_KCPUID_LEAF = rf"0x{_HEX}:{_KCPUID_VALUES}"
_KCPUID_SUBLEAVES = rf"0x{_HEX}: subleafs:\s*"
_KCPUID_SUBLEAF = rf"\s*(\d{{1,10}}):{_KCPUID_VALUES}"
_RAW_START = r"CPUID [0-9a-fA-F]{8}[ \t:].*"
_RAW = rf"CPUID {_HEX}\s*:?\s*{_HEX}[- ]{_HEX}[- ]{_HEX}[- ]{_HEX}\s*(\[.*)?"
_SUBLEAF_NOTE = r"\[SL ([0-9a-fA-F]{1,8})\]"
_AIDA64_HEADING = (
    r"-+\[ .* \]-+|(?:CPUID|MSR) Registers \(CPU #\d+.*\):|CPU#\d+ AffMask: .*|Group: 0x\S+ Affinity mask: .*"
)
_AIDA64_CPU = (
    r"-+\[ (?:CPUID Registers / )?Logical CPU #(\d+) \]-+|CPUID Registers \(CPU #(\d+).*\):|CPU#(\d+) AffMask: .*"
)


class Dump(NamedTuple):
    """A dump, read.

    out_of_range: the answers to leaves above the maximum of their range. What a processor says there is an echo (Intel
    repeats its highest basic leaf) and no feature, so they are not in `table`.
    format: "cpuid -r", "kcpuid -r", "raw", "AIDA64" or "json".
    """

    table: CpuidTable
    out_of_range: Mapping[tuple[int, int], Registers]
    format: str


def load(path: str) -> CpuidTable:
    """The table of the dump in the file `path`. Raises BadInput where it cannot be read or understood."""
    return parse(load_text(path), path)


def load_text(path: str) -> str:
    """What is in the file `path`, which may be a pipe. Raises BadInput where that is no plain text, or too much."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadInput(path, error.strerror or "cannot be read") from None
    if len(data) > MAX_BYTES:
        raise BadInput(path, f"no CPUID dump: larger than {MAX_BYTES >> 20} MiB")
    text = _decode(data)
    if "\0" in text:
        raise BadInput(path, "no CPUID dump: not plain text")
    return text


def _decode(data: bytes) -> str:
    """Text by its byte order mark, else UTF-8; what is neither is taken byte by byte: what matters here is ASCII."""
    mark = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    for encoding in ("utf-16" if mark else "utf-8-sig", "latin-1"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    raise AssertionError("latin-1 decodes any bytes")


def parse(text: str, name: str) -> CpuidTable:
    """The CPUID table in `text`; `name` is what errors call it. Raises BadInput naming file and line."""
    return read(text, name).table


def read(text: str, name: str) -> Dump:
    """parse() with what else the dump says."""
    lines = ["" if line.startswith("#") else line for line in text.splitlines()]
    number, first = next(((i, line.strip()) for i, line in enumerate(lines) if line.strip()), (0, ""))
    if not first:
        raise BadInput(name, "no CPUID dump: empty")
    if first.startswith("{"):
        return Dump(_json(text, name), {}, "json")
    if re.fullmatch(_CPU, first) or re.fullmatch(_CPUID_R, first):
        entries, form = _cpuid_r(lines, name), "cpuid -r"
    elif re.fullmatch(_KCPUID_HEADING, first):
        entries, form = _kcpuid(lines, name), "kcpuid -r"
    elif any(re.fullmatch(_AIDA64_HEADING, line.strip()) for line in lines):
        entries, form = _raw(_first_cpu(lines), name), "AIDA64"
    elif re.fullmatch(_RAW, first):
        entries, form = _raw(lines, name), "raw"
    else:
        raise BadInput(
            f"{name}:{number + 1}",
            f"no CPUID dump begins like this: {_quote(first)}",
            "known are `cpuid -r`, `kcpuid -r`, AIDA64, lines of CPUID LEAF: EAX-EBX-ECX-EDX, and pyhv's JSON",
        )
    return _dump(entries, form, name)


def untold(dump: Dump, guest: CpuidTable) -> list[int]:
    """The subleaves of leaf 0xD that the guest's XSAVE area rests on, and of which the dump tells nothing though the
    processor has them: it is cut off there. What the host has cannot be judged then."""
    table = dump.table
    if dump.format == "json" or not guest.has(BY_NAME["xsave"]) or not table.has(BY_NAME["xsave"]):
        return []
    wanted = {0, *guest.xsave_areas()}
    if guest.get(0xD, 1).eax and dump.format != "kcpuid -r":  # which leaves out what is zero
        wanted.add(1)
    told = {subleaf for leaf, subleaf in table.entries if leaf == 0xD}
    announced = table.xcr0_mask | table.xss_mask
    return sorted(n for n in wanted - told if n < 2 or 0 not in told or announced >> n & 1)


def _dump(entries: Entries, form: str, name: str) -> Dump:
    if (0, 0) not in entries:
        raise BadInput(name, "no CPUID dump: leaf 0 is missing")
    inside = {key: registers for key, registers in entries.items() if in_range(entries, key[0])}
    outside = {key: registers for key, registers in entries.items() if key not in inside}
    try:
        return Dump(CpuidTable(inside), outside, form)
    except BadInput as error:
        raise BadInput(name, error.problem) from None


def in_range(entries: Mapping[tuple[int, int], Registers], leaf: int) -> bool:
    """Whether the processor that answered `entries` has this leaf: whether it lies below the maximum that the first
    leaf of its range names. Where a range does not exist, its first leaf is an echo of another and its EAX is not a
    number of that range (SDM Vol. 2A, CPUID: "80000000H"; the hypervisor's interfaces follow the same habit)."""
    if leaf >= _CENTAUR:
        first, most = _CENTAUR, 0xFFFF
    elif leaf >= EXTENDED:
        first, most = EXTENDED, 0xFFFF
    elif HYPERVISOR <= leaf < HYPERVISOR + 0x10000000:
        first, most = leaf & ~0xFF, 0xFF
    else:
        return leaf <= entries[0, 0].eax
    registers = entries.get((first, 0))
    return registers is not None and leaf <= registers.eax <= first + most


# ------------------------------------------------------------------------------------------------ the formats


def _cpuid_r(lines: list[str], name: str) -> Entries:
    cpus: dict[int, Entries] = {}
    current: Entries | None = None
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(_CPU, line.strip())
        if match:
            cpu = int(match[1] or 0)
            if cpu in cpus:
                raise BadInput(f"{name}:{i}", f"CPU {cpu} is there twice")
            current = cpus[cpu] = {}
            continue
        match = re.fullmatch(_CPUID_R, line)
        if not match:
            raise _garbage(name, i, line, "a line of `cpuid -r`")
        if current is None:  # the output of one CPU, its heading cut off
            current = cpus[0] = {}
        leaf, subleaf, *values = (int(group, 16) for group in match.groups())
        _add(current, leaf, subleaf, values, name, i)
    return cpus.get(0) or next(iter(cpus.values()))


def _kcpuid(lines: list[str], name: str) -> Entries:
    entries: Entries = {}
    leaf: int | None = None  # the one whose subleaves are being listed
    for i, line in enumerate(lines, 1):
        if not line.strip() or re.fullmatch(_KCPUID_HEADING, line.strip()) or re.fullmatch(_KCPUID_RULE, line.strip()):
            leaf = None
            continue
        if match := re.fullmatch(_KCPUID_LEAF, line):
            leaf = None
            number, *values = (int(group, 16) for group in match.groups())
            _add(entries, number, 0, values, name, i)
        elif match := re.fullmatch(_KCPUID_SUBLEAVES, line):
            leaf = int(match[1], 16)
        elif leaf is not None and (match := re.fullmatch(_KCPUID_SUBLEAF, line)):
            subleaf = int(match[1])
            if subleaf > 0xFFFFFFFF:
                raise BadInput(f"{name}:{i}", f"subleaf {subleaf} does not fit 32 bits")
            _add(entries, leaf, subleaf, [int(group, 16) for group in match.groups()[1:]], name, i)
        else:
            raise _garbage(name, i, line, "a line of `kcpuid -r`")
    return entries


def _first_cpu(lines: list[str]) -> list[str]:
    """Of AIDA64's lines those that tell CPU 0's answers, or the first CPU's; the others are empty."""
    kept: dict[int, list[str]] = {}
    current: int | None = None
    for i, line in enumerate(lines):
        heading = line.strip()
        if match := re.fullmatch(_AIDA64_CPU, heading):
            current = int(next(group for group in match.groups() if group))
        elif re.fullmatch(_AIDA64_HEADING, heading):
            current = None
        elif current is not None and re.fullmatch(_RAW_START, line):
            kept.setdefault(current, [""] * len(lines))[i] = line
    if not kept:  # the oldest files have one CPU, under no heading
        return [line if re.fullmatch(_RAW_START, line) else "" for line in lines]
    return kept.get(0) or next(iter(kept.values()))


def _raw(lines: list[str], name: str) -> Entries:
    answers: dict[int, list[Registers]] = {}
    entries: Entries = {}
    last_line = {}
    other_cpu = False
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(_RAW, line)
        if not match:
            raise _garbage(name, i, line, "a line of CPUID LEAF: EAX-EBX-ECX-EDX")
        leaf, *values = (int(group, 16) for group in match.groups()[:5])
        other_cpu = other_cpu or (leaf == 0 and (leaf in answers or (0, 0) in entries))
        if other_cpu:
            continue
        if note := re.search(_SUBLEAF_NOTE, match[6] or ""):
            subleaf = int(note[1], 16)
            if entries.get((leaf, subleaf)) != Registers(*values):  # some files have a line twice
                _add(entries, leaf, subleaf, values, name, i)
            continue
        answers.setdefault(leaf, []).append(Registers(*values))
        last_line[leaf] = i
    for leaf, rows in answers.items():
        for n, registers in enumerate(rows):
            _add(entries, leaf, n, list(registers), name, last_line[leaf])
    # This format cannot say which subleaves it leaves out, and dumps leave out those of XSAVE components that do not
    # exist. Where lines in order make no sense, the masks in leaf 0xD tell which subleaves they are.
    if (0, 0) in entries and 0xD in answers and in_range(entries, 0xD):
        rows = answers[0xD]
        numbers = _xsave_subleaves(rows)
        if numbers is None:
            raise BadInput(
                f"{name}:{last_line[0xD]}", f"leaf 0xd: its {len(rows)} lines fit no set of XSAVE components"
            )
        for n in range(len(rows)):
            del entries[0xD, n]
        entries.update({(0xD, n): registers for n, registers in zip(numbers, rows, strict=True)})
    return entries


def _xsave_subleaves(rows: list[Registers]) -> list[int] | None:
    """Which subleaves of leaf 0xD these answers, in order, belong to; None where no reading makes sense. Tried are:
    all subleaves from 0; 0, 1 and the existing components; 0 and the existing components (processors and dumps without
    XSAVEOPT and what followed)."""
    user = rows[0].edx << 32 | rows[0].eax
    for has_one, dense in ((True, True), (True, False), (False, False)):
        supervisor = rows[1].edx << 32 | rows[1].ecx if has_one and len(rows) > 1 else 0
        if dense:
            numbers = list(range(len(rows)))
        else:
            components = [n for n in range(2, 63) if (user | supervisor) >> n & 1]
            numbers = [0, *([1] if has_one else []), *components]
        if len(numbers) < len(rows):
            continue
        pairs = list(zip(numbers, rows, strict=False))
        if all(_is_subleaf(n, registers, user, supervisor) for n, registers in pairs):
            return [n for n, _ in pairs]
    return None


def _is_subleaf(n: int, registers: Registers, user: int, supervisor: int) -> bool:
    """Could these be leaf 0xD's registers at subleaf n (SDM Vol. 2A, CPUID leaf 0DH)?"""
    if n == 0 or not any(registers):
        return True
    if n == 1:
        return registers.eax < 0x100  # flags, of which 5 are defined; a component's size would stand here
    if user >> n & 1:
        return registers.ebx >= 576 and not registers.ecx & 1
    return bool(supervisor >> n & 1) and registers.ebx == 0 and bool(registers.ecx & 1)


def _json(text: str, name: str) -> CpuidTable:
    import json

    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{name}:{error.lineno}", f"not JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, brackets nested without end
        raise BadInput(name, "not JSON that pyhv wrote") from None
    if isinstance(value, dict) and "format" in value and value["format"] != "pyhv-cpuid/1":
        from pyhv.cpu.host import HostDescription

        return HostDescription.from_json(value, name).table
    return CpuidTable.from_json(value, name)


# ------------------------------------------------------------------------------------------------ small things


def _add(entries: Entries, leaf: int, subleaf: int, values: list[int], name: str, line: int) -> None:
    if (leaf, subleaf) in entries:
        raise BadInput(f"{name}:{line}", f"leaf {leaf:#x} subleaf {subleaf:#x} is there twice")
    entries[leaf, subleaf] = Registers(*values)


def _garbage(name: str, line: int, text: str, expected: str) -> BadInput:
    return BadInput(f"{name}:{line}", f"expected {expected}, found {_quote(text)}")


def _quote(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")

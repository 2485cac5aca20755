"""CPUID tables: what a processor, KVM or a guest answers to each (leaf, subleaf), as plain immutable data.

There are no hardware semantics here: get() returns what is stored or zeros. What a CPUID instruction answers
(out-of-range leaves, bits that follow CR4 or XCR0) is csrc/cpuid.c's to say.
"""

from __future__ import annotations

from types import MappingProxyType

from pyhv.cpu.feature_types import Feature, Word
from pyhv.cpu.features import WORDS, lineage
from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

#: KVM takes no more entries than this (KVM_MAX_CPUID_ENTRIES; PYHV_CPUID_MAX_ENTRIES in csrc/pyhv.h).
MAX_ENTRIES = 256

#: Leaves whose answer depends on ECX: SDM Vol. 2A "CPUID", APM Vol. 3 appendix E. KVM marks the same ones with
#: KVM_CPUID_FLAG_SIGNIFCANT_INDEX (cpuid_function_is_indexed()), except those that it never gives to guests.
INDEXED_LEAVES = frozenset(
    {0x4, 0x7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1B, 0x1D, 0x1E, 0x1F, 0x20, 0x23, 0x24}
    | {0x8000001D, 0x80000020, 0x80000026}
)

#: The first leaf of each range. A hypervisor interface has 0x100 leaves; the first may be followed by others.
EXTENDED = 0x80000000
HYPERVISOR = 0x40000000

#: The leaves that hold the processor's name.
NAME_LEAVES = (0x80000002, 0x80000003, 0x80000004)

REGISTERS = ("eax", "ebx", "ecx", "edx")

_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}

_FORMAT = "pyhv-cpuid/1"
_U32 = 0xFFFFFFFF


class Registers(NamedTuple):
    """One CPUID answer, 32 bits each."""

    eax: int
    ebx: int
    ecx: int
    edx: int


ZEROS = Registers(0, 0, 0, 0)

#: Leaf HYPERVISOR of KVM: its highest leaf and "KVMKVMKVM" (Documentation/virt/kvm/x86/cpuid.rst). Another hypervisor's
#: leaves after it mean something else.
KVM_SIGNATURE = Registers(HYPERVISOR + 1, 0x4B4D564B, 0x564B4D56, 0x4D)


class XsaveArea(NamedTuple):
    """Where an XSAVE state component lives: leaf 0xD, subleaf = the component (SDM Vol. 1, 13.2).

    size, offset: bytes; the offset counts in the standard format and is 0 for supervisor components.
    flags: the subleaf's ECX. Bit 0: a supervisor component (IA32_XSS), bit 1: aligned to 64 bytes when compacted.
    """

    size: int
    offset: int
    flags: int

    @property
    def supervisor(self) -> bool:
        return bool(self.flags & 1)

    @property
    def aligned(self) -> bool:
        return bool(self.flags & 2)

    def shown(self, compacts: bool, xfd: bool) -> XsaveArea:
        """The area as a processor tells of it that has the compacted format (XSAVEC, XSAVES) or not, and XFD or not:
        bit 1 of the flags belongs to the one, bit 2 to the other."""
        return self._replace(flags=self.flags & (1 | (2 if compacts else 0) | (4 if xfd else 0)))


#: The XSAVE area begins with the 512 bytes of FXSAVE, which hold components 0 and 1, and a header of 64 bytes (SDM
#: Vol. 1, 13.4).
_XSAVE_LEGACY_SIZE = 576


def xsave_size(areas: Mapping[int, XsaveArea], compacted: bool = False) -> int:
    """Bytes of an XSAVE area that holds these components and the x87 and SSE state (SDM Vol. 1, 13.4.3)."""
    size = _XSAVE_LEGACY_SIZE
    for component in sorted(areas):
        area = areas[component]
        offset = area.offset
        if compacted:
            offset = (size + 63) & ~63 if area.aligned else size
        size = max(size, offset + area.size)
    return size


def xsave_leaf(areas: Mapping[int, XsaveArea], instructions: int, compacts: bool) -> dict[tuple[int, int], Registers]:
    """Leaf 0xD of a processor that has XSAVE and these components beyond x87 and SSE.

    instructions: subleaf 1 EAX; compacts: whether XSAVEC or XSAVES is among them. The sizes that follow XCR0 (EBX of
    subleaves 0 and 1) are those with every component enabled, as KVM_GET_SUPPORTED_CPUID gives them.
    """
    user = {n: area for n, area in areas.items() if not area.supervisor}
    xcr0 = 3 | sum(1 << n for n in user)
    xss = sum(1 << n for n, area in areas.items() if area.supervisor)
    size = xsave_size(user)
    entries = {
        (0xD, 0): Registers(xcr0 & _U32, size, size, xcr0 >> 32),
        (0xD, 1): Registers(instructions, xsave_size(areas, True) if compacts else 0, xss & _U32, xss >> 32),
    }
    entries.update({(0xD, n): Registers(area.size, area.offset, area.flags, 0) for n, area in areas.items()})
    return entries


class CpuidTable:
    """An immutable mapping (leaf, subleaf) -> Registers, and which of its leaves are indexed by ECX.

    entries: the answers; `indexed`: the leaves that obey ECX, by default those in INDEXED_LEAVES and those with a
    subleaf other than 0. Raises BadInput where a table could not be one of a processor: no leaf 0, a number that does
    not fit 32 bits, a subleaf of a leaf that ignores ECX, too many entries.
    """

    __slots__ = ("_entries", "_indexed")

    def __init__(
        self, entries: Mapping[tuple[int, int], Registers], indexed: Iterable[int] | None = None
    ) -> None:
        if (0, 0) not in entries:
            raise BadInput("CPUID table", "leaf 0 is missing")
        if len(entries) > MAX_ENTRIES:
            raise BadInput("CPUID table", f"{len(entries)} entries, at most {MAX_ENTRIES} are possible")
        if indexed is None:
            chosen = {leaf for leaf, subleaf in entries if subleaf or leaf in INDEXED_LEAVES}
        else:
            chosen = set(indexed).intersection([leaf for leaf, _ in entries])
        for key, registers in entries.items():
            if min(*key, *registers) < 0 or max(*key, *registers) > _U32:
                raise BadInput("CPUID table", f"{_name(key)}: a number does not fit 32 bits")
            if key[1] and key[0] not in chosen:
                raise BadInput("CPUID table", f"{_name(key)}: a subleaf of a leaf that ignores ECX")
        self._entries = {key: Registers(*entries[key]) for key in sorted(entries)}
        self._indexed = frozenset(chosen)

    # ---------------------------------------------------------------------------------------- what it holds

    @property
    def entries(self) -> Mapping[tuple[int, int], Registers]:
        """Every stored answer, sorted by leaf and subleaf."""
        return MappingProxyType(self._entries)

    @property
    def indexed(self) -> frozenset[int]:
        """The leaves of this table whose answer depends on ECX."""
        return self._indexed

    def get(self, leaf: int, subleaf: int = 0) -> Registers:
        """What is stored for (leaf, subleaf), else zeros."""
        return self._entries.get((leaf, subleaf), ZEROS)

    def word(self, word: Word) -> int:
        """The 32 bits of a feature word."""
        registers = self._entries.get((word.leaf, word.subleaf), ZEROS)
        return registers[REGISTERS.index(word.register)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CpuidTable):
            return NotImplemented
        return self._entries == other._entries and self._indexed == other._indexed

    def __hash__(self) -> int:
        return hash((tuple(self._entries.items()), self._indexed))

    def __repr__(self) -> str:
        return f"<CpuidTable {self.vendor}, {len(self._entries)} entries>"

    # ---------------------------------------------------------------------------------------- what it says

    @property
    def vendor_string(self) -> str:
        """The 12 characters of leaf 0 (EBX, EDX, ECX); bytes that do not print appear as "?"."""
        leaf0 = self._entries[0, 0]
        return _text(leaf0.ebx, leaf0.edx, leaf0.ecx)

    @property
    def vendor(self) -> str:
        """"intel", "amd", or the vendor's own 12 characters: Hygon is Hygon."""
        text = self.vendor_string
        return _VENDORS.get(text, text)

    @property
    def lineage(self) -> str:
        """Whose feature definitions hold: "intel", "amd" (Hygon's too), or "" where pyhv does not know the vendor."""
        return lineage(self.vendor)

    @property
    def max_basic(self) -> int:
        return self._entries[0, 0].eax

    @property
    def max_extended(self) -> int:
        """The highest extended leaf, 0 where there are none."""
        return self.get(EXTENDED).eax

    @property
    def brand(self) -> str:
        """The processor's name, "" where it has none."""
        words = [w for leaf in NAME_LEAVES for w in self.get(leaf)]
        return " ".join(_text(*words).split("\0")[0].split())

    @property
    def signature(self) -> tuple[int, int, int]:
        """Family, model and stepping, extended fields added in (SDM Vol. 2A, CPUID leaf 1 EAX)."""
        eax = self.get(1).eax
        family, model = eax >> 8 & 0xF, eax >> 4 & 0xF
        if family in (6, 15):
            model |= eax >> 12 & 0xF0
        if family == 15:
            family += eax >> 20 & 0xFF
        return family, model, eax & 0xF

    @property
    def physical_bits(self) -> int:
        """Physical address bits: leaf 0x80000008 EAX[7:0]; 36 without that leaf, as KVM has it."""
        return self._address_sizes & 0xFF or 36

    @property
    def linear_bits(self) -> int:
        """Linear address bits: leaf 0x80000008 EAX[15:8]; 48 without that leaf."""
        return self._address_sizes >> 8 & 0xFF or 48

    @property
    def _address_sizes(self) -> int:
        return self.get(0x80000008).eax if self.max_extended >= 0x80000008 else 0

    @property
    def clflush_bytes(self) -> int:
        """What one CLFLUSH flushes, in bytes: leaf 1 EBX[15:8], counted there in units of 8."""
        return (self.get(1).ebx >> 8 & 0xFF) * 8

    @property
    def xcr0_mask(self) -> int:
        """The XSAVE components that XCR0 may enable: leaf 0xD EDX:EAX."""
        registers = self.get(0xD)
        return registers.edx << 32 | registers.eax

    @property
    def xss_mask(self) -> int:
        """The supervisor components that IA32_XSS may enable: leaf 0xD subleaf 1 EDX:ECX."""
        registers = self.get(0xD, 1)
        return registers.edx << 32 | registers.ecx

    def xsave_areas(self) -> dict[int, XsaveArea]:
        """Number -> place and size of every XSAVE component beyond x87 and SSE that the masks announce and leaf 0xD
        describes; a component without a size does not exist."""
        areas = {}
        mask = self.xcr0_mask | self.xss_mask
        for component in range(2, 63):
            registers = self.get(0xD, component)
            if mask >> component & 1 and registers.eax:
                areas[component] = XsaveArea(registers.eax, registers.ebx, registers.ecx)
        return areas

    @property
    def is_kvm(self) -> bool:
        """Whether the hypervisor's leaves are KVM's."""
        return self.get(HYPERVISOR)[1:] == KVM_SIGNATURE[1:]

    def has(self, feature: Feature) -> bool:
        """Whether the feature's bit is set, and means that feature for this vendor and this hypervisor. The bit of an
        inverted feature says that something is absent: has() is about the bit."""
        if HYPERVISOR <= feature.word.leaf < EXTENDED and not self.is_kvm:
            return False
        return feature.vendor in ("any", self.lineage) and bool(self.word(feature.word) >> feature.bit & 1)

    def features(self) -> frozenset[str]:
        """The names of all features whose bits are set."""
        vendors = ("any", self.lineage)
        is_kvm = self.is_kvm
        names = []
        for word, members in WORDS.items():
            value = self.word(word)
            if value and (is_kvm or not HYPERVISOR <= word.leaf < EXTENDED):
                names += [f.name for f in members if value >> f.bit & 1 and f.vendor in vendors]
        return frozenset(names)

    # ---------------------------------------------------------------------------------------- made of it

    def replace(self, changes: Mapping[tuple[int, int], Registers | None]) -> CpuidTable:
        """A table with these entries put in place of the old ones, or removed where None. A leaf that is here already
        stays indexed or not as it is."""
        entries = dict(self._entries)
        for key, registers in changes.items():
            if registers is None:
                entries.pop(key, None)
            else:
                entries[key] = registers
        known = {leaf for leaf, _ in self._entries}
        new = {leaf for leaf, subleaf in entries if leaf not in known and (subleaf or leaf in INDEXED_LEAVES)}
        return CpuidTable(entries, self._indexed | new)

    def as_entries(self) -> list[tuple[int, int, int, int, int, int, int]]:
        """The table as struct pyhv_cpuid_entry has it: leaf, subleaf, indexed, EAX, EBX, ECX, EDX; sorted."""
        indexed = self._indexed
        return [
            (leaf, subleaf, int(leaf in indexed), *registers)
            for (leaf, subleaf), registers in self._entries.items()
        ]

    @classmethod
    def from_entries(cls, entries: Iterable[tuple[int, int, int, int, int, int, int]]) -> CpuidTable:
        """The other way. Raises BadInput for an answer given twice and for a leaf that both ignores and obeys ECX."""
        table: dict[tuple[int, int], Registers] = {}
        indexed: dict[int, bool] = {}
        for leaf, subleaf, flag, eax, ebx, ecx, edx in entries:
            if (leaf, subleaf) in table:
                raise BadInput("CPUID table", f"{_name((leaf, subleaf))} is there twice")
            if indexed.setdefault(leaf, bool(flag)) != bool(flag):
                raise BadInput("CPUID table", f"leaf {leaf:#x} both ignores and obeys ECX")
            table[leaf, subleaf] = Registers(eax, ebx, ecx, edx)
        return cls(table, [leaf for leaf, flag in indexed.items() if flag])

    # ---------------------------------------------------------------------------------------- as text

    def to_cpuid_r(self) -> str:
        """The table as `cpuid -r` prints it, which is what the `cpuid` guest prints too."""
        lines = ["CPU 0:\n"]
        for (leaf, subleaf), registers in self._entries.items():
            values = " ".join(f"{name}=0x{value:08x}" for name, value in zip(REGISTERS, registers, strict=True))
            lines.append(f"   0x{leaf:08x} 0x{subleaf:02x}: {values}\n")
        return "".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON object, `"format": "pyhv-cpuid/1"`. Numbers are hexadecimal text; `subleaf` is there exactly where the
        leaf obeys ECX."""
        rows = []
        for (leaf, subleaf), registers in self._entries.items():
            row: dict[str, Any] = {"leaf": f"0x{leaf:08x}"}
            if leaf in self._indexed:
                row["subleaf"] = subleaf
            for name, value in zip(REGISTERS, registers, strict=True):
                row[name] = f"0x{value:08x}"
            rows.append(row)
        return {"format": _FORMAT, "entries": rows}

    @classmethod
    def from_json(cls, value: object, name: str = "CPUID table") -> CpuidTable:
        """The other way; `value` is what json.loads() gave, `name` is what errors call it. Nothing in it is trusted:
        BadInput names the entry and the field."""
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise BadInput(name, f'no CPUID table: "format" must be "{_FORMAT}"')
        unknown = sorted(set(value) - {"format", "entries"})
        if unknown:
            raise BadInput(name, f'unknown field "{unknown[0]}"')
        rows = value.get("entries")
        if not isinstance(rows, list):
            raise BadInput(name, '"entries" must be a list')
        if len(rows) > MAX_ENTRIES:
            raise BadInput(name, f'"entries" has {len(rows)} entries, at most {MAX_ENTRIES} are possible')
        try:
            return cls.from_entries([_entry_from_json(row, f"entries[{i}]", name) for i, row in enumerate(rows)])
        except BadInput as error:
            if error.subject == name:
                raise
            raise BadInput(name, error.problem) from None


def _entry_from_json(row: object, where: str, name: str) -> tuple[int, int, int, int, int, int, int]:
    if not isinstance(row, dict):
        raise BadInput(name, f"{where} must be an object")
    unknown = sorted(set(row) - {"leaf", "subleaf", *REGISTERS})
    if unknown:
        raise BadInput(name, f'{where}: unknown field "{unknown[0]}"')
    subleaf = row.get("subleaf", 0)
    if type(subleaf) is not int or not 0 <= subleaf <= _U32:
        raise BadInput(name, f"{where}.subleaf must be a number of 32 bits")
    leaf, eax, ebx, ecx, edx = (hex_from_json(row.get(f), 8, f"{where}.{f}", name) for f in ("leaf", *REGISTERS))
    return leaf, subleaf, int("subleaf" in row), eax, ebx, ecx, edx


def hex_from_json(value: object, digits: int, where: str, name: str) -> int:
    """A number written as "0x" and at most `digits` hexadecimal digits. Raises BadInput about `where` in `name`."""
    if isinstance(value, str) and value[:2] == "0x" and 0 < len(value) - 2 <= digits:
        rest = value[2:]
        if all(c in "0123456789abcdefABCDEF" for c in rest):
            return int(rest, 16)
    raise BadInput(name, f'{where} must be a hexadecimal number such as "0x1f", at most {digits} digits')


def _text(*words: int) -> str:
    data = b"".join(w.to_bytes(4, "little") for w in words)
    return "".join(chr(b) if b == 0 or 0x20 <= b < 0x7F else "?" for b in data)


def _name(key: tuple[int, int]) -> str:
    return f"leaf {key[0]:#x} subleaf {key[1]:#x}"

"""The feature table as Python sees it: types and look-ups over _features.py, which generate.py makes of features.toml.

What each field means, and where the facts come from, stands at the top of features.toml. Names here are canonical names
unless a function says that it takes any name.
"""

from __future__ import annotations

import functools

from pyhv.cpu import _features
from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any


class Word(NamedTuple):
    """One output register of one CPUID leaf and subleaf."""

    leaf: int
    subleaf: int
    register: str  # "eax", "ebx", "ecx" or "edx"

    def __str__(self) -> str:
        return f"0x{self.leaf:x}{f'.{self.subleaf}' if self.subleaf else ''}.{self.register}"


class Feature(NamedTuple):
    """One CPUID bit; features.toml says more about each field."""

    name: str
    title: str
    vendor: str  # "any", "intel" or "amd"
    word: Word
    bit: int
    sense: str  # "plain", "inverted", "any-of" or "hint"
    requires: tuple[str, ...]
    xsave: tuple[int, ...]
    kvm: str  # "passes", "provides" or "never"
    migratable: bool
    linux: str
    qemu: str
    libvirt: str
    aliases: tuple[str, ...]
    mirrors: str  # the feature that this bit repeats, or ""
    topology: bool
    dynamic: bool
    barred: str  # "", "nested" or "pmu": no profile shows it

    @property
    def mask(self) -> int:
        return 1 << self.bit


class XsaveComponent(NamedTuple):
    """A state component of XCR0 or IA32_XSS. size, offset: bytes, in the standard format; offset is None where it
    differs between processors or where the component is supervisor state."""

    number: int
    name: str
    size: int
    offset: int | None
    supervisor: bool


class Number(NamedTuple):
    """A number in CPUID that belongs to a feature; features.toml says more about each field."""

    name: str
    title: str
    word: Word
    low: int
    bits: int
    needs: str
    most: int  # the highest value that is shown; 0: any
    compare: str  # "at most", "at least" or "equal"

    @property
    def mask(self) -> int:
        return (1 << self.bits) - 1 << self.low

    def of(self, word: int) -> int:
        """The number in a register's 32 bits."""
        return (word & self.mask) >> self.low

    def shown(self, word: int) -> int:
        """The bits that a guest is shown where the host's register is `word`."""
        value = self.of(word)
        return (min(value, self.most) if self.most else value) << self.low


class Closure(NamedTuple):
    """What closure() found. dropped: name -> what it requires and lacks (not there, or dropped itself)."""

    kept: frozenset[str]
    dropped: dict[str, tuple[str, ...]]


def _read_words() -> dict[Word, tuple[Feature, ...]]:
    words = {}
    table: Any = _features.WORDS
    for (leaf, subleaf, register), rows in table:
        word = Word(leaf, subleaf, register)
        # As Feature._make(), which checks each: a quarter of what it takes to read the table, at every start.
        words[word] = tuple([tuple.__new__(Feature, (*row[:3], word, *row[3:])) for row in rows])
    return words


WORDS: Mapping[Word, tuple[Feature, ...]] = _read_words()
FEATURES: tuple[Feature, ...] = tuple([feature for features in WORDS.values() for feature in features])
BY_NAME: Mapping[str, Feature] = {feature.name: feature for feature in FEATURES}
XSAVE_COMPONENTS: Mapping[int, XsaveComponent] = {row[0]: XsaveComponent(*row) for row in _features.XSAVE}
NUMBERS: tuple[Number, ...] = tuple([Number(row[0], row[1], Word(*row[2]), *row[3:]) for row in _features.NUMBERS])

# CpuidTable.vendor -> the vendor whose features and limits such a processor has. Hygon's are AMD's Zen under licence;
# Centaur's and Zhaoxin's follow Intel (leaf numbering, VMX, out-of-range leaves), as KVM treats them.
_LINEAGE = {"intel": "intel", "amd": "amd", "HygonGenuine": "amd", "CentaurHauls": "intel", "  Shanghai  ": "intel"}


def lineage(vendor: str) -> str:
    """CpuidTable.vendor -> "intel" or "amd", or "" for a vendor that is neither nor follows either."""
    return _LINEAGE.get(vendor, "")


@functools.cache
def by_any_name() -> Mapping[str, Feature]:
    """Canonical names and aliases, all in lower case."""
    names = {}
    for feature in FEATURES:
        names[feature.name] = feature
        for alias in (feature.linux, feature.qemu, feature.libvirt, *feature.aliases):
            if alias:
                names[alias] = feature
    return names


def find(name: str) -> Feature:
    """The feature of any name or alias, in any case, with - and _ alike. Raises BadInput with the nearest names."""
    key = name.strip().lower()
    names = by_any_name()
    feature = names.get(key) or names.get(key.replace("-", "_")) or names.get(key.replace("_", "-"))
    if feature is None:
        import difflib

        near = difflib.get_close_matches(key, names, 3)
        advice = f"did you mean {' or '.join(near)}?" if near else "`pyhv features` lists all"
        raise BadInput(f"feature {name!r}", "there is no such feature", advice)
    return feature


def closure(names: Iterable[str]) -> Closure:
    """Those of `names` whose requirements, and theirs, are in `names` too. KeyError for what is no canonical name."""
    wanted = frozenset(names)
    dropped: dict[str, tuple[str, ...]] = {}
    settled: set[str] = set()

    def settle(name: str) -> None:
        if name in settled:
            return
        settled.add(name)  # the generator has checked that there are no cycles
        missing = []
        for other in BY_NAME[name].requires:
            if other in wanted:
                settle(other)
            if other not in wanted or other in dropped:
                missing.append(other)
        if missing:
            dropped[name] = tuple(missing)

    for name in wanted:
        settle(name)
    return Closure(wanted.difference(dropped), dropped)


def pack(names: Iterable[str]) -> dict[Word, int]:
    """The value of every feature word of the table when exactly these features are set. Takes canonical names."""
    values = dict.fromkeys(WORDS, 0)
    for name in names:
        feature = BY_NAME[name]
        values[feature.word] |= 1 << feature.bit
    return values

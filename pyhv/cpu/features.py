"""The feature table as Python sees it: look-ups over _features.py, which generate.py makes of features.toml.

What each field means, and where the facts come from, stands at the top of features.toml. Names here are canonical names
unless a function says that it takes any name.
"""

from __future__ import annotations

import functools

from pyhv.cpu import _features
from pyhv.cpu.feature_types import Feature, Number, Word, XsaveComponent
from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any


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
    return {name: feature for feature in FEATURES for name in feature.all_names()}


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

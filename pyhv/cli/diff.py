"""`pyhv diff A B`: two processors, profiles or hosts, feature by feature, and bit by bit where they differ."""

from __future__ import annotations

import os
from typing import NamedTuple

from pyhv.cli import output
from pyhv.cli.options import Command, Option
from pyhv.cli.say import one_line
from pyhv.cpu import features, profiles
from pyhv.cpu.feature_types import Word
from pyhv.cpu.profiles import Profile
from pyhv.cpu.table import REGISTERS, CpuidTable
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DETAILS = """
A and B are each
  host       what KVM offers to guests on this machine
  PROFILE    the name of a profile (see pyhv profiles), or a profile's file NAME.toml: what it lets a guest see
  FILE       a CPUID table: the output of `cpuid -r`, of the guest cpuid, of `kcpuid -r`, a file of AIDA64 (the
             collection InstLatx64), lines of CPUID LEAF: EAX-EBX-ECX-EDX, or what `pyhv host --json` writes.
             ./NAME is always a file

A profile has features and limits only; two tables are compared register by register.

examples:
  pyhv diff hyperv-r2 host                what compatibility mode hides here
  pyhv run cpuid > host.cpuid; pyhv run cpuid --compat > guest.cpuid; pyhv diff host.cpuid guest.cpuid

exit status: 0 no difference, 1 differences, 2 bad input
"""

COMMAND = Command(
    "diff",
    "Compare two processors, profiles or hosts, feature by feature.",
    (
        Option("A", "host, a profile or a file"),
        Option("B", "likewise"),
        Option("--json", "print one JSON object"),
    ),
    _DETAILS,
)

_VENDORS = {"intel": "Intel", "amd": "AMD"}

# The longest name that stands in front of bits; longer ones become A and B.
_LABEL = 24


class Side(NamedTuple):
    """One of the two that are compared."""

    name: str
    table: CpuidTable | None
    profile: Profile | None


class Row(NamedTuple):
    """A register, or a limit, that differs; None: it is not there."""

    what: str
    a: int | None
    b: int | None


class Comparison(NamedTuple):
    """What differs, for one vendor."""

    vendor: str
    """Whose features: "intel", "amd" or a vendor's 12 characters; two of them, with "and", where it is about both."""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    words: tuple[tuple[Word, int, int], ...]
    """Feature words with their values."""
    rows: tuple[Row, ...]
    """What is no feature word."""

    @property
    def same(self) -> bool:
        return not (self.words or self.rows)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    a, b = _side(given.a), _side(given.b)
    comparisons = compare(a, b)
    same = all(comparison.same for comparison in comparisons)
    if given.json:
        output.print_json({"same": same, "a": a.name, "b": b.name, "comparisons": [_to_json(c) for c in comparisons]})
    elif same:
        print(f"{one_line(a.name)} and {one_line(b.name)}: no difference")
    else:
        for index, comparison in enumerate(comparisons):
            if index:
                print()
            _print(a, b, comparison)
    return 0 if same else 1


def _side(text: str) -> Side:
    """What the user named. Raises BadInput."""
    if text == "host":
        from pyhv.cli import host

        return Side(text, host.describe().table, None)
    if text.endswith(".toml") or text in profiles.names():
        return Side(text, None, profiles.load(text))
    if "/" in text or os.path.exists(text):
        from pyhv.cpu import dumps

        return Side(text, dumps.load(text), None)
    import difflib

    known = ["host", *profiles.names()]
    near = difflib.get_close_matches(text, known, 1)
    raise BadInput(
        text,
        "is neither a file nor a profile",
        f"did you mean {near[0]}?" if near else "give a file, a profile's name, or host for this machine",
    )


def compare(a: Side, b: Side) -> list[Comparison]:
    """What differs: one comparison, or one for each vendor where both sides are profiles. Raises BadInput where a
    profile says nothing about a table's vendor."""
    if a.table is not None and b.table is not None:
        return [_compare_tables(a.table, b.table)]
    table = a.table or b.table
    found = [_compare_to_profile(a, b, vendor) for vendor in ([table.vendor] if table is not None else _VENDORS)]
    if len(found) == 2 and found[0]._replace(vendor="") == found[1]._replace(vendor=""):
        return [found[0]._replace(vendor="intel and amd")]
    return found


def _compare_tables(a: CpuidTable, b: CpuidTable) -> Comparison:
    vendor = a.vendor if a.vendor == b.vendor else f"{a.vendor} and {b.vendor}"
    rows = []
    for key in sorted({*a.entries, *b.entries}):
        in_a, in_b = a.entries.get(key), b.entries.get(key)
        for index, register in enumerate(REGISTERS):
            if Word(*key, register) in features.WORDS:
                continue
            value_a = None if in_a is None else in_a[index]
            value_b = None if in_b is None else in_b[index]
            # A leaf that is not there answers zeros: no difference to see.
            if (value_a or 0) != (value_b or 0):
                subleaf = f".{key[1]}" if key[0] in a.indexed | b.indexed else ""
                rows.append(Row(f"{key[0]:#x}{subleaf}.{register}", value_a, value_b))
    for number in features.NUMBERS:
        values = number.of(a.word(number.word)), number.of(b.word(number.word))
        if number.word in features.WORDS and values[0] != values[1]:
            rows.append(Row(f"{number.name} ({number.title})", *values))
    return _comparison(vendor, _words_of(a), _words_of(b), (a.lineage, b.lineage), rows)


def _compare_to_profile(a: Side, b: Side, vendor: str) -> Comparison:
    words: list[dict[Word, int]] = []
    limits: list[dict[str, int | None]] = []
    for side in (a, b):
        if side.profile is not None:
            words.append(features.pack(side.profile.allowed(vendor)))
            limits.append(side.profile.limits(vendor)._asdict())
        elif side.table is not None:
            table = side.table
            # What no profile decides is no difference to one.
            words.append({word: table.word(word) & ~_undecided(word) for word in features.WORDS})
            numbers = (table.max_basic, table.max_extended, table.physical_bits, table.clflush_bytes)
            limits.append(dict(zip(profiles.Limits._fields, numbers, strict=True)))
    rows = []
    for name in profiles.Limits._fields:
        in_a, in_b = limits[0][name], limits[1][name]
        as_the_host = None in (in_a, in_b) and (a.table is not None or b.table is not None)
        if in_a != in_b and not as_the_host:
            rows.append(Row(name.replace("_", " "), in_a, in_b))
    lineage = features.lineage(vendor)
    return _comparison(vendor, words[0], words[1], (lineage, lineage), rows)


def _undecided(word: Word) -> int:
    """The bits of the word that follow the VM's topology or the guest's state, or are a number."""
    return sum(f.mask for f in features.WORDS[word] if f.topology or f.dynamic) | _numbers(word)


def _numbers(word: Word) -> int:
    """The bits of the word that are numbers."""
    return sum(number.mask for number in features.NUMBERS if number.word == word)


def _words_of(table: CpuidTable) -> dict[Word, int]:
    return {word: table.word(word) & ~_numbers(word) for word in features.WORDS}


def _comparison(
    vendor: str, a: dict[Word, int], b: dict[Word, int], lineages: tuple[str, str], rows: list[Row]
) -> Comparison:
    words, only_a, only_b = [], [], []
    for word in features.WORDS:
        if a[word] == b[word]:
            continue
        words.append((word, a[word], b[word]))
        only_a += _names(word, a[word] & ~b[word], lineages[0])
        only_b += _names(word, b[word] & ~a[word], lineages[1])
    return Comparison(vendor, tuple(only_a), tuple(only_b), tuple(words), tuple(rows))


def _names(word: Word, mask: int, lineage: str) -> list[str]:
    """The names of a word's bits; one that means nothing to pyhv on this vendor's processors is called by its place."""
    known = {f.bit: f for f in features.WORDS[word] if f.vendor in ("any", lineage)}
    bits = [bit for bit in range(32) if mask >> bit & 1]
    # A mirror says what another bit says already.
    return [
        known[bit].name if bit in known else f"{word}[{bit}]"
        for bit in bits
        if bit not in known or not known[bit].mirrors
    ]


# ---------------------------------------------------------------------------------------------------- printing


def _print(a: Side, b: Side, comparison: Comparison) -> None:
    name_a, name_b = one_line(a.name), one_line(b.name)
    vendor = " and ".join(_VENDORS.get(vendor, vendor) for vendor in comparison.vendor.split(" and "))
    if name_a == name_b or max(len(name_a), len(name_b)) > _LABEL:
        print(f"A is {name_a}\nB is {name_b}")
        name_a, name_b = "A", "B"
    print(f"{name_a} and {name_b}, by the features of {vendor}")
    for name, names in ((name_a, comparison.only_a), (name_b, comparison.only_b)):
        print(f"\nonly in {name}: {len(names)}")
        if names:
            output.print_names(names)
    for word, in_a, in_b in comparison.words:
        print(f"\n{output.word_title(word)}")
        for line in output.bits_with_carets([(name_a, in_a), (name_b, in_b)]):
            print("  " + line)
    if comparison.rows:
        print("\nnumbers that differ")
        left = max(len(row.what) for row in comparison.rows)
        for row in comparison.rows:
            print(f"  {row.what:<{left}}  {_number(row, row.a)}  {_number(row, row.b)}".rstrip())


def _number(row: Row, value: int | None) -> str:
    """A register in hexadecimal, a leaf in hexadecimal without zeros in front, another limit in decimal."""
    if value is None:
        return f"{'-':<10}"
    if row.what.startswith("0x"):
        return f"0x{value:08x}"
    return f"{value:#x}".ljust(10) if row.what.endswith("leaf") else f"{value:<10}"


def _to_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "vendor": comparison.vendor,
        "only_in_a": list(comparison.only_a),
        "only_in_b": list(comparison.only_b),
        "words": [
            {
                "leaf": f"{word.leaf:#x}",
                "subleaf": word.subleaf,
                "register": word.register,
                "a": f"0x{a:08x}",
                "b": f"0x{b:08x}",
                "differ": f"0x{a ^ b:08x}",
            }
            for word, a, b in comparison.words
        ],
        "numbers": [{"what": row.what, "a": row.a, "b": row.b} for row in comparison.rows],
    }

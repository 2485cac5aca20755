"""Reads features.toml and checks it: every name once, every reference to something that is there, no circles, and what
a feature claims of itself is possible with what it requires.

Used by the build (generate.py) and by tests; what runs reads the table that the build made (features.py).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pyhv.cpu.feature_types import Feature, Number, Word, XsaveComponent

REGISTERS = ("eax", "ebx", "ecx", "edx")
VENDORS = ("any", "intel", "amd")
SENSES = ("plain", "inverted", "any-of", "hint")
KVM = ("passes", "provides", "never")
BARRED = ("", "nested", "pmu")
COMPARE = ("at most", "at least", "equal")
PROJECTS = ("linux", "qemu", "libvirt")

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
_ALIAS = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_C_NAME = re.compile(r"PYHV_CPUID_[A-Z0-9_]+")


class TableError(Exception):
    """features.toml or a built-in profile is wrong; str() is one line that names the entry."""


class Table(NamedTuple):
    """features.toml, parsed and checked."""

    entries: tuple[Feature, ...]
    xsave: tuple[XsaveComponent, ...]
    numbers: tuple[Number, ...]
    c_names: dict[str, str]
    """Of the few features that C must know: canonical name -> the name of the mask there."""

    def by_any_name(self) -> dict[str, Feature]:
        """Every name and alias -> its feature."""
        return {name: entry for entry in self.entries for name in entry.all_names()}


# How each key of a feature is checked: the type that it must have, and its default (None: there is none).
_FEATURE_KEYS: dict[str, tuple[type, object]] = {
    "bit": (int, None),
    "name": (str, None),
    "title": (str, None),
    "vendor": (str, None),
    "sense": (str, "plain"),
    "requires": (list, []),
    "xsave": (list, []),
    "kvm": (str, None),
    "migratable": (bool, True),
    "linux": (str, ""),
    "qemu": (str, ""),
    "libvirt": (str, ""),
    "aliases": (list, []),
    "mirrors": (str, ""),
    "topology": (bool, False),
    "dynamic": (bool, False),
    "barred": (str, ""),
    "c": (str, ""),
}
_CHOICES = {"vendor": VENDORS, "sense": SENSES, "kvm": KVM, "barred": BARRED}
_ELEMENTS = {"requires": str, "xsave": int, "aliases": str}


def _is(value: object, kind: type) -> bool:
    """isinstance, with bool not an int (TOML keeps them apart, Python does not)."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _feature(raw: Mapping[str, Any], defaults: Mapping[str, Any], word: Word, c_names: dict[str, str]) -> Feature:
    where = f"word {word}: {raw.get('name') or 'bit ' + str(raw.get('bit', '?'))}"
    values = {**defaults, **raw}
    for key in values:
        if key not in _FEATURE_KEYS:
            raise TableError(f"{where}: unknown key {key!r}")
    for key, (kind, default) in _FEATURE_KEYS.items():
        if key not in values:
            if default is None:
                raise TableError(f"{where}: no {key}")
            values[key] = default
        value = values[key]
        if not _is(value, kind):
            raise TableError(f"{where}: {key} is {value!r}; it must be of type {kind.__name__}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise TableError(f"{where}: {key} is {value!r}; it must be one of {', '.join(filter(None, _CHOICES[key]))}")
        if key in _ELEMENTS:
            for element in value:
                if not _is(element, _ELEMENTS[key]):
                    raise TableError(f"{where}: {key} holds {element!r}; it must hold {_ELEMENTS[key].__name__} only")
            values[key] = tuple(value)
    name = values["name"]
    if not _NAME.fullmatch(name):
        raise TableError(f"{where}: the name {name!r} is not of lower-case letters, digits and _")
    if not 0 <= values["bit"] <= 31:
        raise TableError(f"{where}: bit {values['bit']} is not in 0 to 31")
    if not values["title"].strip() or "\n" in values["title"]:
        raise TableError(f"{where}: the title is empty or has more than one line")
    for project in PROJECTS:
        if values[project] == "=":
            values[project] = name
    for alias in (*(values[p] for p in PROJECTS), *values["aliases"]):
        if alias and not _ALIAS.fullmatch(alias):
            raise TableError(f"{where}: the name {alias!r} is not of lower-case letters, digits, _ - and .")
    if values["c"] and not _C_NAME.fullmatch(values["c"]):
        raise TableError(f"{where}: c is {values['c']!r}; it must begin with PYHV_CPUID_")
    if values["mirrors"] and values["mirrors"] not in values["requires"]:
        values["requires"] = (values["mirrors"], *values["requires"])
    if c_name := values.pop("c"):
        c_names[values["name"]] = c_name
    return Feature(word=word, **values)


def _words(raw: object, c_names: dict[str, str]) -> Iterator[Feature]:
    if not isinstance(raw, list) or not raw:
        raise TableError("no [[word]]")
    seen: set[Word] = set()
    for number, item in enumerate(raw, 1):
        where = f"[[word]] number {number}"
        leaf, subleaf, register = item.pop("leaf", None), item.pop("subleaf", 0), item.pop("register", None)
        features = item.pop("features", None)
        for key, value in (("leaf", leaf), ("subleaf", subleaf)):
            if not _is(value, int) or not 0 <= value <= 0xFFFFFFFF:
                raise TableError(f"{where}: {key} is {value!r}; it must be a number of 32 bits")
        if register not in REGISTERS:
            raise TableError(f"{where}: register is {register!r}; it must be one of {', '.join(REGISTERS)}")
        word = Word(leaf, subleaf, register)
        if word in seen:
            raise TableError(f"word {word}: it is there twice")
        seen.add(word)
        if not isinstance(features, list) or not all(isinstance(f, dict) for f in features) or not features:
            raise TableError(f"word {word}: features must be an array of inline tables")
        for feature in features:
            yield _feature(feature, item, word, c_names)


def _xsave(raw: object) -> Iterator[XsaveComponent]:
    if not isinstance(raw, list):
        raise TableError("[[xsave]] must be an array of tables")
    keys: dict[str, type] = {"number": int, "name": str, "size": int, "offset": int, "supervisor": bool}
    for item in raw:
        where = f"xsave component {item.get('number', '?')}"
        for key in item:
            if key not in keys:
                raise TableError(f"{where}: unknown key {key!r}")
        for key, kind in keys.items():
            if key == "offset" and key not in item:
                item[key] = None
            elif not _is(item.get(key), kind):
                raise TableError(f"{where}: {key} is {item.get(key)!r}; it must be of type {kind.__name__}")
        component = XsaveComponent(**item)
        if not 0 <= component.number <= 62:
            raise TableError(f"{where}: the number is not in 0 to 62")
        if component.size <= 0 or (component.offset is not None and component.offset < 0):
            raise TableError(f"{where}: size and offset must not be negative, nor the size 0")
        if component.supervisor and component.offset is not None:
            raise TableError(f"{where}: supervisor state has no offset in the standard format")
        yield component


_NUMBER_KEYS: dict[str, tuple[type, object]] = {
    "leaf": (int, None),
    "subleaf": (int, 0),
    "register": (str, None),
    "low": (int, None),
    "bits": (int, None),
    "name": (str, None),
    "title": (str, None),
    "needs": (str, None),
    "most": (int, 0),
    "compare": (str, None),
}


def _numbers(raw: object) -> Iterator[Number]:
    if not isinstance(raw, list):
        raise TableError("[[number]] must be an array of tables")
    for item in raw:
        where = f"number {item.get('name', '?')}"
        for key in item:
            if key not in _NUMBER_KEYS:
                raise TableError(f"{where}: unknown key {key!r}")
        for key, (kind, default) in _NUMBER_KEYS.items():
            if key not in item and default is None:
                raise TableError(f"{where}: no {key}")
            if not _is(item.setdefault(key, default), kind):
                raise TableError(f"{where}: {key} is {item[key]!r}; it must be of type {kind.__name__}")
        word = Word(item.pop("leaf"), item.pop("subleaf"), item.pop("register"))
        number = Number(word=word, **item)
        if min(word[:2]) < 0 or max(word[:2]) > 0xFFFFFFFF or word[2] not in REGISTERS:
            raise TableError(f"{where}: there is no such leaf, subleaf or register")
        if not _NAME.fullmatch(number.name) or not number.title.strip():
            raise TableError(f"{where}: the name is not of lower-case letters, digits and _, or the title is empty")
        if number.low < 0 or number.bits < 1 or number.low + number.bits > 32:
            raise TableError(f"{where}: {number.bits} bits from bit {number.low} are not in 0 to 31")
        if not 0 <= number.most < 1 << number.bits:
            raise TableError(f"{where}: most is {number.most}, which does not fit {number.bits} bits")
        if number.compare not in COMPARE:
            raise TableError(f"{where}: compare is {number.compare!r}; it must be one of {', '.join(COMPARE)}")
        yield number


def parse_table(text: str) -> Table:
    """features.toml -> Table. Raises TableError."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TableError(str(error)) from None
    for key in raw:
        if key not in ("word", "xsave", "number"):
            raise TableError(f"unknown table {key!r}")
    c_names: dict[str, str] = {}
    entries = tuple(_words(raw.get("word"), c_names))
    table = Table(entries, tuple(_xsave(raw.get("xsave", []))), tuple(_numbers(raw.get("number", []))), c_names)
    _check_unique(table)
    _check_references(table)
    _check_cycles(table)
    _check_consistency(table)
    return table


def _where(entry: Feature) -> str:
    return f"word {entry.word}: {entry.name}"


def _claim(owners: dict[Any, Feature], key: object, entry: Feature, what: str) -> None:
    """Notes that `entry` has `key`; fails when another has it already."""
    other = owners.setdefault(key, entry)
    if other is not entry:
        raise TableError(f"{_where(entry)}: {what} is {other.name}'s too (word {other.word})")


def _check_unique(table: Table) -> None:
    bits: dict[Any, Feature] = {}
    masks: dict[Any, Feature] = {}
    names: dict[Any, Feature] = {}
    for entry in table.entries:
        _claim(bits, (entry.word, entry.bit), entry, f"bit {entry.bit}")
        _claim(names, entry.name, entry, f"the name {entry.name!r}")
        if c_name := table.c_names.get(entry.name):
            _claim(masks, c_name, entry, f"the C name {c_name}")
    for entry in table.entries:
        for name in entry.all_names():
            _claim(names, name, entry, f"the name {name!r}")
    numbers: set[int] = set()
    labels: set[str] = set()
    for component in table.xsave:
        if component.number in numbers or component.name in labels:
            raise TableError(f"xsave component {component.number}: its number or its name is there twice")
        numbers.add(component.number)
        labels.add(component.name)
    taken = {(entry.word, entry.bit): entry.name for entry in table.entries}
    for number in table.numbers:
        if number.name in names:
            raise TableError(f"number {number.name}: the name is {names[number.name].name}'s too")
        for bit in range(number.low, number.low + number.bits):
            other = taken.setdefault((number.word, bit), number.name)
            if other != number.name:
                raise TableError(f"number {number.name}: bit {bit} of word {number.word} is {other}'s too")


def _check_references(table: Table) -> None:
    names = {entry.name for entry in table.entries}
    components = {component.number for component in table.xsave}
    used = {number for entry in table.entries for number in entry.xsave}
    for entry in table.entries:
        for other in entry.requires:
            if other not in names:
                raise TableError(f"{_where(entry)}: requires {other!r}, which is no feature's canonical name")
        for number in entry.xsave:
            if number not in components:
                raise TableError(f"{_where(entry)}: brings xsave component {number}, which has no [[xsave]] table")
    for value in table.numbers:
        if value.needs not in names:
            raise TableError(f"number {value.name}: needs {value.needs!r}, which is no feature's canonical name")
    for component in table.xsave:
        if component.number not in used:
            raise TableError(f"xsave component {component.number}: no feature brings it")


def _check_cycles(table: Table) -> None:
    requires = {entry.name: entry.requires for entry in table.entries}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            cycle = [*path[path.index(name) :], name]
            raise TableError(f"{name}: requires itself: {' -> '.join(cycle)}")
        if name not in done:
            for other in requires[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in requires:
        visit(name, [])


def _check_consistency(table: Table) -> None:
    """What a feature claims of itself must be possible with what it requires."""
    by_name = {entry.name: entry for entry in table.entries}
    for entry in table.entries:
        for other in (by_name[name] for name in entry.requires):
            needs = f"{_where(entry)}: requires {other.name}, but"
            if other.vendor not in ("any", entry.vendor):
                raise TableError(f"{needs} its vendor is {entry.vendor}, and that one's {other.vendor}")
            if entry.kvm != "never" and other.kvm == "never":
                raise TableError(f"{needs} KVM {entry.kvm} it, and never gives that one")
            if entry.migratable and not other.migratable:
                raise TableError(f"{needs} it is migratable, and that one is not")
            if other.barred and not entry.barred:
                raise TableError(f"{needs} that one is barred, and it is not")
            if other.sense != "plain" or other.topology or other.dynamic:
                raise TableError(f"{needs} that one does not mean that something is there")
        if entry.mirrors:
            original = by_name[entry.mirrors]
            if original.mirrors or original.kvm != entry.kvm or original.word == entry.word:
                raise TableError(f"{_where(entry)}: cannot mirror {original.name}: kvm differs, or the word does not")

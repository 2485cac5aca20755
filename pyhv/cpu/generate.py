"""Compiles the feature table and the built-in profiles; checks both.

    python pyhv/cpu/generate.py

reads features.toml and profiles/*.toml beside this file, and writes

    pyhv/cpu/_features.py    both as plain literals, for features.py and profiles/: no start of pyhv parses TOML
    csrc/gen/cpuid_bits.h    the masks of the few bits that C must know

each only where its content changes, by a temporary file and a rename, so that `make` rebuilds nothing needlessly and a
reader never sees half a file. The build runs it before anything of pyhv can be imported: standard library only, and no
import of pyhv. A fault in the input ends it with exit status 1 and one line on stderr that names the entry.

compile_profile() is also what pyhv.cpu.profiles.load() runs for a user's file: one set of rules for all profiles.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent

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


# ------------------------------------------------------------------------------------------------- the feature table


class Entry(NamedTuple):
    """One feature as it stands in features.toml, defaults filled in. The fields up to `barred` are those of
    pyhv.cpu.features.Feature, in its order, but for the word, which is (leaf, subleaf, register) here."""

    name: str
    title: str
    vendor: str
    word: tuple[int, int, str]
    bit: int
    sense: str
    requires: tuple[str, ...]
    xsave: tuple[int, ...]
    kvm: str
    migratable: bool
    linux: str
    qemu: str
    libvirt: str
    aliases: tuple[str, ...]
    mirrors: str
    topology: bool
    dynamic: bool
    barred: str
    c: str


class XsaveEntry(NamedTuple):
    number: int
    name: str
    size: int
    offset: int | None
    supervisor: bool


class NumberEntry(NamedTuple):
    """One [[number]], in the order of pyhv.cpu.features.Number's fields. most: 0 where it has no limit."""

    name: str
    title: str
    word: tuple[int, int, str]
    low: int
    bits: int
    needs: str
    most: int
    compare: str


class Table(NamedTuple):
    """features.toml, parsed and checked."""

    entries: tuple[Entry, ...]
    xsave: tuple[XsaveEntry, ...]
    numbers: tuple[NumberEntry, ...]


def word_name(word: tuple[int, int, str]) -> str:
    """'0x7.1.eax'; the subleaf is left out where it is 0."""
    leaf, subleaf, register = word
    return f"0x{leaf:x}{f'.{subleaf}' if subleaf else ''}.{register}"


def all_names(entry: Entry) -> list[str]:
    """The canonical name, then the other names, each once."""
    return list(dict.fromkeys(n for n in (entry.name, *(getattr(entry, p) for p in PROJECTS), *entry.aliases) if n))


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


def _feature(raw: Mapping[str, Any], defaults: Mapping[str, Any], word: tuple[int, int, str]) -> Entry:
    where = f"word {word_name(word)}: {raw.get('name') or 'bit ' + str(raw.get('bit', '?'))}"
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
    return Entry(word=word, **values)


def _words(raw: object) -> Iterator[Entry]:
    if not isinstance(raw, list) or not raw:
        raise TableError("no [[word]]")
    seen: set[tuple[int, int, str]] = set()
    for number, item in enumerate(raw, 1):
        where = f"[[word]] number {number}"
        leaf, subleaf, register = item.pop("leaf", None), item.pop("subleaf", 0), item.pop("register", None)
        features = item.pop("features", None)
        for key, value in (("leaf", leaf), ("subleaf", subleaf)):
            if not _is(value, int) or not 0 <= value <= 0xFFFFFFFF:
                raise TableError(f"{where}: {key} is {value!r}; it must be a number of 32 bits")
        if register not in REGISTERS:
            raise TableError(f"{where}: register is {register!r}; it must be one of {', '.join(REGISTERS)}")
        word = (leaf, subleaf, register)
        if word in seen:
            raise TableError(f"word {word_name(word)}: it is there twice")
        seen.add(word)
        if not isinstance(features, list) or not all(isinstance(f, dict) for f in features) or not features:
            raise TableError(f"word {word_name(word)}: features must be an array of inline tables")
        for feature in features:
            yield _feature(feature, item, word)


def _xsave(raw: object) -> Iterator[XsaveEntry]:
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
        component = XsaveEntry(**item)
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


def _numbers(raw: object) -> Iterator[NumberEntry]:
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
        word = (item.pop("leaf"), item.pop("subleaf"), item.pop("register"))
        number = NumberEntry(word=word, **item)
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
    table = Table(
        tuple(_words(raw.get("word"))), tuple(_xsave(raw.get("xsave", []))), tuple(_numbers(raw.get("number", [])))
    )
    _check_unique(table)
    _check_references(table)
    _check_cycles(table)
    _check_consistency(table)
    return table


def _where(entry: Entry) -> str:
    return f"word {word_name(entry.word)}: {entry.name}"


def _claim(owners: dict[Any, Entry], key: object, entry: Entry, what: str) -> None:
    """Notes that `entry` has `key`; fails when another has it already."""
    other = owners.setdefault(key, entry)
    if other is not entry:
        raise TableError(f"{_where(entry)}: {what} is {other.name}'s too (word {word_name(other.word)})")


def _check_unique(table: Table) -> None:
    bits: dict[Any, Entry] = {}
    masks: dict[Any, Entry] = {}
    names: dict[Any, Entry] = {}
    for entry in table.entries:
        _claim(bits, (entry.word, entry.bit), entry, f"bit {entry.bit}")
        if entry.c:
            _claim(masks, entry.c, entry, f"the C name {entry.c}")
        _claim(names, entry.name, entry, f"the name {entry.name!r}")
    for entry in table.entries:
        for name in all_names(entry):
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
                raise TableError(f"number {number.name}: bit {bit} of word {word_name(number.word)} is {other}'s too")


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


# ------------------------------------------------------------------------------------------------------- the profiles


class FeatureLike(Protocol):
    """What compile_profile() needs of a feature: Entry has it, and pyhv.cpu.features.Feature."""

    @property
    def name(self) -> str: ...
    @property
    def vendor(self) -> str: ...
    @property
    def word(self) -> tuple[int, int, str]: ...
    @property
    def requires(self) -> tuple[str, ...]: ...
    @property
    def migratable(self) -> bool: ...
    @property
    def mirrors(self) -> str: ...
    @property
    def topology(self) -> bool: ...
    @property
    def dynamic(self) -> bool: ...
    @property
    def barred(self) -> str: ...


class Problem(NamedTuple):
    """One fault of a profile file. `field`: dotted path of the key, "" for the file as a whole."""

    line: int
    field: str
    text: str


class ProfileFault(Exception):
    """A profile file is wrong: all its faults, in the order of their lines."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        lines = [f"line {p.line}: {f'{p.field}: ' if p.field else ''}{p.text}" for p in self.problems]
        super().__init__("; ".join(lines))


# A profile as a literal, in the order of pyhv.cpu.profiles.Profile's fields after `source`.
ProfileLiteral = tuple[Any, ...]

LIMITS = ("max_basic_leaf", "max_extended_leaf", "physical_address_bits", "clflush_size")
# What each limit may be, and why.
_LIMIT_RANGES: dict[str, tuple[int, int, str]] = {
    "max_basic_leaf": (0x1, 0xFFFF, "a basic leaf, 0x1 to 0xffff"),
    "max_extended_leaf": (0x80000001, 0x8000FFFF, "an extended leaf, 0x80000001 to 0x8000ffff"),
    "physical_address_bits": (32, 52, "32 to 52 bits (SDM Vol. 3A, 4.1.4)"),
    "clflush_size": (8, 2040, "a multiple of 8 from 8 to 2040 bytes (leaf 1 EBX holds it in 8 bits, in units of 8)"),
}
# A guest that was shown one of these takes the TSC for a clock whose rate never changes: a move would break it.
CLOCKS = ("invtsc", "tsc_deadline_timer")

_BARRED_WHY = {"nested": "guests get no virtualization of their own", "pmu": "guests get no performance monitoring"}
_PROFILE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


# The tokens of TOML, as far as _Lines needs them: strings of all four kinds, comments, line ends, brackets, the rest.
_TOKEN = re.compile(
    r'''(?P<string>"""(?:[^\\]|\\.)*?"""+|\'\'\'.*?\'\'\'+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')'''
    r"""|(?P<comment>\#[^\n]*)|(?P<end>\n)|(?P<open>[\[{])|(?P<close>[\]}])|(?P<equals>=)|(?P<other>[^\s"'\#\[\]{}=]+)""",
    re.DOTALL,
)


class _Lines:
    """Where the keys and strings of a TOML document stand. tomllib keeps no positions, so this goes through the text a
    second time. It relies on tomllib having found it well-formed; on any other text it is wrong, but ends."""

    def __init__(self, text: str) -> None:
        self._keys: dict[str, int] = {}
        self._strings: dict[tuple[str, str], int] = {}
        line, depth = 1, 0
        section, path = "", ""
        parts: list[str] | None = []  # of the key or the table header that is being read; None in a value
        header = False
        for token in _TOKEN.finditer(text):
            kind, word = token.lastgroup, token[0]
            if parts is None:
                if kind == "string":
                    self._strings.setdefault((path, word.strip(word[0])), line)
                depth += (kind == "open") - (kind == "close")
            elif kind == "open":
                header = True
            elif kind in ("string", "other"):
                parts += [word.strip(word[0])] if kind == "string" else filter(None, word.split("."))
            elif kind == "equals":
                path = ".".join(filter(None, (section, *parts)))
                self._keys.setdefault(path, line)
                parts = None
            if kind == "end" and depth <= 0:
                if header and parts:
                    section = ".".join(parts)
                    self._keys.setdefault(section, line)
                parts, header, depth = [], False, 0
            line += word.count("\n")

    def of(self, field: str, value: object = None) -> int:
        """The line of a string in the field's value, else of the field's key, else of the nearest table around it."""
        if isinstance(value, str) and (field, value) in self._strings:
            return self._strings[field, value]
        while field and field not in self._keys:
            field = field.rpartition(".")[0]
        return self._keys.get(field, 1)


def compile_profile(text: str, features: Mapping[str, FeatureLike]) -> ProfileLiteral:
    """A profile file -> its literal. `features`: every name and alias of every feature, in lower case.

    The fields and their meaning stand in pyhv/cpu/profiles/__init__.py. Raises ProfileFault with all faults found.
    """
    try:
        raw = tomllib.loads(text)
    except RecursionError:
        raise ProfileFault([Problem(1, "", "arrays or tables are nested too deep")]) from None
    except ValueError as error:  # TOMLDecodeError, or what int() says of a number of thousands of digits
        message, at, position = str(error).partition(" (at ")
        match = re.fullmatch(r"line (\d+), column (\d+)\)", position)
        line = int(match[1]) if match else text.rstrip("\n").count("\n") + 1 if at else 1
        raise ProfileFault([Problem(line, "", message + (f" (column {match[2]})" if match else ""))]) from None
    return _ProfileCompiler(raw, text, features).compile()


class _ProfileCompiler:
    def __init__(self, raw: dict[str, Any], text: str, features: Mapping[str, FeatureLike]) -> None:
        self._raw = raw
        self._text = text
        self._lines: _Lines | None = None  # made for the first problem
        self._features = features
        self._problems: list[Problem] = []
        # How a list spells a feature, by field and canonical name (perhaps by an alias): to find its line.
        self._spelling: dict[tuple[str, str], str] = {}

    def _report(self, field: str, text: str, value: object = None) -> None:
        """Notes a problem with a field, or with one string in its value."""
        self._lines = self._lines or _Lines(self._text)
        self._problems.append(Problem(self._lines.of(field, value), field, text))

    def compile(self) -> ProfileLiteral:
        raw = self._raw
        self._known_keys("", raw, ("name", "title", "description", "moving", "features", "limits"))
        name = self._field("name", str)
        if isinstance(name, str) and not _PROFILE_NAME.fullmatch(name):
            self._report("name", f"{name!r} is not of lower-case letters, digits, - and .")
        title = self._field("title", str)
        if isinstance(title, str) and (not title.strip() or "\n" in title):
            self._report("title", "it must be one line that is not empty")
        description = self._field("description", str)
        moving = self._field("moving", bool, False)
        limits = self._limits(bool(moving))
        everything, lists = self._feature_lists(bool(moving), limits)
        if self._problems:
            raise ProfileFault(self._problems)
        return (name, title, str(description).strip(), moving, everything, *lists, limits["intel"], limits["amd"])

    def _known_keys(self, field: str, table: Mapping[str, object], known: Sequence[str]) -> None:
        for key in table:
            if key not in known:
                path = f"{field}.{key}" if field else key
                self._report(path, f"unknown field{self._suggest(key, known)}; the fields here are {', '.join(known)}")

    def _field(self, field: str, kind: type, default: object = None) -> object:
        value = self._raw.get(field, default)
        if value is None:
            self._report(field, "it is missing")
        elif not _is(value, kind):
            self._report(field, f"it is {value!r}; it must be {'a string' if kind is str else 'true or false'}")
        return value

    def _suggest(self, name: str, known: Iterable[str]) -> str:
        import difflib

        if len(self._problems) > 20:  # difflib is slow, and nobody reads that far
            return ""
        near = difflib.get_close_matches(name.lower(), list(known), 3)
        return f" (did you mean {' or '.join(near)}?)" if near else ""

    # -- limits

    def _limits(self, moving: bool) -> dict[str, tuple[int | None, ...]]:
        table = self._raw.get("limits", {})
        values: dict[str, list[int | None]] = {"intel": [], "amd": []}
        if not isinstance(table, dict):
            self._report("limits", "it must be a table")
            table, moving = {}, False
        if not table and moving:
            self._report("limits", f"it is missing; a profile for moving gives {', '.join(LIMITS)}")
            moving = False
        self._known_keys("limits", table, LIMITS)
        for limit in LIMITS:
            value = table.get(limit)
            field = f"limits.{limit}"
            if value is None and moving:
                self._report(field, f"it is missing; a profile for moving gives {', '.join(LIMITS)}")
            if isinstance(value, dict):
                if set(value) != {"intel", "amd"}:
                    self._report(field, "a table here has the keys intel and amd, and no others")
                for vendor in values:
                    values[vendor].append(self._limit(limit, value.get(vendor)))
            else:
                checked = self._limit(limit, value)
                for vendor in values:
                    values[vendor].append(checked)
        return {vendor: tuple(list_) for vendor, list_ in values.items()}

    def _limit(self, limit: str, value: object) -> int | None:
        if value is None:
            return None
        low, high, meaning = _LIMIT_RANGES[limit]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._report(f"limits.{limit}", f"it is {value!r}; it must be {meaning}")
            return None
        if limit == "clflush_size" and value % 8:
            self._report(f"limits.{limit}", f"it is {value}; it must be {meaning}")
            return None
        return value

    # -- features

    def _feature_lists(
        self, moving: bool, limits: Mapping[str, tuple[int | None, ...]]
    ) -> tuple[bool, tuple[tuple[str, ...], ...]]:
        table = self._raw.get("features")
        if not isinstance(table, dict):
            self._report("features", "it is missing" if table is None else "it must be a table")
            return False, ((), (), (), ())
        self._known_keys("features", table, ("all", "hide", "common", "intel", "amd"))
        everything = "all" in table
        if everything and table["all"] is not True:
            self._report("features.all", f"it is {table['all']!r}; it can only be true, or be left out")
        for key in ("common", "intel", "amd") if everything else ("hide",):
            if key in table:
                rule = (
                    "it does not go with `all`, which shows everything but `hide`"
                    if everything
                    else "it goes only with `all`: without, what is not listed is hidden"
                )
                self._report(f"features.{key}", rule)
        if not any(key in table for key in ("all", "common", "intel", "amd")):
            self._report("features", "it lists nothing: give all = true, or common, intel and amd")
        hide = [feature.name for feature in self._list("hide", table) if self._listable("features.hide", feature)]
        if everything:
            if moving:
                for clock in CLOCKS:
                    if clock not in hide and self._features[clock].migratable:
                        self._report("features.hide", f"{clock} is missing: TSC rates differ between hosts")
            return True, ((), (), (), tuple(hide))
        before = len(self._problems)
        listed = {key: self._shown(key, table, moving) for key in ("common", "intel", "amd")}
        if len(self._problems) == before:  # else what was refused would be missing, too
            self._check_requirements(listed)
        for vendor in ("intel", "amd"):
            self._check_limits(vendor, listed, limits[vendor])
        return False, (*(tuple(f.name for f in listed[key]) for key in ("common", "intel", "amd")), ())

    def _list(self, key: str, table: Mapping[str, object]) -> list[FeatureLike]:
        """The features that an array names, each once."""
        field = f"features.{key}"
        value = table.get(key, [])
        if not isinstance(value, list):
            self._report(field, "it must be an array of feature names")
            return []
        found: list[FeatureLike] = []
        for name in value:
            feature = self._features.get(name.lower()) if isinstance(name, str) else None
            if not isinstance(name, str):
                self._report(field, f"it holds {name!r}; it must hold feature names")
            elif feature is None:
                self._report(field, f"unknown feature {name!r}{self._suggest(name, self._features)}", name)
            elif feature in found:
                self._report(field, f"{feature.name} is there twice", name)
            else:
                found.append(feature)
                self._spelling[field, feature.name] = name
        return found

    def _report_feature(self, field: str, feature: FeatureLike, text: str) -> None:
        self._report(field, f"{feature.name} {text}", self._spelling.get((field, feature.name)))

    def _listable(self, field: str, feature: FeatureLike) -> bool:
        if feature.mirrors:
            self._report_feature(field, feature, f"goes where {feature.mirrors} goes: list that instead")
        elif feature.topology:
            self._report_feature(field, feature, "follows from the VM's number of vCPUs: leave it out")
        elif feature.dynamic:
            need = ", ".join(feature.requires)
            self._report_feature(field, feature, f"follows what the guest's system switches on: list {need} instead")
        else:
            return True
        return False

    def _shown(self, key: str, table: Mapping[str, object], moving: bool) -> list[FeatureLike]:
        field = f"features.{key}"
        shown = []
        for feature in self._list(key, table):
            if not self._listable(field, feature):
                continue
            if feature.barred:
                self._report_feature(field, feature, f"may be shown by no profile: {_BARRED_WHY[feature.barred]}")
            elif feature.vendor not in ("any", key):
                self._report_feature(field, feature, f"belongs under `{feature.vendor}`: no other vendor has it")
            elif moving and feature.name in CLOCKS:
                self._report_feature(field, feature, "cannot be shown by a profile for moving: TSC rates differ")
            elif moving and not feature.migratable:
                self._report_feature(
                    field, feature, "cannot be shown by a profile for moving: it ties a guest to its host"
                )
            else:
                shown.append(feature)
        return shown

    def _check_requirements(self, listed: Mapping[str, Sequence[FeatureLike]]) -> None:
        names = {key: {feature.name for feature in features} for key, features in listed.items()}
        for key, features in listed.items():
            field = f"features.{key}"
            for feature in features:
                if key != "common" and feature.name in names["common"]:
                    self._report_feature(field, feature, "is under `common` already")
                lacking: dict[str, list[str]] = {}  # what is missing -> for which vendors
                for vendor in ("intel", "amd") if key == "common" else (key,):
                    for name in feature.requires:
                        if name not in names["common"] | names[vendor]:
                            lacking.setdefault(name, []).append(vendor)
                for name, vendors in lacking.items():
                    whose = f" for {vendors[0]}" if len(vendors) == 1 else ""
                    self._report_feature(field, feature, f"requires {name}, which is not listed{whose}")

    def _check_limits(
        self, vendor: str, listed: Mapping[str, Sequence[FeatureLike]], limits: tuple[int | None, ...]
    ) -> None:
        for key in ("common", vendor):
            for feature in listed[key]:
                leaf = feature.word[0]
                limit = {0: limits[0], 2: limits[1]}.get(leaf >> 30)  # basic or extended; KVM's leaves have none
                if limit is not None and leaf > limit:
                    text = f"is in leaf 0x{leaf:x}, above the limit 0x{limit:x} for {vendor}"
                    self._report_feature(f"features.{key}", feature, text)


# ---------------------------------------------------------------------------------------------------------- the output


def entries_by_name(table: Table) -> dict[str, Entry]:
    """Every name and alias -> its entry."""
    return {name: entry for entry in table.entries for name in all_names(entry)}


def render_module(table: Table, profiles: Sequence[ProfileLiteral]) -> str:
    """The text of pyhv/cpu/_features.py."""
    lines = [
        '"""Made by generate.py of features.toml and profiles/*.toml: do not edit. features.py gives it its types."""',
        "",
        "WORDS = (",
    ]
    for word in dict.fromkeys(entry.word for entry in table.entries):
        lines.append(f"    ({word!r}, (")
        for entry in table.entries:
            if entry.word == word:
                # All of Entry but the word, which stands above, and the C name, which only the header needs.
                lines.append(f"        {(*entry[:3], *entry[4:-1])!r},")
        lines.append("    )),")
    lines += [")", "", "XSAVE = (", *(f"    {tuple(component)!r}," for component in table.xsave), ")"]
    lines += ["", "NUMBERS = (", *(f"    {tuple(number)!r}," for number in table.numbers), ")"]
    lines += ["", "PROFILES = {", *(f"    {profile[0]!r}: {profile!r}," for profile in profiles), "}", ""]
    return "\n".join(lines)


def render_header(table: Table) -> str:
    """The text of csrc/gen/cpuid_bits.h."""
    lines = [
        "/* Made by pyhv/cpu/generate.py of pyhv/cpu/features.toml: do not edit.",
        " * The masks of the CPUID bits that C must know. */",
        "#ifndef PYHV_CPUID_BITS_H",
        "#define PYHV_CPUID_BITS_H",
        "",
    ]
    for entry in table.entries:
        if entry.c:
            lines.append(f"#define {entry.c} 0x{1 << entry.bit:08X}u /* {entry.name}: {entry.title} */")
    lines += ["", "#endif", ""]
    return "\n".join(lines)


def write_if_changed(path: Path, text: str) -> bool:
    """Needs: nothing. Does: makes the file at `path` hold `text`, at once (temporary file and rename), leaving it alone
    where it does already; true if it wrote. On failure (OSError): the file is as it was."""
    data = text.encode()
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def compile_builtin(directory: Path, table: Table) -> list[ProfileLiteral]:
    """All profiles of a directory, by name. Raises TableError."""
    features = entries_by_name(table)
    profiles = []
    for path in sorted(directory.glob("*.toml")):
        try:
            profile = compile_profile(path.read_text(encoding="utf-8"), features)
        except ProfileFault as fault:
            raise TableError(f"profiles/{path.name}: {fault}") from None
        if profile[0] != path.stem:
            raise TableError(f"profiles/{path.name}: the profile's name is {profile[0]!r}")
        profiles.append(profile)
    return profiles


def generate(source: Path, module: Path, header: Path) -> None:
    """Reads `source`/features.toml and `source`/profiles/, writes the two files. Raises TableError, OSError."""
    try:
        table = parse_table((source / "features.toml").read_text(encoding="utf-8"))
    except TableError as error:
        raise TableError(f"features.toml: {error}") from None
    profiles = compile_builtin(source / "profiles", table)
    for path, text in ((module, render_module(table, profiles)), (header, render_header(table))):
        write_if_changed(path, text)


def main() -> int:
    try:
        generate(HERE, HERE / "_features.py", REPOSITORY / "csrc" / "gen" / "cpuid_bits.h")
    except (TableError, OSError, UnicodeDecodeError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

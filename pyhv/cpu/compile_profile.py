"""Checks a profile file and compiles it, one set of rules for the built-in ones (at build time) and a user's own.

The fields and their meaning stand in pyhv/cpu/profiles/__init__.py. Slow to import: only where a file is to be parsed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pyhv.cpu.feature_types import Feature


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


def compile_profile(text: str, features: Mapping[str, Feature]) -> ProfileLiteral:
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
    def __init__(self, raw: dict[str, Any], text: str, features: Mapping[str, Feature]) -> None:
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
        elif not isinstance(value, kind):
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

    def _list(self, key: str, table: Mapping[str, object]) -> list[Feature]:
        """The features that an array names, each once."""
        field = f"features.{key}"
        value = table.get(key, [])
        if not isinstance(value, list):
            self._report(field, "it must be an array of feature names")
            return []
        found: list[Feature] = []
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

    def _report_feature(self, field: str, feature: Feature, text: str) -> None:
        self._report(field, f"{feature.name} {text}", self._spelling.get((field, feature.name)))

    def _listable(self, field: str, feature: Feature) -> bool:
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

    def _shown(self, key: str, table: Mapping[str, object], moving: bool) -> list[Feature]:
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

    def _check_requirements(self, listed: Mapping[str, Sequence[Feature]]) -> None:
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
        self, vendor: str, listed: Mapping[str, Sequence[Feature]], limits: tuple[int | None, ...]
    ) -> None:
        for key in ("common", vendor):
            for feature in listed[key]:
                leaf = feature.word.leaf
                limit = {0: limits[0], 2: limits[1]}.get(leaf >> 30)  # basic or extended; KVM's leaves have none
                if limit is not None and leaf > limit:
                    text = f"is in leaf 0x{leaf:x}, above the limit 0x{limit:x} for {vendor}"
                    self._report_feature(f"features.{key}", feature, text)

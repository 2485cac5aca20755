'''Profiles: what a guest may see. The built-in ones, and a user's own by path.

A profile is a TOML file:

    name = "hyperv-r2"               lower case letters, digits, - and .
    title = "one line"
    description = """                what it hides and why, for `pyhv profiles NAME`
    ...
    """
    moving = true                    meant for moving between generations; default false. Such a profile gives every
                                     limit, and shows neither invariant TSC nor the TSC deadline timer

    [features]                       canonical names or aliases of features.toml. Either
    all = true                       all that KVM offers and that can be migrated, but
    hide = ["avx512f"]               these, and what requires them
                                     or, as allow-lists (what is not listed is hidden),
    common = ["fpu", ...]            for both vendors
    intel = [...]                    for Intel (and who follows it)
    amd = ["cr8_legacy", ...]        for AMD (and Hygon)

    [limits]                         a number, or a table { intel = 36, amd = 40 }; left out: as the host has it
    max_basic_leaf = 0xB             highest leaf of the basic range, if the host's is not lower
    max_extended_leaf = 0x80000008   and of the extended range
    physical_address_bits = 36       bits
    clflush_size = 64                bytes

A list must hold what its features require, and no feature above a limit. Mirrors (AMD's 0x80000001.EDX) go where the
features go that they repeat; topology bits (HT) and dynamic bits (OSXSAVE) are nobody's to list. No profile may show
VMX, SVM or a PMU. compile_profile.py has one set of rules for a user's file and for the built-in ones, of which the
build makes literals.
'''

from __future__ import annotations

from pyhv.cpu import _features
from pyhv.cpu.features import FEATURES, by_any_name, closure, lineage
from pyhv.errors import BadInput
from pyhv.light import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyhv.cpu.compile_profile import Problem

# A user's file that is larger than this is something else. The built-in ones are under 8 KiB.
_MAX_FILE_BYTES = 1 << 20
# An error is one line: it tells of so many problems, and counts the others.
_SHOWN_PROBLEMS = 10


class BadProfile(BadInput):
    """A profile file is malformed. problems: all that is wrong with it, by line; path: the file as it was given."""

    def __init__(self, path: str, problems: tuple[Problem, ...]) -> None:
        self.path = path
        self.problems = problems
        if len(problems) == 1:
            super().__init__(f"{path}:{problems[0].line}", _describe(problems[0]))
            return
        texts = [f"line {p.line}: {_describe(p)}" for p in problems[:_SHOWN_PROBLEMS]]
        more = [f"and {len(problems) - len(texts)} more"] if len(problems) > len(texts) else []
        super().__init__(path, "; ".join(texts + more))


def _describe(problem: Problem) -> str:
    return f"{f'{problem.field}: ' if problem.field else ''}{problem.text}"


class Limits(NamedTuple):
    """What is no bit, for one vendor; None: as the host has it. clflush_size: bytes."""

    max_basic_leaf: int | None
    max_extended_leaf: int | None
    physical_address_bits: int | None
    clflush_size: int | None


class Profile(NamedTuple):
    """One profile. The lists hold canonical names, as the file lists them; allowed() is what they come to."""

    source: str  # "built in", or the path of the file
    name: str
    title: str
    description: str
    moving: bool
    everything: bool  # all = true
    common: tuple[str, ...]
    intel: tuple[str, ...]
    amd: tuple[str, ...]
    hide: tuple[str, ...]
    limits_intel: Limits
    limits_amd: Limits

    def allowed(self, vendor: str) -> frozenset[str]:
        """The features that a guest on a processor of this vendor (CpuidTable.vendor) may see, mirrors among them,
        closed over requirements. Bits of inverted sense are among them where the profile wants them set. Never among
        them: barred features, and those that are not the profile's to decide (Feature.topology, Feature.dynamic).

        Raises BadInput for a vendor that is neither Intel or AMD nor follows one, unless the profile shows everything.
        """
        if self.everything:
            names = {
                f.name
                for f in FEATURES
                if f.migratable and f.kvm != "never" and not (f.barred or f.topology or f.dynamic)
            }
            return closure(names.difference(self.hide)).kept
        ours = self._lineage(vendor)
        names = {*self.common, *(self.intel if ours == "intel" else self.amd)}
        names.update([f.name for f in FEATURES if f.mirrors in names and f.vendor in ("any", ours)])
        return frozenset(names)

    def limits(self, vendor: str) -> Limits:
        """The limits for a processor of this vendor. Raises BadInput as allowed() does, where vendors differ at all."""
        if self.limits_intel == self.limits_amd:
            return self.limits_intel
        return self.limits_intel if self._lineage(vendor) == "intel" else self.limits_amd

    def _lineage(self, vendor: str) -> str:
        ours = lineage(vendor)
        if not ours:
            raise BadInput(
                f"profile {self.name}",
                f"it is for Intel's and AMD's processors, and this one is of {vendor!r}",
                "use a profile that shows everything, such as host",
            )
        return ours


def names() -> list[str]:
    """The built-in profiles, `host` first."""
    return sorted(_features.PROFILES, key=lambda name: (name != "host", name))


def load(name_or_path: str) -> Profile:
    """A built-in profile by its name, or a user's by its path: whatever has a / in it or ends in .toml.

    Raises BadInput: no such name (with the nearest), no such file, or unreadable; BadProfile: a malformed file.
    """
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        return _load_file(name_or_path)
    literal = _features.PROFILES.get(name_or_path)
    if literal is None:
        import difflib

        near = difflib.get_close_matches(name_or_path, _features.PROFILES, 1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"
        raise BadInput(f"profile {name_or_path!r}", "there is no such profile", f"{advice} (a file ends in .toml)")
    return _from_literal("built in", literal)


def _from_literal(source: str, literal: Any) -> Profile:
    *fields, limits_intel, limits_amd = literal
    return Profile._make((source, *fields, Limits._make(limits_intel), Limits._make(limits_amd)))


def _load_file(path: str) -> Profile:
    import os
    from pathlib import Path

    from pyhv.cpu import compile_profile  # like pathlib, slow to import: only where there is a file to parse

    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        what = os.strerror(error.errno or 0) if isinstance(error, OSError) else "this is no file name"
        raise BadInput(path, what, "give the path of a profile file, or the name of a profile") from None
    if len(data) > _MAX_FILE_BYTES:
        raise BadInput(path, f"it is larger than {_MAX_FILE_BYTES} bytes", "this is no profile file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadProfile(path, (compile_profile.Problem(line, "", "it is not UTF-8 text"),)) from None
    try:
        return _from_literal(path, compile_profile.compile_profile(text, by_any_name()))
    except compile_profile.ProfileFault as fault:
        raise BadProfile(path, fault.problems) from None

"""`pyhv profiles [NAME]`: the processors that a guest can be shown, or all about one."""

from __future__ import annotations

from pyhv.cli import output
from pyhv.cli.options import Command, Option
from pyhv.cli.say import one_line
from pyhv.cpu import features, policy, profiles
from pyhv.cpu.feature_types import Word
from pyhv.cpu.profiles import Profile
from pyhv.errors import BadInput, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyhv.cpu.policy import GuestCpu

_DETAILS = """
NAME is a built-in profile, or a profile file: a path, or NAME.toml.

examples:
  pyhv profiles hyperv-r2      what compatibility mode keeps and hides, here
  pyhv profiles ./mine.toml    checks a file of your own
"""

COMMAND = Command(
    "profiles",
    "List the profiles, the processors that a guest can be shown, or show one.",
    (
        Option("NAME", "a profile or its file (default: list the built-in ones)", required=False),
        Option("--json", "print one JSON object: profiles, a list; with NAME all about it"),
    ),
    _DETAILS,
)

_VENDORS = {"intel": "Intel", "amd": "AMD"}


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    if given.name is None:
        found = [profiles.load(name) for name in profiles.names()]
        if given.json:
            titles = [{"name": p.name, "title": p.title, "moving": p.moving} for p in found]
            output.print_json({"profiles": titles})
        else:
            output.print_rows([(p.name, p.title) for p in found])
        return 0
    profile = profiles.load(given.name)
    guest, unknown = _on_this_host(profile)
    if given.json:
        output.print_json(_to_json(profile, guest, unknown))
    else:
        _print(profile, guest, unknown)
    return 0


def _on_this_host(profile: Profile) -> tuple[GuestCpu | None, str]:
    """The processor that the profile makes of this host's; or None and why that is not known."""
    from pyhv.cli import host

    try:
        return policy.guest_table(host.describe(), profile, policy.Topology(1)), ""
    except (ImportError, BadInput, HostError) as error:
        return None, str(error)


def _words(profile: Profile, vendor: str) -> dict[Word, int]:
    """The feature words in which the profile shows anything on this vendor's processors."""
    packed = features.pack(profile.allowed(vendor))
    return {word: value for word, value in packed.items() if value}


def _print(profile: Profile, guest: GuestCpu | None, unknown: str) -> None:
    print(f"{profile.name}: {profile.title}")
    if profile.source != "built in":
        print(f"from {one_line(profile.source)}")
    if profile.description.strip():
        print("\n" + profile.description.strip("\n"))
    if profile.everything:
        print("\nshows all that the host offers and that can be migrated" + (", but" if profile.hide else ""))
        if profile.hide:
            output.print_names(profile.hide)
    else:
        _print_words(profile)
    _print_limits(profile)
    print("\non this host")
    if guest is None:
        print(f"  not known: {unknown}")
    else:
        from pyhv.cli import host

        host.print_hidden(guest)


def _print_words(profile: Profile) -> None:
    by_vendor = {vendor: _words(profile, vendor) for vendor in _VENDORS}
    print(f"\n{'feature words, at most':<24}{'Intel':<12}AMD")
    for word in features.WORDS:
        values = [by_vendor[vendor].get(word, 0) for vendor in _VENDORS]
        if any(values):
            print(f"  {output.word_title(word):<22}{values[0]:08x}    {values[1]:08x}")


def _print_limits(profile: Profile) -> None:
    rows = []
    for name in profiles.Limits._fields:
        intel, amd = getattr(profile.limits_intel, name), getattr(profile.limits_amd, name)
        if (intel, amd) != (None, None):
            texts = [_limit(name, intel), _limit(name, amd)]
            text = texts[0] if texts[0] == texts[1] else f"{texts[0]} on Intel, {texts[1]} on AMD"
            rows.append(("  " + name.replace("_", " "), text))
    if rows:
        print("\nlimits")
        output.print_rows(rows)


def _limit(name: str, value: int | None) -> str:
    if value is None:
        return "as the host has it"
    return f"{value:#x}" if name.endswith("leaf") else str(value)


def _to_json(profile: Profile, guest: GuestCpu | None, unknown: str) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": profile.name,
        "title": profile.title,
        "description": profile.description,
        "source": profile.source,
        "moving": profile.moving,
        "everything": profile.everything,
        "hide": list(profile.hide),
    }
    for vendor in _VENDORS:
        value[vendor] = {
            "features": sorted(profile.allowed(vendor)),
            "words": [
                {"leaf": f"{w.leaf:#x}", "subleaf": w.subleaf, "register": w.register, "value": f"0x{bits:08x}"}
                for w, bits in _words(profile, vendor).items()
            ],
            "limits": profile.limits(vendor)._asdict(),
        }
    value["host"] = None
    if guest is None:
        value["host_error"] = unknown
    else:
        value["host"] = {
            "hidden": {hidden.name: hidden.reason for hidden in guest.hidden},
            "lacking": list(guest.lacking),
            "levelled": {row.what: {"host": row.host, "guest": row.guest} for row in guest.levelled},
        }
    return value

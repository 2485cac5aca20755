"""`pyhv features [NAME]`: the feature table, or all about one feature."""

from __future__ import annotations

from pyhv.cli import output
from pyhv.cli.options import Command, Option
from pyhv.cpu import features, profiles
from pyhv.cpu.feature_types import Feature, Number
from pyhv.cpu.features import FEATURES
from pyhv.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DETAILS = """
NAME is any name that a feature goes by: Linux's, QEMU's, libvirt's or the manuals'; case, - and _ do not matter.

examples:
  pyhv features popcnt          all about one feature
  pyhv features --leaf 7.1      the bits of leaf 7, subleaf 1
  pyhv features --json | jq -r '.features[] | select(.barred != "") | .name'
"""

COMMAND = Command(
    "features",
    "List the processor features that pyhv knows, or show all about one.",
    (
        Option("NAME", "a feature (default: list all)", required=False),
        Option("--leaf", "list those of one leaf, such as 7, 7.1 or 0x80000001", "L"),
        Option("--json", "print one JSON object: features, a list; with NAME all about it"),
    ),
    _DETAILS,
)

_KVM = {
    "passes": "offers it where the processor has it",
    "provides": "offers it on every host: KVM provides it",
    "never": "never offers it",
}
_SENSE = {
    "plain": "set means that it is there",
    "inverted": "set means that something is absent: the profile decides, not the host",
    "any-of": "set means that software has to take care: shown if any host of a pool has it",
    "hint": "set means that something is quick: as the starting host has it, and no reason against a move",
}
_BARRED = {
    "nested": "no profile shows it: virtualization inside the guest",
    "pmu": "no profile shows it: performance monitoring or tracing of the host",
}


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    if given.name is not None:
        if given.leaf is not None:
            raise BadInput("--leaf", "cannot be combined with the name of a feature")
        _show(features.find(given.name), given.json)
        return 0
    chosen = FEATURES if given.leaf is None else _in_leaf(given.leaf)
    if given.json:
        output.print_json({"features": [_to_json(feature) for feature in chosen]})
    else:
        _list(chosen)
    return 0


def _in_leaf(text: str) -> tuple[Feature, ...]:
    """The features of a leaf, given as LEAF or LEAF.SUBLEAF. Raises BadInput."""
    leaf_text, dot, subleaf_text = text.partition(".")
    try:
        leaf = int(leaf_text, 0)
        subleaf = int(subleaf_text, 0) if dot else None
    except ValueError:
        raise BadInput(f"--leaf {text}", "is not a leaf", "give a number such as 7, 7.1 or 0x80000001") from None
    chosen = tuple(f for f in FEATURES if f.word.leaf == leaf and subleaf in (None, f.word.subleaf))
    if not chosen:
        leaves = dict.fromkeys(f"{word.leaf:#x}" for word in features.WORDS)
        advice = f"leaves with features are {', '.join(leaves)}"
        raise BadInput(f"--leaf {text}", "no feature that pyhv knows is there", advice)
    return chosen


def _list(chosen: tuple[Feature, ...]) -> None:
    width = max(len(feature.name) for feature in chosen)
    word = None
    for feature in chosen:
        if feature.word != word:
            print("" if word is None else "\n", output.word_title(feature.word), sep="")
            word = feature.word
        print(f"  {feature.bit:>2}  {feature.name:<{width}}  {feature.vendor:<5}  {feature.title}")


def _show(feature: Feature, as_json: bool) -> None:
    required_by = sorted(f.name for f in FEATURES if feature.name in f.requires)
    shown_by = _profiles_showing(feature)
    here, why_unknown = _on_this_host(feature)
    if as_json:
        numbers = {number.name: number.title for number in _numbers(feature)}
        more = {"required_by": required_by, "profiles": shown_by, "host": here, "host_error": why_unknown}
        output.print_json(_to_json(feature) | more | {"numbers": numbers})
        return
    rows = [
        ("bit", f"{output.word_title(feature.word)}, bit {feature.bit} (mask 0x{feature.mask:08x})"),
        ("names", ", ".join(_names(feature))),
        ("vendor", {"any": "Intel and AMD", "intel": "Intel", "amd": "AMD"}[feature.vendor]),
        ("sense", _SENSE[feature.sense]),
        ("requires", ", ".join(feature.requires)),
        ("required by", ", ".join(required_by)),
        ("XSAVE state", ", ".join(f"{n} ({features.XSAVE_COMPONENTS[n].name})" for n in feature.xsave)),
        ("numbers", ", ".join(f"{number.name} ({number.title})" for number in _numbers(feature))),
        ("repeats", feature.mirrors),
        ("KVM", _KVM[feature.kvm]),
        ("profiles", _BARRED.get(feature.barred) or _profile_words(feature, shown_by)),
        ("this host", why_unknown or _host_words(here)),
    ]
    print(f"{feature.name}: {feature.title}\n")
    output.print_rows([(title, text) for title, text in rows if text])


def _numbers(feature: Feature) -> list[Number]:
    """The numbers that a guest is shown with the feature."""
    return [number for number in features.NUMBERS if number.needs == feature.name]


def _names(feature: Feature) -> list[str]:
    """Every name of the feature, with who calls it that."""
    names: dict[str, list[str]] = {}
    for project in ("linux", "qemu", "libvirt"):
        if name := getattr(feature, project):
            names.setdefault(name, []).append(project)
    for alias in feature.aliases:
        names.setdefault(alias, [])
    return [f"{name} ({', '.join(projects)})" if projects else name for name, projects in names.items()]


def _profiles_showing(feature: Feature) -> dict[str, list[str]]:
    """Built-in profile -> the vendors for which it shows the feature."""
    vendors = [vendor for vendor in ("intel", "amd") if feature.vendor in ("any", vendor)]
    return {
        name: [vendor for vendor in vendors if feature.name in profiles.load(name).allowed(vendor)]
        for name in profiles.names()
    }


def _profile_words(feature: Feature, shown_by: dict[str, list[str]]) -> str:
    if feature.topology:
        return "no profile's to decide: it follows from the number of vCPUs"
    if feature.dynamic:
        return "no profile's to decide: it follows what the guest has switched on"
    if feature.mirrors:
        return f"those that show {feature.mirrors}"
    both = ["intel", "amd"] if feature.vendor == "any" else [feature.vendor]
    parts = [
        name if vendors == both else f"{name} (on {vendors[0]} only)" for name, vendors in shown_by.items() if vendors
    ]
    return f"shown by {', '.join(parts)}" if parts else "shown by none of the built-in ones"


def _on_this_host(feature: Feature) -> tuple[dict[str, bool] | None, str]:
    """Whether the processor has the feature and KVM offers it; or None and why that is not known."""
    from pyhv.cli import host

    try:
        native, offered = host.native_table(), host.describe().table
    except (ImportError, BadInput) as error:
        return None, f"not known: {error}"
    return {"processor": native.has(feature), "kvm": offered.has(feature)}, ""


def _host_words(here: dict[str, bool] | None) -> str:
    if here is None:
        return ""
    return {
        (True, True): "the processor has it, and KVM offers it to guests",
        (True, False): "the processor has it; KVM does not offer it to guests",
        (False, True): "the processor does not have it; KVM provides it to guests",
        (False, False): "does not have it",
    }[here["processor"], here["kvm"]]


def _to_json(feature: Feature) -> dict[str, Any]:
    fields = feature._asdict()
    word = fields.pop("word")
    return {
        "name": fields.pop("name"),
        "title": fields.pop("title"),
        "leaf": f"{word.leaf:#x}",
        "subleaf": word.subleaf,
        "register": word.register,
    } | fields

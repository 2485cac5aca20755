"""`pyhv host`: what this host is, whether features can be hidden on it, and what it can give to guests."""

from __future__ import annotations

from pyhv.accel.choose import ACCELERATORS
from pyhv.cli import output
from pyhv.cli.options import Command, Option
from pyhv.cpu import dumps, features, policy, profiles
from pyhv.cpu.feature_types import Word
from pyhv.cpu.features import FEATURES
from pyhv.cpu.host import HostDescription, Verdict
from pyhv.cpu.table import EXTENDED, HYPERVISOR, CpuidTable, Registers
from pyhv.errors import NotFaithful

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyhv.cpu.policy import GuestCpu
    from pyhv.cpu.profiles import Profile

_DETAILS = """
The verdict comes from a guest of a few instructions that executes CPUID at both privilege levels; nothing is remembered
from one call to the next.

examples:
  pyhv host                        in words
  pyhv host --accel emulator       what the software accelerator offers
  pyhv host --profile hyperv-r2    what becomes of a guest in compatibility mode here
  pyhv host --json > a.json        a description for other hosts: pyhv diff a.json host
"""

COMMAND = Command(
    "host",
    "Show what this host is and can do.",
    (
        Option("--accel", "what runs guests (default: auto, kvm if it is there)", default="auto", choices=ACCELERATORS),
        Option("--profile", "add what a guest with this profile gets here", "P"),
        Option("--json", "print the host's description, one JSON object"),
    ),
    _DETAILS,
)

_NAME_LEAVES = (0x80000002, 0x80000003, 0x80000004)
_LEVELS = {0: "CPL 0, kernels", 3: "CPL 3, programs"}


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    profile = None if given.profile is None else profiles.load(given.profile)
    host = describe(probed=True, accel=given.accel)
    if given.json:
        value = host.to_json()
        if profile is not None:
            value["guest"] = _guest_to_json(policy.guest_table(host, profile, policy.Topology(1)))
        output.print_json(value)
        return 0
    _print_host(host)
    if profile is not None:
        print()
        _print_guest(policy.guest_table(host, profile, policy.Topology(1)), profile, given.accel)
    return 0


def describe(probed: bool = False, accel: str = "auto") -> HostDescription:
    """This host, on request with the probe's verdict. Raises NotAvailable without a usable accelerator, HostError."""
    from pyhv.accel import choose

    accelerator = choose.open_accelerator(accel)
    host = accelerator.describe()
    if probed:
        from pyhv.accel import probe

        host = host._replace(verdict=probe.verdict(accelerator))
    return host


def native_table() -> CpuidTable:
    """CPUID as the processor that runs this program answers it: vendor, version, name and every feature word."""
    from pyhv._native import cpuid

    def ask(leaf: int, subleaf: int) -> Registers:
        return Registers(*cpuid(leaf, subleaf))

    entries = {(leaf, 0): ask(leaf, 0) for leaf in (0, EXTENDED)}
    if not EXTENDED <= entries[EXTENDED, 0].eax <= EXTENDED + 0xFFFF:  # there are no extended leaves
        del entries[EXTENDED, 0]
    keys = {(word.leaf, word.subleaf) for word in features.WORDS} | {(leaf, 0) for leaf in _NAME_LEAVES}
    for leaf, subleaf in keys:
        # What lies in KVM's own range describes a hypervisor below us, not the processor.
        if not HYPERVISOR <= leaf < EXTENDED and dumps.in_range(entries, leaf):
            entries[leaf, subleaf] = ask(leaf, subleaf)
    return CpuidTable(entries)


# ----------------------------------------------------------------------------------------------------- in words


def _print_host(host: HostDescription) -> None:
    from pyhv.accel import choose

    native = native_table()
    family, model, stepping = native.signature
    version = f"{native.vendor}, family {family}, model {model}, stepping {stepping}"
    rate = f"{host.tsc_khz / 1000:.1f} MHz" if host.tsc_khz else "of unknown rate"
    rows = [
        ("processor", f"{native.brand or 'without a name'} ({version})"),
        ("kernel", host.kernel),
        ("accelerator", f"{host.accelerator}, {_vcpus(choose.open_accelerator(host.accelerator).max_vcpus)} in a VM"),
        ("TSC", f"{rate}; a guest can {'have another rate' if host.tsc_scaling else 'have no other rate'}"),
        ("addresses", f"{host.physical_bits} bits physical, {host.linear_bits} bits linear"),
    ]
    if host.xsave:
        names = [f"{_component(number)} {area.size}" for number, area in host.xsave.items()]
        rows.append(("XSAVE state", f"{', '.join(names)} bytes"))
    output.print_rows(rows)
    assert host.verdict is not None
    print("\nhiding features")
    _print_verdict(host.verdict)
    print("\nways to intercept CPUID")
    if host.accelerator == "emulator":
        output.print_rows([("  emulator", "every profile and every guest, at every privilege level")])
    else:
        _print_ways(host.verdict)
    offered = [f for f in FEATURES if host.table.has(f) and not f.mirrors]
    print(f"\nfeatures that {host.accelerator} offers to guests: {len(offered)}")
    for word in features.WORDS:
        if names := [f.name for f in offered if f.word == word]:
            print(f"  {output.word_title(word)}")
            output.print_names(names, "    ")
    withheld = [f.name for f in FEATURES if native.has(f) and not host.table.has(f) and not (f.mirrors or f.dynamic)]
    if withheld:
        print(f"\nfeatures of the processor that {host.accelerator} does not offer: {len(withheld)}")
        output.print_names(withheld)


def _vcpus(most: int) -> str:
    return "one vCPU" if most == 1 else f"at most {most} vCPUs"


def _component(number: int) -> str:
    known = features.XSAVE_COMPONENTS.get(number)
    return known.name if known else f"component {number}"


def _print_verdict(verdict: Verdict) -> None:
    if verdict.faithful:
        print("  Faithful: guests see what their CPUID table says and nothing else, at CPL 0 and at CPL 3.")
        return
    print("  Not faithful: guests see features that their CPUID table hides.")
    for cpl, title in _LEVELS.items():
        names = leaking(verdict.leaks.get(cpl, {}))
        if cpl in verdict.ignored:
            print(f"  {title}: the table is ignored, the processor itself answers. {len(names)} features show:")
        elif names:
            print(f"  {title}: {len(names)} features show whatever the table says:")
        else:
            print(f"  {title}: hiding works.")
            continue
        output.print_names(names, "    ")


def leaking(words: Mapping[Word, int]) -> list[str]:
    """The names of the features in what a verdict says of one privilege level."""
    return [f.name for word, mask in words.items() for f in features.WORDS[word] if mask & f.mask and not f.mirrors]


def _print_ways(verdict: Verdict) -> None:
    sites = (
        "With breakpoints, at full speed in between, for images that declare their CPUID instructions; else by "
        "stepping: slow, and exact only for guests that take no interrupts and no exceptions"
    )
    if verdict.faithful:
        kernel = "every profile and every guest; costs nothing"
        trap = f"every profile. {sites}"
        auto = "kernel"
    else:
        kernel = "profile host only, which hides nothing; others are refused, with a list of what they cannot hide here"
        trap = f"every profile, for what runs at CPL 0; at CPL 3 it does not work here. {sites}"
        auto = (
            "kernel for profile host and an image that was written for pyhv. Else the emulator, if it is installed and "
            "the guest has one vCPU; else kernel for profile host; else trap, for an image that declares its CPUID "
            "instructions and stays at CPL 0; others are refused, with a list of choices"
        )
    output.print_rows([("  kernel", kernel), ("  trap", trap), ("  auto", auto)])


def _print_guest(guest: GuestCpu, profile: Profile, accel: str) -> None:
    print(f"a guest with profile {guest.profile} on this host")
    print(f"  {_choice_words(profile, accel)}")
    print_hidden(guest)


def _choice_words(profile: Profile, accel: str) -> str:
    """What --intercept auto would do for an image that declares its CPUID instructions, and for one that does not."""
    from pyhv.accel import choose

    def make(host: HostDescription) -> GuestCpu:
        return policy.guest_table(host, profile, policy.Topology(1))

    words = []
    for facts in (
        choose.GuestFacts("an image that declares its CPUID instructions", (1,), False),
        choose.GuestFacts("an image that does not", (), True),
    ):
        try:
            way = choose.decide(make, facts, 1, accel).choice.intercept
        except NotFaithful:
            way = "refused"
        words.append(f"{facts.name}: {way}")
    return "; ".join(words)


def print_hidden(guest: GuestCpu) -> None:
    """Prints what the guest does not see of what its host offers, and why."""
    if not guest.hidden:
        print("  hides nothing that this host offers")
    by_reason: dict[str, list[str]] = {}
    for hidden in guest.hidden:
        by_reason.setdefault(hidden.reason, []).append(hidden.name)
    for reason, names in by_reason.items():
        print(f"  hidden ({reason}): {len(names)}")
        output.print_names(names, "    ")
    if guest.lacking:
        print(f"  listed, but not offered by this host: {len(guest.lacking)}")
        output.print_names(guest.lacking, "    ")
    for what, before, after in guest.levelled:
        digits = "#x" if what.endswith("leaf") else "d"
        print(f"  {what}: {after:{digits}} instead of {before:{digits}}")


def _guest_to_json(guest: GuestCpu) -> dict[str, object]:
    return {
        "profile": guest.profile,
        "cpuid": guest.table.to_json(),
        "features": sorted(guest.visible),
        "hidden": {hidden.name: hidden.reason for hidden in guest.hidden},
        "lacking": list(guest.lacking),
        "levelled": {row.what: {"host": row.host, "guest": row.guest} for row in guest.levelled},
    }

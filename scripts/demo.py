"""The main job, shown: one guest reads CPUID without and with processor compatibility mode."""

from __future__ import annotations

import sys
import textwrap

import pyhv
from pyhv.cpu import dumps, features

# What the mode's description promises to hide (README, "What compatibility mode hides").
PUBLISHED = {
    "intel": ("ssse3", "sse4_1", "sse4_2", "popcnt", "misalignsse", "xsave", "avx"),
    "amd": ("ssse3", "sse4_1", "sse4a", "xop", "popcnt", "abm", "misalignsse", "3dnow", "3dnowext"),
}


def read_features(compat: bool) -> tuple[set[str], str, str]:
    """What the guest `cpuid` saw: feature names, vendor, and how its CPUID was intercepted."""
    with pyhv.Machine("cpuid", compat=compat) as machine:
        result = machine.run(timeout=30)
        if result.cause != "guest-exit" or result.status != 0:
            raise SystemExit(f"demo: the guest ended with {result.cause}, status {result.status}: {result.message}")
        if machine.choice.note:
            print(f"(pyhv: {machine.choice.note})\n")
        table = dumps.parse(result.console.decode(), "the guest's output")
        # Mirrors repeat a bit of leaf 1 in leaf 0x80000001 (AMD): once is enough for a reader.
        names = {name for name in table.features() if not features.find(name).mirrors}
        return names, table.lineage, machine.choice.intercept


def show(title: str, names: set[str]) -> None:
    print(f"{title} ({len(names)}):")
    print(textwrap.fill(" ".join(sorted(names)), 100, initial_indent="    ", subsequent_indent="    "), end="\n\n")


def main() -> None:
    print("pyhv run cpuid             the guest executes CPUID and prints what it reads\n")
    plain, vendor, _ = read_features(compat=False)
    show("Features that the guest sees", plain)
    print("pyhv run cpuid --compat    the same guest in processor compatibility mode\n")
    compat, vendor, intercept = read_features(compat=True)
    show(f"Features that the guest sees, intercepted by {intercept}", compat)
    show("Hidden", plain - compat)
    print(f"The published list for {vendor}:")
    leaks = 0
    for name in PUBLISHED[vendor]:
        state = (
            "VISIBLE" if name in compat else "hidden" if name in plain else "hidden (this host does not show it anyway)"
        )
        leaks += name in compat
        print(f"    {features.find(name).title:40} {name:12} {state}")
    if leaks:
        sys.exit(f"demo: {leaks} features of the published list are visible")


try:
    main()
except pyhv.PyhvError as error:
    sys.exit(f"demo: {error}")

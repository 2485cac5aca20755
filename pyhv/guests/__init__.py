"""The guests that come with pyhv: small ELF64 images that prove one thing each. guest_images/ has their sources."""

from __future__ import annotations

import os

from pyhv.errors import BadInput

# Name -> what it proves, in a line. The sources' own headers say more.
_GUESTS = {
    "acpi": "reads the ACPI tables and switches the machine off by what they say",
    "cpuid": "prints every CPUID leaf and subleaf as `cpuid -r` does; with `cpl3` as CPL 3 reads them",
    "dispatch": "chooses its code path by CPUID and checks that the result is that of plain code",
    "faults": "ends or misbehaves in the way that its command line names",
    "hello": "says hello, echoes its command line, ends with status 0",
    "instructions": "executes an instruction of each set that compatibility mode hides, and prints which run",
    "msrs": "writes every MSR that lets itself be written, and looks whether each keeps what it was given",
    "multiboot": "a multiboot kernel: prints its memory map, modules, command line and number of vCPUs",
    "pit": "sleeps with interrupts off and is woken by NMIs of the PC's timer, or counts its ticks",
    "pvh": "a PVH kernel: prints its memory map, modules and command line",
    "refuse": "demands SSE4.2; without it it ends with status 42",
    "spin": "loops for ever without an exit",
    "ticker": "stamps all memory, round after round, and ends when memory, CPUID or the TSC is not what it was",
    "timer": "arms the local APIC's timer, waits for its interrupt, and ends with status 0",
}


def names() -> list[str]:
    """The names of the bundled guests, sorted."""
    return sorted(_GUESTS)


def describe(name: str) -> str:
    """What the guest proves, in one line. BadInput: there is no such guest."""
    return _GUESTS[_known(name)]


def path(name: str) -> str:
    """The file of a bundled guest's image. BadInput: there is no such guest, or its image has not been built."""
    image = f"{__path__[0]}/{_known(name)}.elf"
    if not os.access(image, os.F_OK):
        raise BadInput(name, "the image of this bundled guest has not been built", "run guest_images/build.py")
    return image


def _known(name: str) -> str:
    if name in _GUESTS:
        return name
    import difflib

    near = difflib.get_close_matches(name, _GUESTS, n=1)
    advice = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names())}"
    raise BadInput(name, "no bundled guest has this name", advice)

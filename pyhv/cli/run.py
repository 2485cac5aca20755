"""`pyhv run IMAGE`: boots a guest, connects its console to stdin and stdout, and ends with its exit status."""

from __future__ import annotations

import functools
import time
from types import SimpleNamespace

from pyhv import outcome
from pyhv.accel.choose import ACCELERATORS, INTERCEPTS, open_accelerator
from pyhv.boot.image import KINDS
from pyhv.cli import ending, options, output
from pyhv.cli.options import Command, Option
from pyhv.cli.say import complain
from pyhv.cli.terminal import HELP, Console, Signals
from pyhv.errors import PyhvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyhv.machine import Machine

_DETAILS = f"""
IMAGE is a file (./NAME always is): a Linux kernel (bzImage, or vmlinux by PVH), a multiboot or PVH kernel, an ELF64
image, or with --boot flat code for 1 MiB; guest_images/README.md tells the state that each starts in. Or it is a
bundled guest:
{{guests}}

The guest's console (a serial port) is stdin and stdout. If stdin is a terminal, each key goes to the guest, and
  {HELP}

examples:
  pyhv run hello --append "some words"      boot a guest with a command line
  pyhv run vmlinuz --initrd F --append "console=ttyS0" --cpus 4 --mem 512M
  pyhv run cpuid --compat                   what a guest sees in compatibility mode
  pyhv run cpuid --compat --json | jq -r '.features[]'
  pyhv run ticker --name t --detach; pyhv console t; pyhv stop t

exit status:
{{statuses}}
"""


def _details() -> str:
    """What --help says below the options."""
    from pyhv import guests

    statuses = "\n".join(
        f"  {'0 to 255' if cause == 'guest-exit' else status!s:<9} {cause:<15} {meaning}"
        for cause, (status, meaning) in outcome.CAUSES.items()
    )
    bundled = "\n".join(f"  {name:<14}{guests.describe(name)}" for name in guests.names())
    return _DETAILS.format(guests=bundled, statuses=statuses)


OVERCOMMIT_OPTION = Option("--overcommit", "give the guest more memory than the host has free; it may die of it later")

# What describes a machine and its run; machine_arguments() is the other half.
MACHINE_OPTIONS = (
    Option("IMAGE", "a bundled guest or a file"),
    Option(
        "--compat",
        "processor compatibility mode (--cpu hyperv-r2): show only what every host of this vendor has. Hidden is not "
        "blocked: SSSE3, SSE4 and POPCNT still execute. Mitigation bits are hidden too: the guest cannot mitigate",
    ),
    Option("--cpu", "a profile, by name or file (default: host; see pyhv profiles)", "PROFILE"),
    Option("--cpus", "number of vCPUs (default: 1)", "N", 1, options.number),
    Option("--mem", "memory, such as 512M or 2G (default: 64M)", "SIZE", "64M"),
    OVERCOMMIT_OPTION,
    Option(
        "--accel",
        "what runs the guest: kvm; emulator, which is slower, hides everywhere and has one vCPU; or what suits "
        "(default: auto; see pyhv host)",
        default="auto",
        choices=ACCELERATORS,
    ),
    Option(
        "--intercept",
        "who answers CPUID: the kernel, which cannot hide features on every host; trap, which is pyhv; or what suits "
        "(default: auto; see pyhv host)",
        default="auto",
        choices=INTERCEPTS,
    ),
    Option("--append", "the guest's command line", "ARGS", ""),
    Option("--initrd", "a Linux or PVH kernel's initial RAM disk", "FILE"),
    Option(
        "--module",
        "a file for a multiboot kernel, with a string for it; may be given several times",
        "'FILE ARGS'",
        convert=options.not_empty,
        repeated=True,
    ),
    Option(
        "--boot",
        "the boot protocol (default: as IMAGE is recognised; a flat binary must be asked for)",
        default="",
        choices=tuple(KINDS),
    ),
    Option("--timeout", "end the VM after S seconds, with status 124", "S", convert=options.seconds),
)
MACHINE_EITHER = ("--compat", "--cpu")

PIN_OPTION = Option(
    "--pin", "bind vCPU 0 to the first of these host processors, and so on: 0,2,4-7", "LIST", (), options.processors
)



def _causes(text: str) -> tuple[str, ...]:
    """Option.convert: causes of an end, such as halted,reset."""
    causes = tuple(text.split(","))
    outcome.check_fail_on(causes)
    return causes


FAIL_ON_OPTION = Option(
    "--fail-on",
    "count these causes of an end as failures, with status 119 where it would be 0: halted,reset for a kernel that "
    "panics so",
    "CAUSES",
    (),
    _causes,
)

QUIET_OPTION = Option("--quiet", "omit the notes on how the guest is run; pyhv status and --json have them")

NAME_OPTIONS = (
    Option("--name", "give the VM a name, by which pyhv ls, status, console, pause, save, stop ... find it", "NAME"),
    Option("--detach", "return once the VM runs, and leave it in the background; needs --name"),
)

COMMAND = Command(
    "run",
    "Boot a guest and end with its exit status.",
    (
        *MACHINE_OPTIONS,
        PIN_OPTION,
        FAIL_ON_OPTION,
        QUIET_OPTION,
        *NAME_OPTIONS,
        Option("--reboot", "start the guest again when it resets itself, instead of ending"),
        Option(
            "--json",
            "capture the console and print one JSON object: cause, status, message, registers, profile, intercept, "
            "note, notes, vcpus, console and console_base64, counters; of a guest that prints CPUID as `cpuid -r` does "
            "(the guest cpuid) also cpuid, the table that it printed, and features, their names in it. With --detach "
            "name and pid",
        ),
    ),
    _details,
    MACHINE_EITHER,
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    if given.name is None and not given.detach:
        try:
            open_accelerator(given.accel).prepare()  # while the kernel works on it, the modules below are imported
        except PyhvError:
            pass  # Machine finds the same, and says it when its turn comes
    from pyhv.machine import Machine

    return run_machine(given, functools.partial(Machine, **machine_arguments(given)))


def machine_arguments(given: SimpleNamespace) -> dict[str, Any]:
    """Machine's arguments for the values of MACHINE_OPTIONS."""
    return {
        "image": given.image,
        "compat": given.compat,
        "cpu": given.cpu,
        "cpus": given.cpus,
        "memory": given.mem,
        "overcommit": given.overcommit,
        "append": given.append,
        "initrd": given.initrd,
        "modules": given.module,
        "boot": given.boot,
        "accel": given.accel,
        "intercept": given.intercept,
    }


def run_machine(given: SimpleNamespace, make: Callable[..., Machine]) -> int:
    """Runs a machine with given.name, detach, timeout and json. make: gets console_in and console_out. Returns the exit
    status; raises what making and running the machine raise."""
    if given.name is not None or given.detach:
        from pyhv.cli import named

        return named.run(given, make)
    deadline = None if given.timeout is None else time.monotonic() + given.timeout
    before = b""  # what was printed before the last reset
    with Console(None if given.json else 1) as console:
        console.fail_on = given.fail_on
        while True:
            with make(console_in=console.input, console_out=console.output) as machine:
                machine.pin(given.pin)
                for note in machine.notes if not given.quiet else ():
                    complain(note)
                with Signals() as signals:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    result = console.run(machine, left, signals)
                complete = result._replace(console=before + result.console)
                description = ending.describe(machine, complete) if given.json else {}
            if result.cause != "reset" or not getattr(given, "reboot", False):  # pyhv run alone has the option
                break
            complain(ending.REBOOTS)
            before += result.console
    ending.tell(result)
    if given.json:
        output.print_json(description)
    return result.status

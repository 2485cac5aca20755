"""`pyhv trace IMAGE`: boots a guest and shows each CPUID that it executes, what it got, and what was kept from it."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import NamedTuple

from pyhv._native import cpuid
from pyhv.accel.data import CpuidRecord
from pyhv.accel.tracepoint import Traced, Tracepoint
from pyhv.arguments import as_options
from pyhv.cli import ending, output, run
from pyhv.cli.options import Command, Option
from pyhv.cli.say import complain
from pyhv.cli.terminal import Console, Signals
from pyhv.cpu import features
from pyhv.cpu.feature_types import Word
from pyhv.cpu.table import REGISTERS
from pyhv.errors import BadInput, NotAvailable
from pyhv.machine import Machine, RunResult

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DETAILS = """
The trace is stdout; the guest's console is stdin, as with pyhv run, and stderr. Of each CPUID there is a line with leaf
and subleaf, vCPU, RIP and privilege level, and where it is new or the answer is another than before

  processor  what the processor of this host answers to it: EAX, EBX, ECX, EDX
  guest      what the guest got
  hidden     the features among what the processor has and the guest did not get

At the end every question, how often it was asked, and all that was hidden.

--via trap         pyhv answers CPUID itself, as with --intercept trap, and shows all that trap reaches
--via tracepoint   the kernel answers, and its tracepoint kvm:kvm_cpuid tells; for root. It knows no privilege levels
--via auto         tracepoint where the kernel would answer this guest in pyhv run, and tracefs can be used; where the
                   emulator would run it, the emulator, which tells of all of them; else trap

With --json every line is one JSON object: its "event" is "cpuid", and of the last one "end".

examples:
  pyhv trace dispatch --compat
  pyhv trace dispatch --compat --json | jq -r 'select(.event == "cpuid") | .hidden[]' | sort -u

exit status: the guest's, as with pyhv run
"""


COMMAND = Command(
    "trace",
    "Boot a guest and show each CPUID that it executes.",
    (
        *run.MACHINE_OPTIONS,
        Option("--via", "who tells of it (default: auto)", default="auto", choices=("auto", "trap", "tracepoint")),
        Option("--json", "print JSON, one object a line"),
    ),
    _DETAILS,
    run.MACHINE_EITHER,
)


class Entry(NamedTuple):
    """One CPUID that the guest executed."""

    vcpu: int | None
    rip: int | None
    cpl: int | None
    leaf: int
    subleaf: int
    hardware: tuple[int, int, int, int]
    """EAX, EBX, ECX, EDX as the processor answers a program of the host."""
    guest: tuple[int, int, int, int]
    """As the guest got them."""
    hidden: tuple[str, ...]
    """Names of the features that the processor has and the guest did not get."""


class Trace:
    """Prints entries as they come, and sums them up. Any thread may add."""

    def __init__(self, as_json: bool, lineage: str, vcpus: int) -> None:
        self._as_json = as_json
        self._vcpus = vcpus
        self._vendors = ("any", lineage)
        self._lock = threading.Lock()
        self._last: dict[tuple[int, int], Entry] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._changed: set[tuple[int, int]] = set()

    def add_record(self, record: CpuidRecord) -> None:
        """An entry that trap made."""
        self.add(Entry(*record, self._hidden(record.leaf, record.subleaf, record.hardware, record.guest)))

    def add_traced(self, traced: Traced) -> None:
        """An entry that the tracepoint made; what the hardware has is asked here and now."""
        hardware = cpuid(traced.leaf, traced.subleaf)
        hidden = self._hidden(traced.leaf, traced.subleaf, hardware, traced.guest)
        vcpu = traced.vcpu if traced.vcpu is not None else self._vcpu_of(traced.thread)
        self.add(Entry(vcpu, traced.rip, None, traced.leaf, traced.subleaf, hardware, traced.guest, hidden))

    def add(self, entry: Entry) -> None:
        """Prints one entry and counts it."""
        key = entry.leaf, entry.subleaf
        with self._lock:
            last = self._last.get(key)
            self._counts[key] = self._counts.get(key, 0) + 1
            if last is not None and last.guest != entry.guest:
                self._changed.add(key)
            self._last[key] = entry
            if self._as_json:
                import json

                print(json.dumps({"event": "cpuid", **_to_json(entry)}))
            else:
                _print(entry, full=last is None or last.guest != entry.guest)

    def summary(self) -> dict[str, Any]:
        """What was asked how often, and what was hidden."""
        hidden = {name: None for key in sorted(self._last) for name in self._last[key].hidden}
        return {
            "executed": sum(self._counts.values()),
            "questions": [
                {
                    "leaf": f"{leaf:#x}",
                    "subleaf": subleaf,
                    "count": self._counts[leaf, subleaf],
                    "answer_changed": (leaf, subleaf) in self._changed,
                    "hidden": list(self._last[leaf, subleaf].hidden),
                }
                for leaf, subleaf in sorted(self._counts)
            ],
            "hidden": list(hidden),
        }

    def _hidden(
        self, leaf: int, subleaf: int, hardware: tuple[int, int, int, int], guest: tuple[int, int, int, int]
    ) -> tuple[str, ...]:
        """The names of the features that are in the first answer and not in the second."""
        return tuple(
            feature.name
            for register, has, got in zip(REGISTERS, hardware, guest, strict=True)
            for feature in features.WORDS.get(Word(leaf, subleaf, register), ())
            if has & ~got & feature.mask
            and feature.vendor in self._vendors
            and not (feature.dynamic or feature.mirrors)
        )

    def _vcpu_of(self, thread: int) -> int | None:
        """The vCPU that a thread runs: the only one, or by the name that vm.py gives its thread while it lives."""
        if self._vcpus == 1:
            return 0
        for candidate in threading.enumerate():
            if candidate.native_id == thread and candidate.name.startswith("vcpu-"):
                return int(candidate.name.removeprefix("vcpu-"))
        return None


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    if given.via == "trap" and given.intercept == "kernel":
        raise BadInput("--via trap", "cannot be had with --intercept kernel", "leave --intercept away")
    if given.via == "tracepoint" and given.intercept == "trap":
        raise BadInput("--via tracepoint", "cannot be had with --intercept trap", "leave --intercept away")
    with Console(2) as console:
        trace = Trace(given.json, _lineage(), given.cpus)
        result, via, lost = _run(given, console, trace)
    ending.tell(result)
    _finish(given.json, trace, result, via, lost)
    return result.status


def _run(given: SimpleNamespace, console: Console, trace: Trace) -> tuple[RunResult, str, int]:
    """Runs the guest by the way that was asked for. Returns its result, that way, and how many events got lost."""
    arguments = run.machine_arguments(given) | {"console_in": console.input, "console_out": console.output}
    if given.via != "trap" and given.intercept != "trap":
        if given.via == "tracepoint":
            arguments["intercept"] = "kernel"
        with contextlib.ExitStack() as stack:
            machine = stack.enter_context(Machine(**arguments))
            if machine.choice.intercept == "kernel":
                signals = stack.enter_context(Signals())
                try:
                    tracepoint = stack.enter_context(Tracepoint(trace.add_traced, machine.facts.cpuid_sites))
                except NotAvailable as error:
                    if given.via == "tracepoint":
                        raise
                    complain(f"{error}: via trap instead")
                else:
                    result = console.run(machine, given.timeout, signals)
                    tracepoint.close()
                    return result, "tracepoint", tracepoint.lost
    if given.via == "trap" and given.accel == "auto":
        arguments["accel"] = "kvm"
    with Machine(**arguments, on_cpuid=trace.add_record) as machine, Signals() as signals:
        if machine.choice.note:
            complain(*machine.choice.notes)
        return console.run(machine, given.timeout, signals), machine.choice.intercept, 0


def _lineage() -> str:
    """Whose features this machine's processor has."""
    from pyhv.cli import host

    return host.native_table().lineage


# ---------------------------------------------------------------------------------------------------- printing


def _print(entry: Entry, full: bool) -> None:
    name = f"{entry.leaf:#x}.{entry.subleaf:x}"
    vcpu = "?" if entry.vcpu is None else entry.vcpu
    rip = "?" if entry.rip is None else f"{entry.rip:#x}"
    cpl = "?" if entry.cpl is None else entry.cpl
    print(f"{name:<14}vcpu {vcpu}  rip {rip}  cpl {cpl}{'' if full else '  as before'}")
    if full:
        for who, registers in (("processor", entry.hardware), ("guest", entry.guest)):
            print(f"  {who:<12}{' '.join(f'{value:08x}' for value in registers)}")
        if entry.hidden:
            output.print_rows([("  hidden    ", " ".join(entry.hidden))])


def _to_json(entry: Entry) -> dict[str, Any]:
    return {
        "vcpu": entry.vcpu,
        "rip": None if entry.rip is None else f"{entry.rip:#x}",
        "cpl": entry.cpl,
        "leaf": f"{entry.leaf:#x}",
        "subleaf": entry.subleaf,
        "hardware": {name: f"0x{value:08x}" for name, value in zip(REGISTERS, entry.hardware, strict=True)},
        "guest": {name: f"0x{value:08x}" for name, value in zip(REGISTERS, entry.guest, strict=True)},
        "hidden": list(entry.hidden),
    }


def _finish(as_json: bool, trace: Trace, result: RunResult, via: str, lost: int) -> None:
    """Prints the summary."""
    summary = trace.summary()
    if as_json:
        import json

        message = as_options(result.message)
        end = {"event": "end", "cause": result.cause, "status": result.status, "message": message, "via": via}
        print(json.dumps(end | {"lost": lost, "counters": result.counters} | summary))
        return
    print(
        f"\n{summary['executed']} CPUID instructions, {len(summary['questions'])} different questions, seen via {via}"
    )
    for question in summary["questions"]:
        name = f"{question['leaf']}.{question['subleaf']:x}"
        changed = ", the answer changed" if question["answer_changed"] else ""
        count = len(question["hidden"])
        hidden = f", {count} feature{'s' * (count > 1)} hidden" if count else ""
        print(f"  {name:<14}{question['count']:>6}{hidden}{changed}")
    print(f"hidden features: {len(summary['hidden'])}")
    if summary["hidden"]:
        output.print_names(summary["hidden"])
    if lost:
        complain(f"{lost} events are missing: the kernel's trace buffer was full")
    if gaps := result.counters.get("step_gaps", 0):
        complain(f"{gaps} times stepping lost its way (an event in the guest): CPUIDs there are missing")

"""`pyhv check FILE`: would this snapshot run on that host? Neither is touched."""

from __future__ import annotations

import json

from pyhv.accel.choose import ACCELERATORS
from pyhv.arguments import as_options
from pyhv.cli import failure, output
from pyhv.cli.options import Command, Option
from pyhv.cli.say import one_line
from pyhv.cpu import dumps
from pyhv.cpu.host import HostDescription, as_kvm_host
from pyhv.cpu.table import CpuidTable
from pyhv.errors import BadInput, Incompatible, NotFaithful
from pyhv.snapshot import file
from pyhv.state import needs

COMMAND = Command(
    "check",
    "Say whether a saved VM could go on on a host, with every reason why not. Status 0: it could; 1: it could not.",
    (
        Option("FILE", "a snapshot, as pyhv save writes it"),
        Option("--on", "what pyhv host --json wrote there, or a dump of its processor (default: this host)", "HOST"),
        Option("--accel", "what would run it on this host (default: auto)", default="auto", choices=ACCELERATORS),
        Option("--strict-tsc", "another TSC rate is a reason even if the guest was promised none"),
        Option("--json", "print one JSON object: file, on, runs, reasons (kind and text of each), notes"),
    ),
    """
A dump tells only about the processor: MSRs and the TSC's rate are not compared then. Formats are those of pyhv diff.

example:
  pyhv check t.pyhv --on older-host.json
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    where = given.on or "this host"
    with file.open_snapshot(given.file) as snapshot:
        if given.on is None:
            reasons, notes = _here(snapshot, given.accel, given.strict_tsc)
        else:
            reasons, notes = _there(snapshot, given.on, given.strict_tsc)
    if given.json:
        described = [failure.reason_to_json(reason) for reason in reasons]
        output.print_json({"file": given.file, "on": where, "runs": not reasons, "reasons": described, "notes": notes})
        return 1 if reasons else 0
    print(one_line(f"{given.file} {'cannot run' if reasons else 'can run'} on {where}"))
    for line in (*reasons, *notes):
        print(f"  {one_line(str(line))}")
    return 1 if reasons else 0


def _here(snapshot: file.Snapshot, accel: str, strict_tsc: bool) -> tuple[list[object], list[str]]:
    """Reasons and notes of this host, which are those of `pyhv restore`."""
    try:
        decision = needs.decide(needs.facts_of(snapshot.state.machine), snapshot.needs, "this host", strict_tsc, accel)
    except Incompatible as incompatible:
        return list(incompatible.reasons), []
    except NotFaithful as refused:
        return [as_options(f"{refused.problem}; {refused.advice}")], []
    notes = snapshot.needs.notes(decision.host)
    return [], [*notes, *map(as_options, decision.choice.notes)]


def _there(snapshot: file.Snapshot, path: str, strict_tsc: bool) -> tuple[list[object], list[str]]:
    """Reasons and notes of the host that a file describes."""
    host, dump = read_host(path)
    if dump is not None:
        for table in snapshot.tables:
            check_told(dump, table, path)
    notes = snapshot.needs.notes(host)
    if dump is not None:
        notes.append("not compared: MSRs and the TSC's rate, of which a dump does not tell")
    return list(snapshot.needs.reasons_against(host, strict_tsc)), notes


def read_host(path: str) -> tuple[HostDescription, dumps.Dump | None]:
    """The host of a description; or what KVM would make of a dump's processor, and the dump. Raises BadInput."""
    text = dumps.load_text(path)
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(path, f"is no JSON: {error}") from None
        if isinstance(value, dict) and str(value.get("format", "")).startswith("pyhv-host/"):
            return HostDescription.from_json(value, path), None
    dump = dumps.read(text, path)
    return as_kvm_host(dump.table, name=path), dump


def check_told(dump: dumps.Dump, guest: CpuidTable, path: str) -> None:
    """Raises BadInput where the dump does not tell what this guest's XSAVE area depends on."""
    if untold := dumps.untold(dump, guest):
        missing = f"it lacks subleaf {', '.join(map(str, untold))}, on which the guest depends"
        advice = "make the dump again by a program that prints all subleaves, such as cpuid -r"
        raise BadInput(path, f"leaf 0xd is cut off: {missing}", advice)

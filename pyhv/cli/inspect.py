"""`pyhv inspect FILE`: what is inside a snapshot."""

from __future__ import annotations

import os
import time
from typing import Any

from pyhv.cli import output
from pyhv.cli.options import Command, Option
from pyhv.cli.say import one_line
from pyhv.snapshot import file
from pyhv.snapshot.file import Snapshot

COMMAND = Command(
    "inspect",
    "Show what is inside a snapshot: processor, features that the guest saw, memory, registers, sections.",
    (
        Option("FILE", "a snapshot, as pyhv save writes it"),
        Option("--json", "print one JSON object"),
    ),
    """
Everything but the memory is checked on the way; pyhv verify checks that too.

example:
  pyhv inspect t.pyhv --json | jq -r '.features[]'
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    with file.open_snapshot(given.file) as snapshot:
        description = describe(snapshot)
    if given.json:
        output.print_json(description)
    else:
        _print(description)
    return 0


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """What --json prints."""
    state, reader, table = snapshot.state, snapshot.reader, snapshot.tables[0]
    writer, machine = snapshot.writer, state.machine
    return {
        "file": reader.path,
        "bytes": reader.file_size,
        "bytes_on_disk": os.fstat(reader.memory_fd).st_blocks * 512,
        "written": {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(writer.time)),
            "pyhv": writer.pyhv,
            "processor": writer.processor,
            "kernel": writer.kernel,
            "accelerator": writer.accelerator,
        },
        "machine": {
            "uuid": machine.uuid,
            "image": machine.image,
            "command_line": machine.command_line,
            "profile": machine.profile,
            "memory": machine.memory,
            "vcpus": len(state.vcpus),
        },
        "clock_ns": state.platform.clock,
        "tsc_khz": state.platform.tsc_khz,
        "vendor": table.vendor,
        "features": sorted(table.features()),
        "cpuid": table.to_json(),
        "registers": [{n: f"{value:#x}" for n, value in vcpu.regs._asdict().items()} for vcpu in state.vcpus],
        "devices": {device.name: len(device.state) for device in state.devices},
        "sections": [
            {"name": s.title, "mandatory": s.mandatory, "offset": s.offset, "length": s.length} for s in reader.sections
        ],
    }


def _print(description: dict[str, Any]) -> None:
    written, machine = description["written"], description["machine"]
    rows = [
        ("file", f"{description['file']}, {output.size(description['bytes'])}"),
        ("on disk", output.size(description["bytes_on_disk"])),
        ("written", f"{written['time']} by pyhv {written['pyhv']}, {written['accelerator']}"),
        ("on", f"{written['processor']}, Linux {written['kernel']}"),
        ("uuid", machine["uuid"]),
        ("image", machine["image"] + (f" {machine['command_line']}" if machine["command_line"] else "")),
        ("profile", machine["profile"]),
        ("memory", output.size(machine["memory"])),
        ("vCPUs", str(machine["vcpus"])),
        ("clock", f"{description['clock_ns'] / 1e9:.3f} s; TSC {description['tsc_khz'] / 1000:.1f} MHz"),
        ("devices", ", ".join(description["devices"])),
    ]
    for name, value in rows:
        print(f"{name:<10}{one_line(value)}")
    print(f"\nfeatures that the guest saw ({description['vendor']}): {len(description['features'])}")
    output.print_names(description["features"])
    for number, registers in enumerate(description["registers"]):
        print(f"\nvCPU {number}")
        pairs = [f"{name:>6} {int(value, 16):016x}" for name, value in registers.items()]
        for i in range(0, len(pairs), 4):
            print("  ".join(pairs[i : i + 4]))
    print("\nsections")
    for section in description["sections"]:
        print(f"  {section['name']:<14}{section['length']:>14} bytes at {section['offset']:#x}")

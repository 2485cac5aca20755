"""pyhv-lab bench: live migration by pyhv and by QEMU, between the same two hosts, over the same network.

Both move an idle guest of the same size with the same amount of noise in its memory; they take turns. QEMU is the one
that this machine has, the emulator of the AMD hosts: with its libraries and firmware it is copied into both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from . import code, image, kinds
from .errors import LabError
from .host import Host
from .lab import Lab
from .node import Node, files

MEMORY_MIB, USED_MIB = 128, 96
FIRMWARE = ("bios-microvm.bin", "qboot.rom", "kvmvapic.bin")
SHARE = Path("/usr/share/qemu")
INSIDE = "/tmp/qemu"
PORT = 7200


class Sample(NamedTuple):
    """One migration. Seconds."""

    total: float
    """To when the source knew that the guest runs at the target."""
    downtime: float
    """From when it stood to then."""
    own: float | None = None
    """What QEMU itself says of the downtime: when all was sent."""


def qemu_files() -> dict[str, Path | bytes]:
    """QEMU, for Host.put() under INSIDE."""
    program = shutil.which("qemu-system-x86_64")
    assert program is not None, "there is no AMD host without it"
    found: dict[str, Path | bytes] = {"bin/qemu-system-x86_64": Path(program)}
    for path in image._libraries(Path(program)):
        found[f"lib/{path.name}"] = path
    for name in FIRMWARE:
        for place in (SHARE, Path("/usr/share/seabios"), Path("/usr/share/qemu-efi")):
            if (place / name).exists():
                found[f"share/{name}"] = place / name
    return found


def by_pyhv(nodes: list[Node], repeat: int) -> Sample:
    source, target = nodes
    source.ask("idle", memory=MEMORY_MIB << 20, used=USED_MIB << 20)
    port = PORT + repeat
    target.ask("listen", uri=f"tcp://0.0.0.0:{port}")
    target.order("receive", lines=0)
    summary = source.ask("migrate", uri=f"tcp://{target.host.address}:{port}", limits={})["summary"]
    target.answer()
    for node in nodes:
        node.ask("end")
    return Sample(summary["total_time"], summary["downtime"])


def by_qemu(hosts: list[Host], repeat: int) -> Sample:
    source, target = hosts
    script = ["python3", f"{INSIDE}/peer_qemu.py", str(MEMORY_MIB), str(PORT + 100 + 2 * repeat)]
    waiting = target.start(script, stdin=True)
    leaving = source.start([*script, target.address, f"{INSIDE}/noise"], stdin=True)
    both = (waiting, leaving)
    for command in both:
        command.wait_for(b"\n")
        command.send(b"\n")
    leaving.wait_for(b"total", 120)
    for command in both:
        command.send(b"\n")
    results = [command.wait(60) for command in both]
    for host, result in zip((target, source), results, strict=True):
        if result.status:
            raise LabError(f"{host.name}: QEMU's migration failed: {result.stderr.decode(errors='replace')}")
    facts: dict[str, Any] = json.loads(results[1].text.splitlines()[1])
    return Sample(facts["total"], facts["downtime"], facts["qemu"]["downtime"] / 1e3)


def run(names: list[str], repeat: int, say: image.Say) -> str:
    """Measures, and gives the table. names: of two kinds of AMD hosts. Raises LabError."""
    if len(names) != 2 or any(kinds.find(name).vendor != "amd" for name in names):
        raise LabError("bench: needs two kinds of AMD hosts")
    samples: dict[str, list[Sample]] = {"pyhv": [], "QEMU": []}
    with Lab(say) as lab:
        hosts = lab.start(*names, connected=True)
        needed: Mapping[str, Path | bytes] = qemu_files()
        scripts = {"peer_qemu.py": code.HERE / "inside" / "peer_qemu.py", "qmp.py": code.HERE / "qmp.py"}
        nodes = []
        for number, host in enumerate(hosts):
            host.put({**needed, **scripts}, INSIDE)
            nodes.append(Node(host, number, files(say)))
        hosts[0].run(["dd", "if=/dev/urandom", f"of={INSIDE}/noise", "bs=1M", f"count={USED_MIB}"], check=True)
        for number in range(repeat):
            for who in ("pyhv", "QEMU") if number % 2 == 0 else ("QEMU", "pyhv"):
                sample = by_pyhv(nodes, number) if who == "pyhv" else by_qemu(hosts, number)
                samples[who].append(sample)
                say(f"{who}: {sample.total:.2f} s, of which the guest stood {sample.downtime * 1e3:.0f} ms")
    return table(names, samples)


def table(names: list[str], samples: Mapping[str, list[Sample]]) -> str:
    """Medians, and in brackets the least and the greatest."""

    def spread(values: list[float], unit: str) -> str:
        return f"{median(values):.3g} {unit} ({min(values):.3g}..{max(values):.3g})"

    count = len(samples["pyhv"])
    lines = [f"Live migration of {MEMORY_MIB} MiB, {USED_MIB} used, {names[0]} to {names[1]}, {count} times"]
    for who, taken in samples.items():
        total = spread([sample.total for sample in taken], "s")
        line = f"{who:5} total {total}, downtime {spread([s.downtime * 1e3 for s in taken], 'ms')}"
        if own := [sample.own * 1e3 for sample in taken if sample.own is not None]:
            line += f"; until it had sent all {spread(own, 'ms')}"
        lines.append(line)
    return "\n".join(lines)

"""pyhv-lab bench: pyhv and QEMU side by side on the lab's AMD hosts, where both have the real KVM.

Each row is measured by both, taking turns; who goes first changes from pair to pair. QEMU is the one that this machine
has, the emulator of the AMD hosts: with its libraries and firmware it is copied into them. It runs its microvm.

The boot rows: the same kernel (vmlinux, entered by PVH, or the bzImage, which the guest unpacks), initramfs, command
line, memory and number of vCPUs; from the start of the program in the host to the first line of the guest's first
process on the console. A microvm on KVM has no RTC unless it is asked for, and Linux looks for one for seconds: the
rows called plain leave it so, in the others QEMU's has one, as pyhv's PC always has.

The migrations: from the first host to the second over their network, neither with a limit on the bandwidth, both with
50 ms as the downtime to aim at. The same guest: one without a kernel and with noise in its memory, or Linux in its user
space, whose first process sleeps or writes to its memory. Total: to when the source knows that the guest runs at the
target. Downtime: from when it stood at the source to then.
"""

from __future__ import annotations

import json
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from . import cache, code, image, kinds, linux
from .errors import LabError
from .lab import Lab
from .node import Node, files

FIRMWARE = ("bios-microvm.bin", "qboot.rom", "kvmvapic.bin", "pvh.bin", "linuxboot_dma.bin")
SHARE = Path("/usr/share/qemu")
INSIDE = "/tmp/qemu"
PROGRAM = [f"{INSIDE}/bin/qemu-system-x86_64", "-L", f"{INSIDE}/share"]
PORT = 7200

IDLE_MIB, NOISE_MIB = 128, 96
BOOT_MIB = 256
MOVED_MIB = 128
#: noxsave: QEMU, as the host's processor, does not intercept a nested guest's XSETBV (README.md).
LINE = "console=ttyS0 quiet panic=-1 noxsave"
UP = b"bench: up"
#: Pages a second that the writer writes to.
WRITES = 800

#: Writes to nearly all of a host's memory that is free, so that nobody pays for what others have left or have not done:
#: memory that was never touched is copied page by page from the snapshot when it is, and where a guest before had its
#: code the emulator first drops, store by store, what it has translated: half a second of a boot.
TOUCH = """
kib = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable:"))
bytearray(b"x") * (kib * 1024 * 9 // 10)
"""

Facts = dict[str, float]
"""What was measured at one time: seconds by name."""


class Row(NamedTuple):
    title: str
    names: tuple[str, ...]
    """What is measured: keys of Facts."""
    goal: float
    """What the ratio pyhv / QEMU is to be at most."""
    pyhv: Callable[[Bench], Facts]
    qemu: Callable[[Bench], Facts]


class Bench:
    """The hosts, with all in them that is needed. two: whether there is a second one, that guests are moved to."""

    def __init__(self, lab: Lab, names: list[str], two: bool, say: image.Say) -> None:
        self.hosts = lab.start(*names, connected=True) if two else lab.start(names[-1])
        self._port = PORT
        guest = {name: linux.guest(say) / name for name in ("vmlinux", "vmlinuz")} | {"initrd": initrd(say) / "initrd"}
        scripts = {"peer_qemu.py": code.HERE / "inside" / "peer_qemu.py", "qmp.py": code.HERE / "qmp.py"}
        needed: Mapping[str, Path | bytes] = {**qemu_files(), **scripts, **guest}
        for host in self.hosts:
            host.put(needed, INSIDE)
            host.put(files(say), code.INSIDE)
        if two:
            noise = ["dd", "if=/dev/urandom", f"of={INSIDE}/noise", "bs=1M", f"count={NOISE_MIB}"]
            self.hosts[0].run(noise, check=True)

    def port(self) -> int:
        """A new one, and the next one is free too."""
        self._port += 2
        return self._port

    # ------------------------------------------------------------------------------------------------- boot

    def time_boot(self, command: list[str], env: Mapping[str, str]) -> Facts:
        self.hosts[-1].run(["python3", "-c", TOUCH], check=True)
        begin = time.monotonic()
        running = self.hosts[-1].start(command, env=env)
        running.wait_for(UP, 120)
        taken = time.monotonic() - begin
        running.kill()
        running.wait()
        return {"time": taken}

    def boot_pyhv(self, kernel: str, cpus: int) -> Facts:
        command = ["pyhv", "run", f"{INSIDE}/{kernel}", "--initrd", f"{INSIDE}/initrd", "--append", LINE]
        return self.time_boot([*command, "--mem", f"{BOOT_MIB}M", "--cpus", str(cpus)], code.ENVIRONMENT)

    def boot_qemu(self, machine: str, kernel: str, cpus: int) -> Facts:
        command = [*PROGRAM, "-M", machine, "-accel", "kvm", "-cpu", "host", "-m", str(BOOT_MIB), "-smp"]
        command += [str(cpus), "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-kernel"]
        command += [f"{INSIDE}/{kernel}", "-initrd", f"{INSIDE}/initrd", "-append", LINE]
        return self.time_boot(command, {"LD_LIBRARY_PATH": f"{INSIDE}/lib"})

    # -------------------------------------------------------------------------------------------- migration

    def move_pyhv(self, append: str | None) -> Facts:
        """append: of Linux' command line; None: the guest without a kernel."""
        # New processes each time, as QEMU's are: much is slower when it is done first.
        nodes = source, target = [Node(host, number, {}) for number, host in enumerate(self.hosts)]
        if append is None:
            source.ask("idle", memory=IDLE_MIB << 20, used=NOISE_MIB << 20)
        else:
            source.ask(
                "boot", image=f"{INSIDE}/vmlinux", initrd=f"{INSIDE}/initrd", append=append, memory=MOVED_MIB << 20,
                until=UP.decode(),
            )  # fmt: skip
        port = self.port()
        target.ask("listen", uri=f"tcp://0.0.0.0:{port}")
        target.order("receive", lines=0)
        summary = source.ask("migrate", uri=f"tcp://{target.host.address}:{port}", limits={})["summary"]
        target.answer()
        for node in nodes:
            node.ask("end")
            node.stop()
        return {"total": summary["total_time"], "downtime": summary["downtime"]}

    def move_qemu(self, append: str | None) -> Facts:
        source, target = self.hosts
        order: dict[str, Any] = {"port": self.port()}
        if append is None:
            order |= {"memory": IDLE_MIB, "noise": f"{INSIDE}/noise"}
        else:
            order |= {"memory": MOVED_MIB, "append": append, "kernel": f"{INSIDE}/vmlinux"}
            order["initrd"] = f"{INSIDE}/initrd"
        script = ["python3", f"{INSIDE}/peer_qemu.py"]
        leaving = source.start([*script, json.dumps({**order, "address": target.address})], stdin=True)
        waiting = target.start([*script, json.dumps(order)], stdin=True)
        both = (waiting, leaving)
        for command in both:
            command.wait_for(b"\n", 120)
        for command in both:
            command.send(b"\n")
        leaving.wait_for(b"total", 120)
        for command in both:
            command.send(b"\n")
        results = [command.wait(60) for command in both]
        for host, result in zip((target, source), results, strict=True):
            if result.status:
                raise LabError(f"{host.name}: QEMU's migration failed: {result.stderr.decode(errors='replace')}")
        facts: dict[str, Any] = json.loads(results[1].text.splitlines()[1])
        return {"total": facts["total"], "downtime": facts["downtime"]}


def _boot(kernel: str, cpus: int, machine: str = "microvm,rtc=on") -> Row:
    title = f"boot of Debian's {kernel} to its first process, {BOOT_MIB} MiB, {cpus} vCPU{'s' if cpus > 1 else ''}"
    return Row(
        f"{title}, QEMU's -M {machine}", ("time",), 0.9,
        lambda bench: bench.boot_pyhv(kernel, cpus), lambda bench: bench.boot_qemu(machine, kernel, cpus),
    )  # fmt: skip


def _move(title: str, append: str | None) -> Row:
    moved, title = ("total", "downtime"), f"live migration, {title}"
    return Row(title, moved, 1, lambda bench: bench.move_pyhv(append), lambda bench: bench.move_qemu(append))


ROWS = {
    "boot-plain": _boot("vmlinux", 1, "microvm"),
    "boot-plain-4": _boot("vmlinux", 4, "microvm"),
    "boot": _boot("vmlinux", 1),
    "boot-4": _boot("vmlinux", 4),
    "boot-bzimage": _boot("vmlinuz", 1),
    "boot-bzimage-4": _boot("vmlinuz", 4),
    "idle": _move(f"{IDLE_MIB} MiB, {NOISE_MIB} of them noise", None),
    "linux": _move(f"Linux with {MOVED_MIB} MiB, idle", LINE),
    "linux-writes": _move(f"Linux with {MOVED_MIB} MiB, {WRITES} pages written a second", f"{LINE} write={WRITES}"),
}


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


def initrd(say: image.Say) -> Path:
    """The folder with the `initrd` of the Linux guests."""
    source = code.HERE / "guest" / "bench.c"

    def build(folder: Path) -> None:
        say("building the Linux guest of the benchmarks")
        linux.compile_init(source, folder / "init")
        init = ("init", stat.S_IFREG | 0o755, (folder / "init").read_bytes())
        (folder / "initrd").write_bytes(image.cpio([("dev", stat.S_IFDIR | 0o755, b""), init]))

    inputs = {"source": cache.file_digest(source), "recipe": cache.file_digest(Path(__file__))}
    return cache.artefact("linux-bench", inputs, build)


def run(names: list[str], wanted: list[str], repeat: int, say: image.Say) -> str:
    """Measures, and gives the table. names: of two kinds of AMD hosts. wanted: keys of ROWS. Raises LabError."""
    if len(names) != 2 or any(kinds.find(name).vendor != "amd" for name in names):
        raise LabError("bench: needs two kinds of AMD hosts")
    if unknown := [name for name in wanted if name not in ROWS]:
        raise LabError(f"bench: there is no row {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    lines = []
    for name in wanted or ROWS:
        row = ROWS[name]
        with Lab(say) as lab:
            bench = Bench(lab, names, len(row.names) > 1, say)
            taken: dict[str, list[Facts]] = {"pyhv": [], "QEMU": []}
            ways = {"pyhv": row.pyhv, "QEMU": row.qemu}
            for number in range(repeat):
                for who in ("pyhv", "QEMU") if number % 2 == 0 else ("QEMU", "pyhv"):
                    facts = ways[who](bench)
                    taken[who].append(facts)
                    say(f"{name}: {who}: " + ", ".join(f"{what} {_shown(value)}" for what, value in facts.items()))
        lines += table(name, row, taken)
    return "\n".join(lines)


def table(name: str, row: Row, taken: Mapping[str, list[Facts]]) -> list[str]:
    """Medians, and in brackets the least and the greatest; of the ratios of the pairs too."""
    lines = [f"{name}: {row.title}, {len(taken['pyhv'])} times"]
    for what in row.names:
        ours, theirs = ([facts[what] for facts in taken[who]] for who in ("pyhv", "QEMU"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        ratio = f"ratio {median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f}), goal {row.goal:g}"
        lines.append(f"  {what:8}  pyhv {_spread(ours)}  QEMU {_spread(theirs)}  {ratio}")
    return lines


def _shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _spread(values: list[float]) -> str:
    return f"{_shown(median(values))} ({_shown(min(values))}..{_shown(max(values))})"

"""One host's part in ../outside/test_generations.py; not a test by itself.

    python3 generations.py FOLDER

Reads two lines of JSON and answers each with one. {"run": BOOL, "exec": BOOL}: saves tickers to FOLDER/out, with `run`
also one by the commands that a user would give, and says what they were. {"plant": NAME, "type": [NAME, ...]}: tries to
restore all snapshots in FOLDER/in, those of "type" by the command too, plants faults with one, and says what became of
each. One process for all of it, which with "exec" false even runs the commands, in children: to start Python and to
import pyhv takes longer on some hosts than anything else. Snapshots go from host to host as FILE.z, compressed, for the
ways in and out of a host are slow.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyhv
from pyhv import cli
from pyhv.accel import choose
from pyhv.cpu.compare import MissingFeature
from pyhv.cpu.msrs import IA32_TSC
from pyhv.snapshot import file
from pyhv.snapshot.file import Snapshot

PROFILES = ("hyperv-r2", "host")
TICKER = {"memory": "2304K", "append": "every=1"}  # 64 pages are stamped
TYPED = "run ticker --name t --compat --detach --mem 2304K --append every=1"
FIRST_STAMP = 0x200000
KVM_SYSTEM_TIME_NEW = 0x4B564D01
#: Where the guest's kvmclock page is: ticker has nothing between the top of its stack and 1 MiB.
CLOCK_PAGE = 0x90000
FIRST_TSC, FIRST_CLOCK = 1 << 44, 3600 * 10**9


def prepare(machine: pyhv.Machine) -> None:
    """Does what a guest does that wants kvmclock: from then on KVM keeps the page up to date. And puts TSC and clock
    far from where a VM's begin, so that it cannot be missed when they are not restored."""
    state = machine.vm.capture()
    state.vcpus[0].msrs.update({IA32_TSC: FIRST_TSC, KVM_SYSTEM_TIME_NEW: CLOCK_PAGE | 1})
    machine.vm.apply(state._replace(clock=FIRST_CLOCK))


def guest_time(machine: pyhv.Machine, tsc: int) -> int:
    """The nanoseconds that kvmclock shows the guest when its TSC is `tsc` (struct pvclock_vcpu_time_info,
    Documentation/virt/kvm/x86/msr.rst)."""
    page = machine.vm.memory.read(CLOCK_PAGE, 32)
    stamp, system_time, factor = (int.from_bytes(page[a:b], "little") for a, b in ((8, 16), (16, 24), (24, 28)))
    shift = int.from_bytes(page[28:29], "little", signed=True)
    passed = tsc - stamp
    passed = passed << shift if shift >= 0 else passed >> -shift
    return system_time + (passed * factor >> 32)


def look(machine: pyhv.Machine) -> dict[str, Any]:
    """What can be told of a paused VM from without."""
    before = time.monotonic_ns()
    tsc = machine.vm.capture().vcpus[0].msrs[IA32_TSC]
    after = time.monotonic_ns()
    memory = machine.vm.memory
    return {"tsc": tsc, "looked": [before, after], "crc": zlib.crc32(memory.read(0, memory.size))}


def run_on(machine: pyhv.Machine, lines: int) -> pyhv.RunResult:
    """Lets the guest print so many lines more, if it can; it is paused then."""
    wanted = machine.console().count(b"\n") + lines
    for _ in range(600):
        result = machine.run(0.05)
        if result.cause != "timeout" or machine.console().count(b"\n") >= wanted:
            break
    return result


def send(path: Path) -> None:
    """Puts a snapshot where it is fetched from."""
    (path.parent / "out" / f"{path.name}.z").write_bytes(zlib.compress(path.read_bytes(), 1))


def save(profile: str, path: Path) -> dict[str, Any]:
    with pyhv.Machine("ticker", cpu=profile, **TICKER) as machine:  # type: ignore[arg-type]
        prepare(machine)
        result = run_on(machine, 4)
        assert result.cause == "timeout", result
        saved = look(machine)
        machine.save(str(path))
        send(path)
        return {**saved, "console": result.console.decode(), "time": guest_time(machine, saved["tsc"])}


def restore(path: Path) -> dict[str, Any]:
    try:
        machine = pyhv.Machine.restore(str(path))
    except pyhv.Incompatible as error:
        named = [reason.name for reason in error.reasons if isinstance(reason, MissingFeature)]
        return {"refused": [str(reason) for reason in error.reasons], "named": named, "message": str(error)}
    with machine:
        return {"refused": [], "notes": machine.notes, **go_on(machine)}


def go_on(machine: pyhv.Machine) -> dict[str, Any]:
    start = look(machine)
    middle = end = start
    result = run_on(machine, 2)
    if result.cause == "timeout":
        middle = look(machine)
        middle["time"] = guest_time(machine, middle["tsc"])
        # The page is from after the restore: what it says of the moment before the guest's first instruction.
        start["time"] = guest_time(machine, start["tsc"])
        result = run_on(machine, 2)
    if result.cause == "timeout":
        end = look(machine)
        end["time"] = guest_time(machine, end["tsc"])
    return {
        "start": start,
        "middle": middle,
        "end": end,
        "cause": result.cause,
        "console": result.console.decode(),
        "profile": machine.guest.profile,
        "intercept": machine.choice.intercept,
    }


# -- faults: does anybody notice? --------------------------------------------------------------------------------


def stale_page(machine: pyhv.Machine) -> None:
    """Page 5 of the stamped ones is as it was a round before."""
    at = FIRST_STAMP + 5 * 4096 + 5 * 8
    stamp = int.from_bytes(machine.vm.memory.read(at, 8), "little")
    machine.vm.memory.write(at, (stamp - (1 << 32)).to_bytes(8, "little"))


def without_cx16(snapshot: Snapshot) -> Snapshot:
    """The guest's table has one bit less."""
    table = snapshot.tables[0]
    leaf1 = table.get(1)
    return snapshot._replace(tables=(table.replace({(1, 0): leaf1._replace(ecx=leaf1.ecx & ~(1 << 13))}),))


def earlier_tsc(snapshot: Snapshot) -> Snapshot:
    snapshot.state.vcpus[0].msrs[IA32_TSC] //= 2
    return snapshot


def earlier_clock(snapshot: Snapshot) -> Snapshot:
    platform = snapshot.state.platform
    return snapshot._replace(state=snapshot.state._replace(platform=platform._replace(clock=platform.clock // 2)))


def plant(path: Path) -> dict[str, Any]:
    """What becomes of a guest to which a restore does each of these."""
    found = {}
    with pyhv.Machine.restore(str(path)) as machine:
        stale_page(machine)
        found["stale_page"] = {"refused": [], **go_on(machine)}
    intact = file.open_snapshot
    changes: list[Callable[[Snapshot], Snapshot]] = [without_cx16, earlier_tsc, earlier_clock]
    try:
        for change in changes:
            file.open_snapshot = lambda name, change=change: change(intact(name))  # type: ignore[misc]
            found[change.__name__] = restore(path)
    finally:
        file.open_snapshot = intact
    return found


# -- the commands ------------------------------------------------------------------------------------------------


class Typed:
    """A command of pyhv that runs."""

    def __init__(self, folder: Path, by_exec: bool, words: str) -> None:
        self._words = words
        self._output = [folder / f"{words.split()[0]}.{stream}" for stream in ("stdout", "stderr")]
        files = [open(path, "wb", buffering=0) for path in self._output]  # noqa: SIM115
        self._pid = os.fork()
        if self._pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for descriptor, stream in enumerate(files, 1):
                os.dup2(stream.fileno(), descriptor)
            sys.argv = ["pyhv", *words.split()]
            if by_exec:
                os.execvp("pyhv", sys.argv)
            cli.program()
        for stream in files:
            stream.close()

    def wait_for(self, text: str) -> None:
        """Waits until it has printed the text. Whoever runs this process has a limit for it."""
        while text not in self._output[0].read_text():
            time.sleep(0.05)

    def wait(self) -> dict[str, Any]:
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        stdout, stderr = (path.read_text() for path in self._output)
        return {"words": self._words, "status": status, "stdout": stdout, "stderr": stderr}


def save_by_command(folder: Path, by_exec: bool) -> list[dict[str, Any]]:
    path = folder / "typed.pyhv"
    done = [Typed(folder, by_exec, TYPED).wait()]
    if done[0]["status"] == 0:
        console = Typed(folder, by_exec, "console t")
        console.wait_for("ticker: round 3\n")
        done += [Typed(folder, by_exec, f"save t {path} --stop").wait(), console.wait()]
        send(path)
    return done


def main(folder: Path) -> None:
    (folder / "out").mkdir(parents=True)
    first = json.loads(sys.stdin.readline())
    typed: Any = save_by_command(folder, first["exec"]) if first["run"] else []
    description = choose.open_accelerator().describe().to_json()
    saved = {profile: save(profile, folder / f"{profile}.pyhv") for profile in PROFILES}
    print(json.dumps({"host": description, "saved": saved, "typed": typed}), flush=True)

    second = json.loads(sys.stdin.readline())
    restored, planted, typed = {}, {}, {}
    for compressed in sorted((folder / "in").glob("*.z")):
        path = compressed.with_suffix("")
        name = path.stem
        path.write_bytes(zlib.decompress(compressed.read_bytes()))
        if name in second["type"]:
            typed[name] = Typed(folder, first["exec"], f"restore {path} --timeout 3").wait()
        if not name.endswith(".typed"):
            restored[name] = restore(path)
        if name == second["plant"]:
            planted = plant(path)
    print(json.dumps({"restored": restored, "planted": planted, "typed": typed}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What a restored VM has of the one that was saved: all its state, its memory, and nothing that it would stumble over.

A snapshot is forged by writing its records again with something changed. The guest ticker notices a page that is stale
or gone, a processor that has changed and a TSC that goes back; each is forged here, and must be noticed.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyhv
from pyhv.accel.state import ProcessorsState
from pyhv.cpu import features
from pyhv.cpu.host import Verdict
from pyhv.snapshot import file
from pyhv.state import codec
from pyhv.state.records import MachineState
from pyhv.vm.memory import GuestMemory

from .cli import NOT_IN_THE_LAB

TSC, TSC_DEADLINE = 0x10, 0x6E0
LAPIC_CURRENT_COUNT = range(0x390, 0x394)  # SDM Vol. 3, "Local APIC Register Address Map"
PAGE = 4096


def forge(source: Path, target: Path, change: Callable[[MachineState], MachineState], **pages: bytes) -> None:
    """Writes a snapshot again with another state. pages: contents of pages by their addresses in hexadecimal."""
    with file.open_snapshot(str(source)) as snapshot:
        memory = GuestMemory(snapshot.state.machine.memory, (snapshot.reader.memory_fd, snapshot.reader.memory_offset))
        try:
            for address, content in pages.items():
                memory.write(int(address.lstrip("_"), 16), content)
            file.begin(str(target), snapshot.writer, change(snapshot.state), memory).commit()
        finally:
            memory.close()


def change_vcpu(state: MachineState, **fields: Any) -> MachineState:
    return state._replace(vcpus=(state.vcpus[0]._replace(**fields), *state.vcpus[1:]))


# --------------------------------------------------------------------------------------------------- the same state


def differences(saved: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where two records differ, apart from what goes on while a VM stands: the clocks and what counts with them."""
    if isinstance(saved, tuple):
        names = getattr(saved, "_fields", range(len(saved)))
        assert len(saved) == len(now), where
        for name, one, other in zip(names, saved, now, strict=True):
            yield from differences(one, other, f"{where}.{name}")
    elif where.endswith(".msrs"):
        for number in saved.keys() | now.keys():
            if number != TSC and saved.get(number) != now.get(number):
                yield f"{where}[{number:#x}]"
    elif where.endswith(".lapic"):
        places = {place & ~15 for place in range(len(saved)) if saved[place] != now[place]}
        yield from (f"{where}[{place:#x}]" for place in places - {LAPIC_CURRENT_COUNT[0]})
    elif where != ".clock" and saved != now:
        yield where


def saved_and_restored(path: Path, image: str, options: dict[str, Any], seconds: float) -> list[tuple[Any, Any]]:
    """Processors and devices of a VM, as they were saved and as they are restored."""
    with pyhv.Machine(image, **{"memory": "4M", **options}) as machine:
        if seconds:
            result = machine.run(seconds)
            if result.cause == "guest-exit":
                pytest.skip(result.console.decode().strip())
        machine.save(str(path))
    with file.open_snapshot(str(path)) as snapshot:
        processors = snapshot.state.processors()
        devices = {device.name: device.state for device in snapshot.state.devices}
    with pyhv.Machine.restore(str(path)) as machine:
        return [(processors, machine.vm.capture()), (devices, machine.vm.devices.save())]


GUESTS = [
    ("ticker", {"append": "every=1", "cpus": 2}, 0.3),
    ("timer", {"append": "ms=4000"}, 0.3),  # the LAPIC's timer is armed
    ("timer", {"append": "ms=4000 deadline"}, 0.3),
    ("dispatch", {"compat": True}, 0.0),
    ("flat", {"boot": "flat"}, 0.0),  # an image without notes has a PIT
]


@pytest.mark.parametrize(("image", "options", "seconds"), GUESTS)
def test_all_of_the_state_comes_back(tmp_path: Path, image: str, options: dict[str, Any], seconds: float) -> None:
    if image == "flat":
        (tmp_path / "flat").write_bytes(b"\xf4\xeb\xfd")  # HLT, and again
        image = f"{tmp_path}/flat"
    (saved, now), (devices, devices_now) = saved_and_restored(tmp_path / "s.pyhv", image, options, seconds)
    assert list(differences(saved, now)) == []
    # Clocks; and a restored pc is told that it is a copy.
    assert {name: state for name, state in devices.items() if name not in ("cmos", "acpi_pm")} == {
        name: state for name, state in devices_now.items() if name not in ("cmos", "acpi_pm")
    }
    assert devices.keys() == devices_now.keys()
    assert saved.irqchip is not None
    assert len(saved.irqchip.pit) == (3 if image.endswith("/flat") else 0)
    assert len(saved.vcpus) == options.get("cpus", 1)
    vcpu = saved.vcpus[0]
    assert len(vcpu.lapic) == 1024 and TSC in vcpu.msrs and len(vcpu.msrs) > 10


def test_the_comparison_sees_every_field(tmp_path: Path) -> None:
    (saved, now), _ = saved_and_restored(tmp_path / "s.pyhv", "ticker", {"append": "every=1"}, 0.2)

    def plant(whole: ProcessorsState, **fields: Any) -> ProcessorsState:
        return whole._replace(vcpus=(whole.vcpus[0]._replace(**fields),))

    vcpu = now.vcpus[0]
    lapic = bytearray(vcpu.lapic)
    lapic[0x320] ^= 1
    plants = {
        ".vcpus.0.regs.r9": plant(now, regs=vcpu.regs._replace(r9=vcpu.regs.r9 ^ 1)),
        ".vcpus.0.sregs.cs.limit": plant(
            now, sregs=vcpu.sregs._replace(cs=vcpu.sregs.cs._replace(limit=vcpu.sregs.cs.limit ^ 1))
        ),
        ".vcpus.0.xsave": plant(now, xsave=b"\1" + vcpu.xsave[1:]),
        ".vcpus.0.lapic[0x320]": plant(now, lapic=bytes(lapic)),
        ".vcpus.0.msrs[0x174]": plant(now, msrs=vcpu.msrs | {0x174: vcpu.msrs[0x174] + 1}),
        ".vcpus.0.events.nmi_pending": plant(now, events=vcpu.events._replace(nmi_pending=1)),
        ".vcpus.0.debugregs.dr7": plant(now, debugregs=vcpu.debugregs._replace(dr7=vcpu.debugregs.dr7 ^ 1)),
        ".vcpus.0.mp_state": plant(now, mp_state=3),
        ".tsc_khz": now._replace(tsc_khz=now.tsc_khz + 1),
    }
    for where, planted in plants.items():
        assert list(differences(saved, planted)) == [where]


def test_port_accesses_are_finished_before_a_save(tmp_path: Path) -> None:
    """A guest that echoes, cut into pieces at any moment: in an IN, in an OUT, with bytes in the serial port. No byte
    is lost, and none comes twice."""
    for length in (1500, 15000, 60000):  # until it does not get through too soon
        if echo_in_pieces(str(tmp_path / "s.pyhv"), length) > 1:
            return
    pytest.fail("it was never saved")


def echo_in_pieces(path: str, length: int) -> int:
    """How often it was saved until it had echoed everything."""
    pieces = 0
    text = bytes(random.Random(3).choices(b"abcdefghijklmnop", k=length)) + b"q"
    source, feed = os.pipe()
    os.write(feed, text)
    machine = pyhv.Machine("faults", append="echo", memory="2M", console_in=source)
    echoed = b""
    try:
        while True:
            result = machine.run(0.02)
            if result.cause != "timeout":
                echoed += result.console
                break
            machine.save(path)
            echoed += machine.console()  # to finish an access may print something
            machine.close()
            machine = pyhv.Machine.restore(path, console_in=source)
            pieces += 1
            assert pieces < 2000
    finally:
        machine.close()
        os.close(source)
        os.close(feed)
    assert (result.cause, result.status) == ("guest-exit", 0)
    assert echoed == text
    return pieces


def test_who_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "s.pyhv"
    with pyhv.Machine("hello", compat=True, memory="2M", append="some words") as machine:
        machine.save(str(path))
        host, uuid, accelerator = machine.host, machine.uuid, machine.choice.accelerator.name
    with file.open_snapshot(str(path)) as snapshot:
        writer, saved = snapshot.writer, snapshot.state.machine
    assert (writer.pyhv, writer.kernel, writer.accelerator) == (pyhv.__version__, os.uname().release, accelerator)
    assert writer.processor == host.processor and writer.time > 1_700_000_000
    assert (saved.profile, saved.hides, saved.uuid) == ("hyperv-r2", True, uuid)
    assert (saved.image, saved.command_line, saved.memory) == ("hello", "some words", 2 << 20)


# -------------------------------------------------------------------------------------- what the ticker must notice


@pytest.fixture
def tickers(tmp_path: Path) -> tuple[Path, Path]:
    """A ticker, saved twice with some rounds between."""
    paths = tmp_path / "1.pyhv", tmp_path / "2.pyhv"
    with pyhv.Machine("ticker", append="every=1", memory="4M") as machine:
        for path in paths:
            seen = machine.console().count(b"round")
            while machine.console().count(b"round") < seen + 3:
                assert machine.run(0.2).cause == "timeout", machine.console()
            machine.save(str(path))
    return paths


def outcome(path: Path) -> str:
    """What a restored ticker comes to within some rounds: "" if it sees nothing wrong, else the line in which it says
    what."""
    with pyhv.Machine.restore(str(path)) as machine:
        for _ in range(100):
            result = machine.run(0.2)
            if result.cause == "guest-exit":
                assert result.status == 1
                return result.console.decode().splitlines()[-1]
            assert result.cause == "timeout", result.message
            if result.console.count(b"round") > 3:
                return ""
    raise AssertionError("it does not get on")


def test_a_forged_snapshot_with_nothing_changed(tickers: tuple[Path, Path], tmp_path: Path) -> None:
    """Or the tests below would pass for the wrong reason."""
    forge(tickers[1], tmp_path / "f", lambda state: state)
    assert outcome(tmp_path / "f") == ""


def test_a_stale_page_and_a_dropped_page_are_noticed(tickers: tuple[Path, Path], tmp_path: Path) -> None:
    with file.open_snapshot(str(tickers[0])) as first:
        stale = os.pread(first.reader.memory_fd, PAGE, first.reader.memory_offset + 0x300000)
    forge(tickers[1], tmp_path / "f", lambda state: state, _300000=stale)
    assert re.match(r"ticker: .*0x0*300000", outcome(tmp_path / "f"))
    forge(tickers[1], tmp_path / "f", lambda state: state, _300000=bytes(PAGE))
    assert re.match(r"ticker: .*0x0*300000", outcome(tmp_path / "f"))


def test_one_bit_of_cpuid_is_noticed(tickers: tuple[Path, Path], tmp_path: Path) -> None:
    """The guest reads CPUID in each round. Where the kernel does not honour the table, pyhv answers."""
    lahf = features.find("lahf_lm")
    assert (lahf.word.leaf, lahf.word.register) == (0x80000001, "ecx")

    def change(state: MachineState) -> MachineState:
        entries = state.vcpus[0].cpuid
        assert any(entry[0] == lahf.word.leaf and entry[5] & lahf.mask for entry in entries)
        flipped = [(*e[:5], e[5] ^ lahf.mask, e[6]) if e[0] == lahf.word.leaf else e for e in entries]
        return change_vcpu(state, cpuid=tuple(flipped))

    forge(tickers[1], tmp_path / "f", change)
    assert "CPUID" in outcome(tmp_path / "f")


def test_a_tsc_that_goes_back_is_noticed(tickers: tuple[Path, Path], tmp_path: Path, verdict: Verdict) -> None:
    with file.open_snapshot(str(tickers[1])) as snapshot:
        saved = snapshot.state.vcpus[0].msrs[TSC]

    def change(state: MachineState) -> MachineState:
        return change_vcpu(state, msrs=state.vcpus[0].msrs | {TSC: saved // 2})

    forge(tickers[1], tmp_path / "f", change)
    if not verdict.faithful:
        pytest.skip("this machine's KVM shows guests the host's TSC, whatever it is told; the lab runs this")
    assert "the TSC went back" in outcome(tmp_path / "f")


# ------------------------------------------------------------------------------------------- memory: mapped, shared


def memory_use() -> tuple[int, int]:
    """Bytes that are this process's own, and bytes of files that it has mapped, on a disk or in memory."""
    with open("/proc/self/status") as lines:
        found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}
    return found["RssAnon"], found["RssFile"] + found["RssShmem"]


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A snapshot with 62 MiB in use."""
    path = tmp_path / "noise.pyhv"
    content = random.Random(1).randbytes(1 << 20)
    with pyhv.Machine("hello", memory="64M") as machine:
        for at in range(2 << 20, 64 << 20, 1 << 20):
            machine.vm.memory.write(at, content)
        machine.save(str(path))
    return path


def test_a_restore_reads_little_of_the_memory(noise: Path) -> None:
    with pyhv.Machine.restore(str(noise)):
        pass  # modules are imported
    before = memory_use()
    with pyhv.Machine.restore(str(noise)) as machine:
        now = memory_use()
        assert sum(now) - sum(before) < 4 << 20
        machine.vm.memory.read(2 << 20, 62 << 20)
        assert memory_use()[1] - before[1] > 48 << 20  # what it would look like


def test_clones_share_what_they_have_not_changed(noise: Path) -> None:
    own, _ = memory_use()
    clones = [pyhv.Machine.restore(str(noise)) for _ in range(4)]
    try:
        for clone in clones:
            clone.vm.memory.write(0x400000 + clones.index(clone) * PAGE, b"mine")
            for at in range(2 << 20, 64 << 20, 1 << 20):
                clone.vm.memory.read(at, PAGE)
        assert memory_use()[0] - own < 8 << 20
        assert [clone.vm.memory.read(0x400000, 4) == b"mine" for clone in clones] == [True, False, False, False]
    finally:
        for clone in clones:
            clone.close()


def test_a_large_guest_is_saved_and_restored_in_proportion(tmp_path: Path) -> None:
    """4 GiB of which little is used, on both sides of the hole below 4 GiB."""
    path = tmp_path / "s.pyhv"
    with pyhv.Machine("hello", memory="4G", overcommit=True) as machine:
        machine.vm.memory.write(4 << 30, b"above")
        machine.vm.memory.write((3 << 30) - PAGE, b"below")
        machine.save(str(path))
    assert path.stat().st_blocks * 512 < 2 << 20 < path.stat().st_size
    before = memory_use()
    with pyhv.Machine.restore(str(path), overcommit=True) as machine:
        assert sum(memory_use()) - sum(before) < 8 << 20
        assert machine.vm.memory.read(4 << 30, 5) == b"above"
        assert machine.vm.memory.read((3 << 30) - PAGE, 5) == b"below"
        assert machine.run(60).cause == "guest-exit"


# --------------------------------------------------------------------------------------------- states of nobody's


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def other(value: Any, chance: random.Random) -> Any:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            flipped = value ^ 1 << chance.randrange(64)
            return chance.choice([0, 1, 255, 1 << 16, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, flipped, flipped])
        case str() if value and not value.strip("0123456789abcdef"):
            at = chance.randrange(len(value))
            return chance.choice([value[:at] + f"{chance.randrange(16):x}" + value[at + 1 :], value[: at & ~1], ""])
        case str():
            return chance.choice(["", "x" * 40, "\0"])
        case _:
            return None


def forged_record(record: Any, chance: random.Random) -> Any:
    """The record with some of its values changed; as it was where that cannot be a record."""
    whole = json.loads(codec.encode(record))
    for path in chance.choices(list(leaves(whole["fields"])), k=chance.choice([1, 1, 3])):
        place = whole["fields"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = other(place[path[-1]], chance)
    try:
        return codec.decode(type(record), json.dumps(whole).encode(), "forged")
    except pyhv.BadInput:
        return record


@NOT_IN_THE_LAB
def test_forged_states(tickers: tuple[Path, Path], tmp_path: Path) -> None:
    """States that are well formed, and of no VM that ever was: a VM that can be ended, or an error in one line."""
    seed = int(os.environ.get("PYHV_SEED") or random.randrange(1 << 32))
    print(f"PYHV_SEED={seed}")
    chance = random.Random(seed)
    path, refused, made = tmp_path / "f", 0, 0
    with pyhv.Machine.restore(str(tickers[0])):
        pass
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(int(os.environ.get("PYHV_FUZZ_EXAMPLES", "60"))):

        def change(state: MachineState) -> MachineState:
            number = chance.randrange(4)
            if number == 0:
                return state._replace(platform=forged_record(state.platform, chance))
            if number == 1:
                index = chance.randrange(len(state.devices))
                forged = forged_record(state.devices[index], chance)
                return state._replace(devices=(*state.devices[:index], forged, *state.devices[index + 1 :]))
            return state._replace(vcpus=(forged_record(state.vcpus[0], chance),))

        forge(tickers[1], path, change)
        try:
            with pyhv.Machine.restore(str(path)) as machine:
                made += 1
                machine.run(0.02)
        except pyhv.PyhvError as error:
            refused += 1
            # What differs is listed whole, however much it is: each of the reasons is a line.
            for line in getattr(error, "reasons", ()) or (error,):
                assert "\n" not in str(line) and len(str(line)) < 2000
        assert len(os.listdir("/proc/self/fd")) == files
    assert made and refused

"""Save and restore on this machine's KVM: a guest that was saved goes on as if it had not been."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

import pyhv
from pyhv.accel.data import Stop
from pyhv.cpu.host import Verdict, as_kvm_host
from pyhv.snapshot import file
from pyhv.state.records import MachineState
from pyhv.vm import memory as guest_memory

TICKER = {"append": "every=1", "memory": "4M"}


def save_running_ticker(path: Path, **options: object) -> bytes:
    """Saves a ticker that has run a little; returns what it had printed by then."""
    with pyhv.Machine("ticker", **{**TICKER, **options}) as machine:  # type: ignore[arg-type]
        assert machine.run(0.3).cause == "timeout"
        machine.save(str(path))
        return machine.console()


def rounds(console: bytes) -> list[int]:
    """The numbers that ticker printed in complete lines."""
    lines = console.decode().split("\n")[:-1]
    return [int(line.split()[2]) for line in lines if line.startswith("ticker: round ")]


def test_a_restored_guest_goes_on_without_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "t.pyhv"
    before = save_running_ticker(path)
    with pyhv.Machine.restore(str(path)) as machine:
        for _ in range(100):  # slow on an emulated host
            assert machine.run(0.2).cause == "timeout"
            after = machine.console()
            if len(rounds(after)) > 2:
                break
    counted = rounds(before + after)
    assert counted == list(range(counted[0], counted[0] + len(counted)))
    assert len(rounds(after)) > 1


# Guests whose runs are all alike, and how many instructions of them are executed in any case.
DETERMINISTIC = [("hello", {"append": "some words"}, 40), ("refuse", {}, 40), ("dispatch", {}, 3000)]


def finish(machine: pyhv.Machine) -> tuple[bytes, int, bytes]:
    result = machine.run(60)
    assert result.cause == "guest-exit", result.message
    return result.console, result.status, machine.vm.memory.read(0, machine.vm.memory.size)


def test_saved_and_restored_at_50_points(tmp_path: Path) -> None:
    """At random instructions, against a run that never was: same output, same status, same final memory."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = str(tmp_path / "s.pyhv")
    for point in range(50):
        image, options, steps = DETERMINISTIC[point % len(DETERMINISTIC)]
        with pyhv.Machine(image, memory="2M", **options) as machine:  # type: ignore[arg-type]
            expected = finish(machine)
        with pyhv.Machine(image, memory="2M", **options) as machine:  # type: ignore[arg-type]
            for _ in range(chance.randrange(steps)):
                assert machine.vm.vcpus[0].step().stop == Stop.DEBUG
            machine.save(path)
            first = machine.console()
        with pyhv.Machine.restore(path) as restored:
            console, status, memory = finish(restored)
        assert (first + console, status) == expected[:2], f"seed {seed}"
        assert memory == expected[2], f"seed {seed}"


def test_the_comparison_notices_a_stale_page_and_a_register(tmp_path: Path) -> None:
    path = str(tmp_path / "s.pyhv")
    with pyhv.Machine("hello", memory="2M") as machine:
        expected = finish(machine)
    with pyhv.Machine("hello", memory="2M") as machine:
        for _ in range(10):
            machine.vm.vcpus[0].step()
        machine.save(path)
    with pyhv.Machine.restore(path) as restored:
        restored.vm.memory.write(0x180000, b"\1")
        assert finish(restored)[2] != expected[2]
    with pyhv.Machine.restore(path) as restored:
        regs = restored.vm.vcpus[0].get_regs()
        restored.vm.vcpus[0].set_regs(regs._replace(rsi=regs.rsi + 1, rdi=regs.rdi + 1))
        try:
            assert finish(restored) != expected
        except AssertionError:
            pass  # it did not even get to its end


@pytest.mark.parametrize("mode", ["", "deadline"])
def test_an_armed_timer_fires_after_the_restore(tmp_path: Path, mode: str) -> None:
    path = str(tmp_path / "s.pyhv")
    with pyhv.Machine("timer", append=f"ms=400 {mode}", memory="2M") as machine:
        result = machine.run(0.2)
        if result.cause == "guest-exit":
            pytest.skip(result.console.decode().strip())
        assert result.console == b"timer: armed\n"
        machine.save(path)
    time.sleep(0.5)  # longer than the timer: it must wait for the guest's time, not the host's
    with pyhv.Machine.restore(path) as restored:
        result = restored.run(20)
    assert (result.cause, result.console) == ("guest-exit", b"timer: fired\n")


def test_the_clock_goes_on_where_it_was_and_not_backwards(tmp_path: Path, verdict: Verdict) -> None:
    path = tmp_path / "s.pyhv"
    save_running_ticker(path)
    with file.open_snapshot(str(path)) as snapshot:
        saved = snapshot.state
    time.sleep(0.2)
    with pyhv.Machine.restore(str(path)) as machine:
        now = machine.vm.capture()
    tsc = 0x10
    assert 0 <= now.clock - saved.platform.clock < 150_000_000, "kvmclock did not resume where it stopped"
    passed = (now.vcpus[0].msrs[tsc] - saved.vcpus[0].msrs[tsc]) / saved.platform.tsc_khz
    assert passed >= 0, "the TSC went backwards"
    if verdict.faithful:  # some other KVMs show guests the host's TSC, whatever offset they are given
        assert passed < 150, "the TSC did not resume where it stopped"


def test_a_running_vm_is_saved_and_runs_on(tmp_path: Path) -> None:
    with pyhv.Machine("ticker", **TICKER) as machine:  # type: ignore[arg-type]
        machine.start()
        time.sleep(0.2)
        machine.save(str(tmp_path / "s.pyhv"))
        assert machine.vm.running
        machine.pause()
        before = len(machine.console())
        machine.save(str(tmp_path / "s.pyhv"))
        assert not machine.vm.running
        assert machine.run(0.3).cause == "timeout"
        assert len(machine.console()) > before


def test_clones(tmp_path: Path) -> None:
    """Many VMs from one file at once: each goes on by itself, and the file stays as it was."""
    path = tmp_path / "s.pyhv"
    before = save_running_ticker(path)
    content = path.read_bytes()
    clones = [pyhv.Machine.restore(str(path)) for _ in range(12)]
    try:
        for clone in clones:
            clone.start()
        for clone in clones:
            clone.expect(b"round", timeout=60)
        for clone in clones:
            clone.pause()
            assert clone.vm.stopped is None
            counted = rounds(before + clone.console())
            assert counted and counted == list(range(counted[0], counted[0] + len(counted)))
        assert len({clone.uuid for clone in clones}) == len(clones)
    finally:
        for clone in clones:
            clone.close()
    assert path.read_bytes() == content


def test_a_restored_vm_is_saved_again(tmp_path: Path) -> None:
    """Its memory is a private mapping of the first file: the second holds what was written since, and the rest."""
    first, second = str(tmp_path / "1.pyhv"), str(tmp_path / "2.pyhv")
    seen = save_running_ticker(Path(first))
    for _ in range(3):
        with pyhv.Machine.restore(first) as machine:
            assert machine.run(0.2).cause == "timeout"
            seen += machine.console()
            machine.save(second)
        first, second = second, first
    counted = rounds(seen)
    assert counted == list(range(counted[0], counted[0] + len(counted)))


def test_compat_and_its_interception_travel(tmp_path: Path) -> None:
    path = str(tmp_path / "s.pyhv")
    save_running_ticker(Path(path), accel="kvm", compat=True)
    with pyhv.Machine.restore(path) as machine:
        assert machine.guest.profile == "hyperv-r2"
        assert machine.run(0.3).cause == "timeout", machine.console()
    with pyhv.Machine.restore(path, intercept="trap") as machine:
        assert machine.choice.intercept == "trap"
        assert machine.run(0.3).cause == "timeout", machine.console()


def test_several_vcpus(tmp_path: Path) -> None:
    path = str(tmp_path / "s.pyhv")
    before = save_running_ticker(Path(path), cpus=4)
    with pyhv.Machine.restore(path) as machine:
        assert len(machine.vm.vcpus) == 4
        assert machine.run(0.3).cause == "timeout"
        counted = rounds(before + machine.console())
    assert counted == list(range(counted[0], counted[0] + len(counted)))


def test_a_host_that_lacks_something_is_refused_with_every_reason(tmp_path: Path) -> None:
    path = str(tmp_path / "s.pyhv")
    save_running_ticker(Path(path))
    with pyhv.Machine("hello") as machine:
        host = machine.choice.accelerator.describe()
    table = host.table
    lesser = table.replace({(1, 0): table.get(1)._replace(ecx=table.get(1).ecx & ~(1 << 13), edx=0x1F8BFBFF & ~1)})
    with file.open_snapshot(path) as snapshot:
        snapshot.needs.check(host, path)
        with pytest.raises(pyhv.Incompatible) as refusal:
            snapshot.needs.check(host._replace(table=lesser), path)
        assert {"cx16", "fpu"} <= {getattr(reason, "name", "") for reason in refusal.value.reasons}
        assert "cx16" in str(refusal.value) and "\n" not in str(refusal.value)
        with pytest.raises(pyhv.Incompatible, match="does not have MSR"):
            snapshot.needs.check(host._replace(msrs=(1, 2, 3)), path)
        slower = host._replace(tsc_khz=host.tsc_khz // 2, tsc_scaling=False)
        with pytest.raises(pyhv.Incompatible, match="TSC"):
            snapshot.needs.check(slower, path, strict_tsc=True)
    assert as_kvm_host(table).table.vendor == table.vendor


def test_nothing_is_left_behind_by_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "s.pyhv")
    save_running_ticker(Path(path))

    def fail(state: MachineState) -> None:
        raise pyhv.HostError("KVM_SET_SREGS2", 22)

    with pyhv.Machine.restore(path):
        pass
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("pyhv.vm.vm.Vm.apply", lambda self, state: fail(state))
    for _ in range(5):
        with pytest.raises(pyhv.HostError, match="KVM_SET_SREGS2"):
            pyhv.Machine.restore(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_cut_short_while_its_vm_runs(tmp_path: Path) -> None:
    """KVM_RUN fails with EFAULT, our own reads with an error: the process lives, and the message says what it was."""
    path = tmp_path / "s.pyhv"
    save_running_ticker(path)
    with pyhv.Machine.restore(str(path)) as machine:
        os.truncate(path, 0x3000)
        result = machine.run(20)
        assert result.cause in ("internal-error", "triple-fault", "not-executable"), result
        with pytest.raises(pyhv.HostError, match="shorter"):
            machine.vm.memory.read(0x3F0000, 4096)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.pyhv"
    save_running_ticker(path)
    good = path.read_bytes()
    chance = random.Random(1)
    with file.open_snapshot(str(path)) as snapshot:
        head, memory = snapshot.reader.memory_offset, snapshot.reader.memory_size
    for _ in range(40):
        damaged = bytearray(good)
        damaged[chance.randrange(head)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(pyhv.BadInput):
            pyhv.Machine.restore(str(path))
    damaged = bytearray(good)
    damaged[head + chance.randrange(memory)] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(pyhv.BadInput, match="is damaged: memory pages"):
        pyhv.Machine.restore(str(path), verify=True)
    for size in (0, 1, 63, head - 1, head, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(pyhv.BadInput):
            pyhv.Machine.restore(str(path))


def test_memory_that_the_host_does_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file claims: nothing is mapped before."""
    path = tmp_path / "s.pyhv"
    save_running_ticker(path, memory="40M")
    monkeypatch.setattr(guest_memory, "_available", lambda: 20 << 20)
    with pytest.raises(pyhv.BadInput, match=r"s\.pyhv: needs 40M for the guest and 1M for the kernel's tables of it"):
        pyhv.Machine.restore(str(path))
    with pyhv.Machine.restore(str(path), overcommit=True) as machine:
        assert machine.run(0.2).cause == "timeout"


def test_a_vm_that_cannot_be_saved_runs_on(tmp_path: Path) -> None:
    with pyhv.Machine("ticker", **TICKER) as machine:  # type: ignore[arg-type]
        machine.start()
        with pytest.raises((pyhv.BadInput, pyhv.HostError)):
            machine.save(str(tmp_path / "no such folder" / "s.pyhv"))
        assert machine.vm.running
        with pytest.raises((pyhv.BadInput, pyhv.HostError)):
            machine.save("/dev/full")
        assert machine.vm.running
        machine.pause()
        assert machine.vm.stopped is None
    with pyhv.Machine("hello") as machine:
        machine.run(20)
        with pytest.raises(pyhv.BadInput, match="has come to its end: it cannot be saved"):
            machine.save(str(tmp_path / "s.pyhv"))
    assert os.listdir(tmp_path) == []

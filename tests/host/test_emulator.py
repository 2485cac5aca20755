"""The software accelerator: what its guests get, how they are stopped, saved and moved, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import pyhv
from pyhv._native.link import PageSet
from pyhv._native.memory import Memory
from pyhv.accel import choose, long_mode, probe
from pyhv.accel import emulator as emulator_module
from pyhv.accel.data import Regs, Stop
from pyhv.accel.emulator import Emulator
from pyhv.errors import BadInput, NotAvailable
from tests.host import cli, emulator


@pytest.fixture(autouse=True)
def _emulator() -> None:
    emulator.require()


@pytest.fixture
def accelerator() -> Any:
    return choose.open_accelerator("emulator")


def run(image: str, **options: Any) -> pyhv.RunResult:
    with pyhv.Machine(image, accel="emulator", memory="4M", **options) as machine:
        return machine.run(30)


# ------------------------------------------------------------------------------------------- what guests see


def test_it_hides_everywhere(accelerator: Any) -> None:
    assert probe._probe(accelerator).faithful


def test_cpl_3_sees_what_cpl_0_sees() -> None:
    with pyhv.Machine("cpuid", accel="emulator", compat=True, append="cpl3") as machine:
        result = machine.run(30)
        assert (result.cause, result.status, machine.choice.intercept) == ("guest-exit", 0, "emulator")
    assert result.console.startswith(b"# CPL 3\n")
    assert result.console.splitlines()[1:] == run("cpuid", compat=True).console.splitlines()[1:]


def test_hidden_instructions_fault() -> None:
    """Of each instruction set that compatibility mode hides: #UD, but for what the library executes without asking."""
    lines = run("instructions", compat=True).console.decode().splitlines()
    came = {words[0]: " ".join(words[2:]) for words in map(str.split, lines)}
    faulted = {name for name, what in came.items() if what == "#UD"}
    assert faulted >= {
        *("ssse3", "sse4_1", "sse4_2", "popcnt", "fma4", "3dnow", "3dnowext", "rdtscp", "aes", "pclmulqdq", "sha_ni"),
        *("movbe", "rdrand", "rdseed", "adx", "bmi1", "bmi2", "clflushopt", "clwb", "xsave"),
    }
    assert (came["abm"], came["bmi1.tzcnt"]) == ("runs as BSR", "runs as BSF")


def test_vex_with_128_bits_is_taken_for_sse(accelerator: Any) -> None:
    """docs/emulator.md warns of it: hidden AVX does not fault throughout."""
    for code, stop in (("c5f058c2 f4", Stop.HALTED), ("c5f458c2 f4", Stop.TRIPLE_FAULT)):  # vaddps on XMM, YMM; hlt
        with Loop(accelerator, bytes.fromhex(code)) as loop:
            assert loop.vcpu.run().stop == stop


def test_shown_instructions_run() -> None:
    lines = run("instructions").console.decode().splitlines()
    visible = [line.split() for line in lines if " visible " in line]
    assert {words[0] for words in visible} >= {"ssse3", "sse4_2", "popcnt", "aes", "abm", "bmi1.tzcnt"}
    assert [words for words in visible if words[2:] != ["runs"]] == []


def test_what_it_lacks_is_not_advertised(accelerator: Any) -> None:
    offered = accelerator.describe().table.features()
    lacking = {"avx", "fma", "xsave", "f16c", "avx2", "svm", "vmx", "x2apic", "tsc_deadline_timer", "monitor"}
    assert not offered & lacking
    assert {"sse2", "cx16", "lm", "syscall", "nx"} <= offered


def test_each_cpuid_is_recorded() -> None:
    records: list[Any] = []
    with pyhv.Machine("cpuid", accel="emulator", compat=True, on_cpuid=records.append, append="cpl3") as machine:
        assert machine.run(30).cause == "guest-exit"
        assert {r.rip for r in records} == set(machine.image.cpuid_sites)
        assert {r.cpl for r in records} == {3}
        table = machine.guest.table
    leaf1 = next(r for r in records if r.leaf == 1)
    assert leaf1.guest[2] | 1 << 27 == table.get(1).ecx | 1 << 27
    assert len(records) == len({(r.leaf, r.subleaf) for r in records})


# ------------------------------------------------------------------------------------------------ exactness


# A counter in memory and one in a register, in one loop: `lock`-free read-modify-write, which must happen once.
_CODE = bytes.fromhex(
    "48ff0425 00800000"  # incq 0x8000
    "48ffc1"  #            inc rcx
    "48390c25 00800000"  # cmp [0x8000], rcx
    "74eb"  #              je back
    "f4"  #                hlt: they differ
)
_ENTRY, _SIZE = 0x6000, 0x10000


class Loop:
    """A vCPU in 64-bit mode at _CODE. A context manager."""

    def __init__(self, accelerator: Any, code: bytes = _CODE) -> None:
        self.memory = Memory(_SIZE)
        self.vm = accelerator.create_vm(irqchip=False)
        self.vm.map(0, _SIZE, self.memory.host)
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid(probe.least_table())
        table = long_mode.PRESENT | long_mode.WRITABLE
        tables = {0x1000: 0x2000 | table, 0x2000: 0x3000 | table, 0x3000: table | long_mode.LARGE_PAGE}
        for place, value in tables.items():
            self.memory.write(place, value.to_bytes(8, "little"))
        self.memory.write(0x4000, long_mode.gdt(0x4100))
        self.memory.write(_ENTRY, code)
        self.vcpu.set_sregs(long_mode.sregs(self.vcpu.get_sregs(), 0x1000, 0x4000, 0x4100))
        self.vcpu.set_regs(Regs(rip=_ENTRY, rsp=0x7000))

    def counter(self) -> int:
        return int.from_bytes(self.memory.read(0x8000, 8), "little")

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *exception: object) -> None:
        self.vcpu.close()
        self.vm.close()
        self.memory.close()


def kick_often(loop: Loop, times: int) -> set[Stop]:
    """Runs the loop and stops it from another thread, so often; why the runs ended."""
    ends: set[Stop] = set()
    for _ in range(times):
        timer = threading.Timer(0.001, loop.vcpu.kick)
        timer.start()
        ends.add(loop.vcpu.run().stop)
        timer.join()
    return ends


def test_a_stop_repeats_no_instruction(accelerator: Any) -> None:
    with Loop(accelerator) as loop:
        assert kick_often(loop, 200) == {Stop.KICKED}
        assert loop.counter() > 200
        assert loop.counter() - loop.vcpu.get_regs().rcx in (0, 1)


def test_a_stop_passes_over_no_callback(accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-stamp counter begins at 0 and is ours: EDX is 0 for an hour at 1 MHz. The processor's own is not."""
    code = bytes.fromhex(
        "48ff0425 00800000"  # incq 0x8000
        "0f31"  #              rdtsc
        "85d2"  #              test edx, edx
        "74f2"  #              jz back
        "f4"  #                hlt
    )
    monkeypatch.setattr(accelerator, "tsc_khz", 1000)
    with Loop(accelerator, code) as loop:
        assert kick_often(loop, 300) == {Stop.KICKED}


def test_a_stop_behind_the_byte_of_hlt_is_no_hlt(accelerator: Any) -> None:
    """`jnz` with the displacement 0xf4: a stop often finds the guest behind it, and it is not halted."""
    code = bytes.fromhex("ffc0" "ffc9" "ffc2" "ffc3" "90" "90" "75f4" "ebf2")
    with Loop(accelerator, code) as loop:
        loop.vcpu.set_regs(Regs(rip=_ENTRY, rcx=1))
        assert kick_often(loop, 100) == {Stop.KICKED}


def test_a_guest_that_loops_is_stopped() -> None:
    with pyhv.Machine("spin", accel="emulator", memory="4M") as machine:
        begin = time.monotonic()
        result = machine.run(0.2)
        assert result.cause == "timeout"
        assert time.monotonic() - begin < 2


def test_steps_and_runs_mix() -> None:
    with pyhv.Machine("dispatch", accel="emulator", memory="4M") as machine:
        for _ in range(300):
            assert machine.vm.vcpus[0].step().stop == Stop.DEBUG
        result = machine.run(30)
    assert (result.cause, result.status) == ("guest-exit", 0)


# -------------------------------------------------------------------------------------------- exceptions, ends


@pytest.mark.parametrize(
    ("act", "cause", "status"),
    [
        ("ud", "guest-exit", 70),
        ("triple-fault", "triple-fault", 121),
        ("fpu", "guest-exit", 0),
        ("halt", "halted", 0),
        ("reset", "reset", 0),
        ("unmapped", "guest-exit", 0),
        ("badport", "guest-exit", 0),
        ("status=7", "guest-exit", 7),
    ],
)
def test_ends(act: str, cause: str, status: int) -> None:
    result = run("faults", append=act)
    assert (result.cause, result.status) == (cause, status)


def test_code_where_there_is_no_memory(tmp_path: Path) -> None:
    """The words of a guest that has run away are the same kind as under KVM."""
    path = tmp_path / "image"
    path.write_bytes(bytes.fromhex("b8000000f0 ffe0"))  # jmp 0xf0000000
    result = run(str(path), boot="flat")
    assert (result.cause, result.status) == ("not-executable", 122)
    assert result.message == "vCPU 0: the emulator finds no instruction there: it is no RAM at rip 0xf0000000"


def test_an_event_that_is_not_emulated_is_the_guests_end(tmp_path: Path) -> None:
    """The library takes an IRET to virtual-8086 mode even in 64-bit mode; an exception there is not emulated."""
    frame = {0x70000: 0, 0x70004: 0x2000, 0x70008: 0x20002}  # EIP, CS, EFLAGS with VM; the rest is zero
    code = b"".join(b"\xc7\x04\x25" + at.to_bytes(4, "little") + to.to_bytes(4, "little") for at, to in frame.items())
    code += b"\x66\xc7\x04\x25" + (0x20000).to_bytes(4, "little") + b"\x0f\x0b"  # ud2 at 2000:0
    code += b"\xbc" + (0x70000).to_bytes(4, "little") + b"\xcf"  # mov $0x70000, %esp; iretl
    image = tmp_path / "vm86"
    image.write_bytes(code)
    result = run(str(image), boot="flat")
    assert (result.cause, result.status) == ("not-executable", 122)
    assert "the emulator: cannot do an exception or interrupt in virtual-8086 mode at rip 0x20000" in result.message


@pytest.mark.parametrize(("append", "cause"), [("", "power-off"), ("reset", "reset"), ("panic", "panic")])
def test_a_pc_ends_as_its_tables_say(append: str, cause: str) -> None:
    assert run("acpi", append=append).cause == cause


def test_the_apic_timer() -> None:
    begin = time.monotonic()
    result = run("timer", append="ms=100")
    assert result.console == b"timer: armed\ntimer: fired\n"
    assert time.monotonic() - begin >= 0.1


def test_input_reaches_the_guest() -> None:
    read, write = os.pipe()
    os.write(write, b"abcq")
    with pyhv.Machine("faults", accel="emulator", memory="4M", append="echo", console_in=read) as machine:
        result = machine.run(10)
    os.close(read)
    os.close(write)
    assert (result.cause, result.console) == ("guest-exit", b"abcq")


# -------------------------------------------------------------------------------------------- dirty pages


@pytest.mark.parametrize("how", ["scan", "fault"])
def test_dirty_pages(accelerator: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page that the guest writes is told, once; pages that it reads are not."""
    if how == "fault":
        monkeypatch.setenv("PYHV_DIRTY", how)
    code = bytes.fromhex(
        "4883c701"  #    add rdi, 1
        "881f"  #        mov [rdi], bl
        "488b0e"  #      mov rcx, [rsi]
        "f4"  #          hlt
    )
    with Loop(accelerator, code) as loop:
        # The page tables get their accessed bits now.
        loop.vcpu.set_regs(Regs(rip=_ENTRY, rdi=0x9000, rsi=0xA000))
        assert loop.vcpu.run().stop == Stop.HALTED
        loop.vm.log_dirty(True)
        pages = PageSet(_SIZE)
        loop.vm.take_dirty(pages.words)
        assert len(pages) == 0
        for written in (0xB, 0xC, 0xB):
            loop.vcpu.set_regs(Regs(rip=_ENTRY, rdi=written << 12, rsi=0xD000, rbx=written))
            assert loop.vcpu.run().stop == Stop.HALTED
            pages = PageSet(_SIZE)
            loop.vm.take_dirty(pages.words)
            assert pages.words[0] == 1 << written
        loop.vm.log_dirty(False)
        loop.vcpu.set_regs(Regs(rip=_ENTRY, rdi=0xE000, rsi=0xD000))
        assert loop.vcpu.run().stop == Stop.HALTED


# ------------------------------------------------------------------------------------------ saving and moving


def rounds(console: bytes) -> list[int]:
    lines = console.decode().split("\n")[:-1]
    return [int(line.split()[2]) for line in lines if line.startswith("ticker: round ")]


def save_ticker(path: Path, accel: str, seconds: float, **options: Any) -> bytes:
    with pyhv.Machine("ticker", accel=accel, memory="4M", append="pages=256 every=20", **options) as machine:
        assert machine.run(seconds).cause == "timeout"
        machine.save(str(path))
        return machine.console()


@pytest.mark.parametrize(("source", "target"), [("emulator", "emulator"), ("emulator", "kvm"), ("kvm", "emulator")])
def test_a_guest_goes_on_elsewhere_without_a_gap(source: str, target: str, tmp_path: Path) -> None:
    """Saved at many moments, so that every kind of instruction is met."""
    if "kvm" in (source, target):
        emulator.require_kvm()
    options = {"cpu": emulator.common_profile(tmp_path)}
    path = tmp_path / "t.pyhv"
    for attempt in range(12):
        before = save_ticker(path, source, 0.05 + 0.003 * attempt, **options)
        with pyhv.Machine.restore(str(path), accel=target) as machine:
            assert machine.choice.accelerator.name == target
            for _ in range(50):
                assert machine.run(0.1).cause == "timeout", machine.console()
                if rounds(machine.console()):
                    break
            counted = rounds(before + machine.console())
    assert counted == list(range(20, 20 * len(counted) + 1, 20))


def test_there_and_back(tmp_path: Path) -> None:
    emulator.require_kvm()
    path = tmp_path / "t.pyhv"
    seen = save_ticker(path, "emulator", 0.1, cpu=emulator.common_profile(tmp_path))
    for accel in ("kvm", "emulator", "kvm", "emulator"):
        with pyhv.Machine.restore(str(path), accel=accel) as machine:
            assert machine.run(0.3).cause == "timeout", machine.console()
            machine.save(str(path))
            seen += machine.console()
    counted = rounds(seen)
    assert counted == list(range(20, 20 * len(counted) + 1, 20))


@pytest.mark.parametrize(("source", "target"), [("emulator", "emulator"), ("emulator", "kvm"), ("kvm", "emulator")])
def test_a_guest_moves_while_it_runs(source: str, target: str, tmp_path: Path) -> None:
    if "kvm" in (source, target):
        emulator.require_kvm()
    profile, uri = emulator.common_profile(tmp_path), f"unix:{tmp_path}/m"
    arrived: list[pyhv.Machine] = []

    def receive() -> None:
        arrived.append(pyhv.Machine.receive(uri, accel=target, timeout=20))
        arrived[0].start()  # the source waits to hear of it

    waiting = threading.Thread(target=receive)
    with pyhv.Machine("ticker", accel=source, memory="4M", append="pages=256 every=20", cpu=profile) as machine:
        assert machine.run(0.2).cause == "timeout"
        machine.start()
        waiting.start()
        while not (tmp_path / "m").exists():
            time.sleep(0.01)
        machine.migrate(uri)
        waiting.join()
        before = machine.console()
    with arrived[0] as there:
        assert there.choice.accelerator.name == target
        assert there.run(0.5).cause == "timeout", there.console()
        counted = rounds(before + there.console())
    assert counted == list(range(20, 20 * len(counted) + 1, 20))


def test_a_timer_that_was_armed_fires_elsewhere(tmp_path: Path) -> None:
    emulator.require_kvm()
    path, profile = str(tmp_path / "t.pyhv"), emulator.common_profile(tmp_path)
    for source, target in (("emulator", "kvm"), ("kvm", "emulator")):
        with pyhv.Machine("timer", accel=source, memory="4M", append="ms=400", cpu=profile) as machine:
            for _ in range(100):
                assert machine.run(0.02).cause == "timeout"
                if b"armed" in machine.console():
                    break
            machine.save(path)
        with pyhv.Machine.restore(path, accel=target) as machine:
            result = machine.run(30)
            assert (result.cause, result.console) == ("guest-exit", b"timer: fired\n")


def test_what_cannot_move_is_refused_by_name(tmp_path: Path) -> None:
    """A guest that was shown kvmclock needs KVM."""
    emulator.require_kvm()
    path = str(tmp_path / "t.pyhv")
    with pyhv.Machine("ticker", accel="kvm", memory="4M", append="pages=64") as machine:
        assert machine.run(0.1).cause == "timeout"
        machine.save(path)
    with pytest.raises(pyhv.Incompatible, match=r"kvm_clocksource") as refusal:
        pyhv.Machine.restore(path, accel="emulator")
    assert "x2apic" in str(refusal.value)


# ------------------------------------------------------------------------------------------------- bad input


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env={**os.environ, **environment}
    )


def test_more_than_one_vcpu_is_refused() -> None:
    with pytest.raises(BadInput, match='2 vCPUs: the emulator runs one; use cpus=1, or accel="kvm"'):
        pyhv.Machine("hello", accel="emulator", cpus=2)


def test_the_ways_of_kvm_are_refused() -> None:
    for way in ("kernel", "trap"):
        with pytest.raises(BadInput, match=f'intercept="{way}": is KVM'):
            pyhv.Machine("hello", accel="emulator", intercept=way)


def test_a_library_that_is_missing_or_another(tmp_path: Path) -> None:
    open_it = "from pyhv.accel.emulator import Emulator\nEmulator()"
    missing = python(open_it, PYHV_UNICORN=str(tmp_path / "none.so"))
    assert "pip install 'pyhv[emulator]'" in missing.stderr.splitlines()[-1]
    other = tmp_path / "other.so"
    source = tmp_path / "other.c"
    real = ["version", "open", "close", "strerror", "ctl", "emu_start", "emu_stop", "reg_read", "reg_write"]
    real += ["mem_map_ptr", "mmio_map", "mem_write", "hook_add"]
    real += [f"context_{what}" for what in ("alloc", "save", "restore", "free", "size")]
    functions = "".join(f"unsigned uc_{name}(void) {{ return 0x02010300; }}\n" for name in real)
    source.write_text(functions)
    if subprocess.run(["cc", "-shared", "-fPIC", "-o", str(other), str(source)], check=False).returncode:
        pytest.skip("no compiler")
    wrong_version = "is version 2.1.3, pyhv knows 2.1.4 only"
    assert wrong_version in python(open_it, PYHV_UNICORN=str(other)).stderr
    (tmp_path / emulator_module.LIBRARY).symlink_to(other)
    in_system = "from pyhv.accel import emulator\nemulator.find_library = lambda: emulator.LIBRARY\nemulator.Emulator()"
    assert wrong_version in python(in_system, LD_LIBRARY_PATH=str(tmp_path)).stderr
    elsewhere = in_system.replace("\n", "\nemulator.LIBRARY = 'libno-such.so.2'\n", 1)
    assert "the emulator: libno-such.so.2 is not installed; pip install" in python(elsewhere).stderr
    source.write_text(functions.replace("uc_context_size", "uc_something"))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(other), str(source)], check=True)
    assert "has no function uc_context_size" in python(open_it, PYHV_UNICORN=str(other)).stderr


def test_one_line_says_what_was_taken_and_why() -> None:
    code = "from pyhv.accel import kvm\nkvm.DEVICE = '/dev/no-such-kvm'\nsys.exit(main(sys.argv[1:]))"
    done = cli.python(code, "run", "dispatch", "--compat")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "emulator" in done.stderr and "/dev/no-such-kvm: there is no such device" in done.stderr
    assert "path baseline" in done.stdout
    done = cli.python(code, "run", "hello", "--accel", "kvm")
    assert (done.returncode, done.stdout) == (2, "")


def test_trace_shows_every_cpuid() -> None:
    done = cli.call("trace", "cpuid", "--compat", "--append", "cpl3", "--accel", "emulator", "--json")
    *entries, end = (json.loads(line) for line in done.stdout.splitlines())
    assert (done.returncode, end["via"], end["executed"]) == (0, "emulator", len(entries))
    assert {entry["cpl"] for entry in entries} == {3}
    assert {"ssse3", "popcnt", "aes"} <= set(end["hidden"])


def test_host_says_what_it_offers() -> None:
    done = cli.call("host", "--accel", "emulator")
    assert "emulator, one vCPU in a VM" in done.stdout and "features that emulator offers" in done.stdout


def test_no_second_one_is_opened() -> None:
    assert choose.open_accelerator("emulator") is choose.open_accelerator("emulator")
    with pytest.raises(BadInput, match="choose one of auto, kvm, emulator"):
        choose.open_accelerator("qemu")
    assert issubclass(NotAvailable, BadInput) and Emulator.max_vcpus == 1


CUT_SHORT = """
import faulthandler, os, sys, pyhv
path = sys.argv[1]
with pyhv.Machine("ticker", append="every=1", accel="emulator", memory="64M") as machine:
    machine.run(timeout=0.2)
    machine.save(path)
if sys.argv[3] == "late":
    faulthandler.enable()
with pyhv.Machine.restore(path, accel="emulator") as machine:
    os.truncate(path, int(sys.argv[2]))
    result = machine.run(timeout=20)
print(result.cause, result.message)
"""


@pytest.mark.parametrize(
    ("size", "enabled"), [(4096, "early"), (8192, "early"), (1 << 20, "early"), (8192, "late"), (8192, "never")]
)
def test_a_snapshot_cut_short_under_its_guest_ends_the_guest_alone(size: int, enabled: str, tmp_path: Path) -> None:
    path = tmp_path / "s.pyhv"
    early = ["-X", "faulthandler"] if enabled == "early" else []
    command = [sys.executable, *early, "-c", CUT_SHORT, str(path), str(size), enabled]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    assert done.stdout.startswith(f"internal-error the snapshot {path} became shorter while its memory"), done
    assert done.stderr == ""


NO_CODE = """
import ctypes, os, sys
assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def without_executable_memory(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`pyhv` where memory cannot be writable and executable (PR_SET_MDWE, Linux 6.3)."""
    command = [sys.executable, "-c", NO_CODE, sys.executable, "-m", "pyhv", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "AssertionError" in done.stderr:
        pytest.skip("this kernel has no PR_SET_MDWE")
    return done


def test_without_writable_executable_memory_it_says_so() -> None:
    """The library itself would end the process with exit(1)."""
    done = without_executable_memory("run", "hello", "--accel", "emulator")
    assert (done.returncode, done.stdout) == (2, "")
    assert "writable and executable" in done.stderr and "MemoryDenyWriteExecute" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_writable_executable_memory_auto_takes_another_way() -> None:
    if not os.path.exists("/dev/kvm"):
        pytest.skip("there is no other way without KVM")
    done = without_executable_memory("run", "hello", "--compat")
    assert done.returncode == 0, done
    assert "hello" in done.stdout

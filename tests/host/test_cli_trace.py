"""`pyhv trace`: what it shows is what the guest executed and got."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyhv
from pyhv import guests
from pyhv.accel.tracepoint import Traced, Tracepoint, _Root
from pyhv.boot import recognise
from pyhv.cpu import dumps, features
from pyhv.cpu.feature_types import Word
from pyhv.cpu.host import Verdict
from pyhv.cpu.table import REGISTERS
from pyhv.errors import NotAvailable

from .cli import COMMAND, NOT_IN_THE_LAB, TIMEOUT, call, call_here, environment


def trace(*words: str) -> tuple[list[dict[str, Any]], dict[str, Any], subprocess.CompletedProcess[str]]:
    """Runs `pyhv trace WORDS --json`: the CPUIDs, the end, and the process."""
    done = call("trace", *words, "--json")
    values = [json.loads(line) for line in done.stdout.splitlines()]
    assert [value["event"] for value in values] == ["cpuid"] * (len(values) - 1) + ["end"], done.stderr
    return values[:-1], values[-1], done


def answers(entries: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {
        (int(entry["leaf"], 16), entry["subleaf"]): tuple(int(entry["guest"][name], 16) for name in REGISTERS)
        for entry in entries
    }


def printed(text: str) -> dict[tuple[int, int], tuple[int, ...]]:
    """The answers in what the guest `cpuid` printed."""
    lines = [line for line in text.splitlines() if line.startswith(("CPU", "   0x"))]
    return {key: tuple(registers) for key, registers in dumps.parse("\n".join(lines), "console").entries.items()}


def site() -> int:
    """The address of the guest's only CPUID instruction."""
    (address,) = recognise.read(guests.path("cpuid"), 64 << 20).cpuid_sites
    return address


@pytest.fixture
def tracefs() -> Iterator[str]:
    """tracefs as the tracepoint would use it; nothing of it may be left when the test ends."""
    try:
        root = _Root()
    except NotAvailable as error:
        pytest.skip(f"{error}")
    if not Path(root.path, "events/kvm/kvm_cpuid").exists():
        pytest.skip("this kernel has no kvm:kvm_cpuid")
    before = instances(root.path)
    yield root.path
    assert instances(root.path) == before
    root.close()


def instances(root: str) -> list[str]:
    return sorted(name for name in os.listdir(f"{root}/instances") if name.startswith("pyhv-"))


@pytest.mark.parametrize("compat", [True, False])
def test_a_machine_and_its_tracepoint(compat: bool, tracefs: str, verdict: Verdict) -> None:
    """In this process, so that emulated hosts can run it too: there RIP comes from kvm:kvm_exit."""
    if compat and not verdict.faithful:
        pytest.skip("this machine's KVM does not honour its CPUID table")
    seen: list[Traced] = []
    with pyhv.Machine("cpuid", compat=compat, intercept="kernel") as machine:
        with Tracepoint(seen.append, machine.image.cpuid_sites) as tracepoint:
            result = machine.run(timeout=300)
        assert (result.cause, tracepoint.lost) == ("guest-exit", 0)
    executed = [traced for traced in seen if traced.rip is not None]
    assert {traced.rip for traced in executed} == {site()}
    assert {traced.vcpu for traced in executed} <= {0, None}
    answers = {(traced.leaf, traced.subleaf): traced.guest for traced in executed}
    shown = printed(result.console.decode())
    assert len(shown) > 15
    for key, registers in shown.items():
        assert answers[key] == registers


@NOT_IN_THE_LAB
@pytest.mark.parametrize("compat", [True, False])
def test_trap_shows_what_the_guest_got(compat: bool) -> None:
    entries, end, done = trace("cpuid", "--via", "trap", *(["--compat"] if compat else []))
    assert (end["cause"], end["status"], end["via"], done.returncode) == ("guest-exit", 0, "trap", 0)
    seen = answers(entries)
    # What the guest printed is on stderr, and it is what the trace says it got. (In a dump leaves of zeros, or out of
    # range, may be left out.)
    for key, registers in printed(done.stderr).items():
        assert seen[key] == registers
    assert {entry["rip"] for entry in entries} == {f"{site():#x}"}
    assert {(entry["vcpu"], entry["cpl"]) for entry in entries} == {(0, 0)}
    assert end["executed"] == len(entries) == end["counters"]["cpuid_answered"]
    assert len(end["questions"]) == len(seen)


@NOT_IN_THE_LAB
def test_hidden_is_what_the_processor_has_and_the_guest_did_not_get() -> None:
    entries, end, _ = trace("cpuid", "--compat", "--via", "trap")
    hidden = set()
    for entry in entries:
        for name in entry["hidden"]:
            feature = features.find(name)
            assert feature.word == Word(int(entry["leaf"], 16), entry["subleaf"], feature.word.register)
            assert int(entry["hardware"][feature.word.register], 16) & feature.mask
            assert not int(entry["guest"][feature.word.register], 16) & feature.mask
        hidden.update(entry["hidden"])
    assert hidden == set(end["hidden"])
    if int(next(e for e in entries if e["leaf"] == "0x1")["hardware"]["ecx"], 16) >> 9 & 1:
        assert "ssse3" in hidden


@NOT_IN_THE_LAB
def test_in_words() -> None:
    done = call("trace", "dispatch", "--compat")
    assert done.returncode == 0
    assert "dispatch: path baseline" in done.stderr
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("0x1.0 "))
    assert lines[first].split()[1:3] == ["vcpu", "0"] and lines[first].split()[3] == "rip"
    assert lines[first + 1].split()[0] == "processor" and lines[first + 2].split()[0] == "guest"
    assert len(lines[first + 1].split()) == len(lines[first + 2].split()) == 5
    # Asked again, with the same answer: one line.
    again = next(i for i in range(first + 1, len(lines)) if lines[i].startswith("0x1.0 "))
    assert lines[again].endswith("as before")
    assert not lines[again + 1].startswith("  processor")
    assert any(line.startswith("hidden features: ") for line in lines)


@NOT_IN_THE_LAB
def test_the_guests_status_is_ours() -> None:
    assert call("trace", "refuse", "--compat").returncode == 42
    done = call("trace", "spin", "--timeout", "0.2")
    assert done.returncode == 124
    assert "timeout" in done.stderr


@NOT_IN_THE_LAB
def test_tracepoint_shows_what_the_guest_got(tracefs: str) -> None:
    entries, end, done = trace("cpuid", "--via", "tracepoint")
    assert (end["cause"], end["via"], end["lost"], done.returncode) == ("guest-exit", "tracepoint", 0, 0)
    seen = answers(entries)
    shown = printed(done.stderr)
    assert len(shown) > 20
    for key, registers in shown.items():
        assert seen[key] == registers
    assert {entry["vcpu"] for entry in entries} == {0}
    assert {entry["rip"] for entry in entries} == {f"{site():#x}"}
    assert {entry["cpl"] for entry in entries} == {None}


@NOT_IN_THE_LAB
def test_auto_is_what_run_would_do(tracefs: str) -> None:
    _, end, _ = trace("hello")
    assert end["via"] == "tracepoint"
    _, end, _ = trace("hello", "--intercept", "trap")
    assert end["via"] == "trap"


@NOT_IN_THE_LAB
def test_compat_is_traced_through_trap_where_the_kernel_does_not_hide(unfaithful: None) -> None:
    _, end, done = trace("dispatch", "--compat", "--accel", "kvm")
    assert end["via"] == "trap"
    assert "path baseline" in done.stderr


def test_compat_is_traced_through_the_kernel_where_it_hides(
    faithful: None, tracefs: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call_here(capfd, "trace", "cpuid", "--compat", "--json")
    *entries, end = (json.loads(line) for line in out.splitlines())
    assert (status, end["cause"], end["via"], end["lost"]) == (0, "guest-exit", "tracepoint", 0)
    seen = answers([entry for entry in entries if entry["rip"] is not None])
    for key, registers in printed(err).items():
        assert seen[key] == registers
    for name in ("ssse3", "sse4_1", "popcnt", "avx"):
        feature = features.find(name)
        assert not seen[1, 0][REGISTERS.index(feature.word.register)] & feature.mask


@NOT_IN_THE_LAB
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_instance_goes_on_every_way_out(number: signal.Signals, tracefs: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "trace", "ticker", "--mem", "4M", "--via", "tracepoint"], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    assert f"pyhv-{process.pid}" in instances(tracefs)  # the fixture's check is able to fail
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number


@NOT_IN_THE_LAB
def test_a_killed_predecessors_instance_goes_with_the_next(tracefs: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "trace", "ticker", "--mem", "4M", "--via", "tracepoint"], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=TIMEOUT)
    assert f"pyhv-{process.pid}" in instances(tracefs)
    assert call("trace", "hello", "--via", "tracepoint").returncode == 0
    assert f"pyhv-{process.pid}" not in instances(tracefs)


@NOT_IN_THE_LAB
def test_other_processes_are_not_traced(tracefs: str) -> None:
    with Tracepoint(lambda traced: seen.append(traced.thread)) as tracepoint:
        seen: list[int] = []
        other = threading.Thread(target=call, args=("run", "cpuid"))  # a child of ours, traced
        other.start()
        other.join()
        assert tracepoint.lost == 0
    children = set(seen)
    assert len(children) == 1
    neighbour = subprocess.Popen(
        [*COMMAND, "run", "ticker", "--mem", "4M", "--timeout", "30"], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    try:
        assert neighbour.stdout is not None
        neighbour.stdout.readline()
        entries, end, _ = trace("dispatch", "--via", "tracepoint")
        assert 0 < end["executed"] == len(entries) < 10
    finally:
        neighbour.terminate()
        neighbour.communicate(timeout=TIMEOUT)


@NOT_IN_THE_LAB
def test_who_may_not_use_tracefs_is_told_what_to_do(tracefs: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become a user who may not")
    code = (
        "import os, sys\n"
        "from pyhv.accel import choose, tracepoint\n"
        "from pyhv.cli import failure, main, run, trace, host\n"
        "from pyhv import guests\n"
        "from pyhv.machine import Machine\n"
        "make = tracepoint.Tracepoint.__enter__\n"
        "def drop(self):\n"
        "    os.seteuid(65534)\n"
        "    return make(self)\n"
        "tracepoint.Tracepoint.__enter__ = drop\n"
        "import ctypes\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, "trace", "hello", *words], stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=TIMEOUT, check=False, env=environment(),
        )  # fmt: skip

    done = run("--via", "tracepoint")
    assert done.returncode == 2
    assert done.stderr == "pyhv: tracefs: this user may not use it; run as root, or use --via trap\n"

"""`pyhv run` as a script uses it: console, exit statuses, JSON, pipes and signals."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pyhv.cpu.table import CpuidTable

from .cli import COMMAND, IN_THE_LAB, LAB_REASON, TIMEOUT, call, call_json, environment

if IN_THE_LAB:
    pytest.skip(LAB_REASON, allow_module_level=True)

# The published list of what compatibility mode hides, and what came with it (names of features.toml).
PUBLISHED = {
    "ssse3", "sse4_1", "sse4_2", "popcnt", "xsave", "avx", "abm", "sse4a", "misalignsse", "xop", "fma4", "f16c",
    "3dnow", "3dnowext",
}  # fmt: skip


def test_hello() -> None:
    done = call("run", "hello", "--append", "some words")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "hello from a pyhv guest\ncommand line: some words\n"


@pytest.mark.parametrize("words", [("status=0",), ("status=2",), ("status=42",), ("status=255",)])
def test_the_status_is_the_guests(words: tuple[str, ...]) -> None:
    done = call("run", "faults", "--append", *words)
    assert (done.returncode, done.stderr) == (int(words[0].partition("=")[2]), "")


@pytest.mark.parametrize(
    ("word", "status", "cause", "line"),
    [
        ("triple-fault", 121, "triple-fault", "pyhv: vCPU 0: triple fault at rip 0x1"),
        ("halt", 0, "halted", "pyhv: vCPU 0: halted"),
        ("reset", 0, "reset", "pyhv: vCPU 0: the guest asked for a reset"),
    ],
)
def test_other_ends_say_what_happened(word: str, status: int, cause: str, line: str) -> None:
    done = call("run", "faults", "--append", word)
    assert done.returncode == status
    assert done.stderr.startswith(line)
    if status:
        assert "   rip 0000000000" in done.stderr  # the registers
    value = call_json("run", "faults", "--append", word)
    assert (value["cause"], value["status"], value["exit"]) == (cause, status, status)
    assert f"pyhv: {value['message']}".startswith(line)


def test_timeout() -> None:
    done = call("run", "spin", "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (124, "spin: for ever\n")
    assert done.stderr.startswith("pyhv: timeout: the guest was still running; vCPU 0 at rip 0x1")
    value = call_json("run", "spin", "--timeout", "0.2")
    assert (value["cause"], value["console"]) == ("timeout", "spin: for ever\n")
    # The cause settles what a status cannot.
    value = call_json("run", "faults", "--append", "status=124")
    assert (value["cause"], value["exit"]) == ("guest-exit", 124)


@pytest.mark.parametrize("accel", ["kvm", "emulator"])
def test_timeout_where_no_signal_can_be_queued(accel: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    done = subprocess.run(
        [*COMMAND, "run", "spin", "--timeout", "0.2", "--accel", accel],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, limits[1])),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (124, "spin: for ever\n")


def test_compat_hides_the_published_list() -> None:
    value = call_json("run", "cpuid", "--compat")
    assert (value["cause"], value["status"], value["exit"], value["profile"]) == ("guest-exit", 0, 0, "hyperv-r2")
    assert not PUBLISHED & set(value["features"])
    assert {"fpu", "sse2", "cx16", "lm"} <= set(value["features"])
    # The table is the one in the bytes that the guest sent.
    table = CpuidTable.from_json(value["cpuid"])
    assert set(table.to_cpuid_r().splitlines()) <= set(value["console"].splitlines())  # a dump leaves out some zeros
    assert table.features() == set(value["features"])


def test_what_is_hidden_is_there_without_compat() -> None:
    """The check above is able to fail: something of the list is visible in the same guest with the host's profile."""
    value = call_json("run", "cpuid")
    if not PUBLISHED & set(value["features"]):
        pytest.skip("this host offers nothing of the published list")
    assert value["profile"] == "host"


def test_programs_that_adapt_and_that_do_not() -> None:
    done = call("run", "refuse", "--compat")
    assert (done.returncode, done.stdout) == (42, "refuse: this program needs SSE4.2\n")
    done = call("run", "dispatch", "--compat")
    assert done.returncode == 0
    assert "path baseline" in done.stdout


def test_json_of_a_guest_that_prints_no_cpuid() -> None:
    value = call_json("run", "hello", "--cpus", "2", "--mem", "32M")
    assert (value["vcpus"], value["console"]) == (2, "hello from a pyhv guest\n")
    assert value["counters"]["port_io"] > 20
    assert "cpuid" not in value and "features" not in value


def test_json_of_bad_input() -> None:
    done = call("run", "hello", "--mem", "0", "--json")
    value = json.loads(done.stdout)
    assert done.returncode == 2
    assert (value["cause"], value["status"]) == ("usage", 2)
    assert done.stderr == f"pyhv: {value['message']}\n"


def test_stdin_is_the_console() -> None:
    done = subprocess.run(
        [*COMMAND, "run", "faults", "--append", "echo"], input=b"some text\x01x\x03 and q", capture_output=True,
        timeout=TIMEOUT, check=False, env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"some text\x01x\x03 and q", b"")


@pytest.mark.parametrize("descriptors", [(0,), (0, 2), (0, 1, 2), (1,)])
def test_closed_descriptors(descriptors: tuple[int, ...]) -> None:
    closing = " ".join(f"{number}>&-" for number in descriptors)
    done = subprocess.run(
        ["sh", "-c", f"exec {' '.join(COMMAND)} run hello {closing}"], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=TIMEOUT, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == (b"" if 1 in descriptors else b"hello from a pyhv guest\n")
    assert done.stderr == b""


@pytest.mark.parametrize("command", ["run", "trace"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run(command: str, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, command, "ticker", "--mem", "4M"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    console = process.stdout if command == "run" else process.stderr
    assert console is not None
    while b"ticker:" not in console.readline():
        assert process.poll() is None
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number
    assert b"pyhv: interrupted; vCPU 0 at rip 0x1" in err
    assert b"Traceback" not in err
    if command == "trace":
        assert b"hidden features: " in out
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "words",
    [
        ("run", "ticker", "--append", "every=1", "--timeout", "50"),
        ("run", "cpuid"),
        ("trace", "ticker", "--mem", "4M", "--timeout", "50"),
        ("features",),
    ],
)
def test_a_reader_that_goes_away_ends_it_quietly(words: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [*COMMAND, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        env=environment(),
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    err = process.stderr.read()
    status = process.wait(TIMEOUT)
    # What is short may have ended before anybody noticed.
    assert status == -signal.SIGPIPE or (status == 0 and "ticker" not in words)
    assert b"Traceback" not in err and b"Broken" not in err
    if words[0] != "trace":  # there stderr is the guest's console
        assert err == b""
    else:
        assert b"pyhv:" not in err


@pytest.mark.parametrize("words", [("features",), ("run", "hello", "--json"), ("--help",), ("ls",)])
def test_a_full_disk_is_said(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {' '.join([*COMMAND, *words])} >/dev/full"], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=TIMEOUT, check=False, env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (125, b"pyhv: stdout: No space left on device, output is missing\n")


@pytest.mark.parametrize("words", [("--accel", "kvm"), ("--accel", "emulator"), ("--name", "full")])
def test_a_console_that_cannot_be_written_is_an_error(words: tuple[str, ...], base: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {' '.join([*COMMAND, 'run', 'hello', *words])} >/dev/full"], stdin=subprocess.DEVNULL,
        capture_output=True, timeout=TIMEOUT, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 125
    assert done.stderr.startswith(b"pyhv: console: No space left on device")
    assert b"24 bytes of the guest's output are lost" in done.stderr
    if "--name" in words:  # and is kept, for who asks later
        kept = json.loads(call("status", "full", "--json").stdout)
        assert (kept["state"], kept["cause"], kept["status"]) == ("ended", "internal-error", 125)
        assert done.stderr.decode() == f"pyhv: {kept['message']}\n"
        assert call("log", "full").stdout == "hello from a pyhv guest\n"


@pytest.mark.parametrize("accel", ["kvm", "emulator"])
def test_input_that_is_there_before_the_guest_reaches_it(accel: str) -> None:
    text = "".join(chr(ord("a") + n % 16) for n in range(200)) + "q"
    done = subprocess.run(
        [*COMMAND, "run", "faults", "--append", "echo", "--accel", accel], input=text, capture_output=True, text=True,
        timeout=TIMEOUT, check=False, env=environment(),
    )  # fmt: skip
    assert done.stdout.endswith(text), done.stdout


def test_two_runs_at_once() -> None:
    command = [*COMMAND, "run", "cpuid"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment())
        for _ in range(4)
    ]
    outputs = {process.communicate(timeout=TIMEOUT)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(outputs) == 1


def test_a_file_and_a_guest_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"\xb0\x09\xe6\xf4\xf4")  # mov al, 9; out 0xf4, al; hlt
    done = subprocess.run(
        [*COMMAND, "run", "./hello", "--boot", "flat"], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True,
        timeout=TIMEOUT, check=False, env=environment() | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    # Nothing but, where KVM is no ordinary one, a word on who runs a kernel that says nothing of itself.
    said = [line for line in done.stderr.splitlines() if not line.startswith(b"pyhv: the emulator runs the guest: ")]
    assert (done.returncode, done.stdout, said) == (9, b"", [])

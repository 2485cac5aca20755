"""The terminal: keys reach the guest, the escape key works, and the settings are back on every way out."""

from __future__ import annotations

import os
import random
import signal
import sys
import termios
import time
from pathlib import Path

import pytest

from .cli import COMMAND, IN_THE_LAB, LAB_REASON, LONG, SUMS, Terminal, summed

if IN_THE_LAB:
    pytest.skip(LAB_REASON, allow_module_level=True)

ECHO = ("run", "faults", "--append", "echo")


def assert_restored(terminal: Terminal) -> None:
    assert terminal.settings == terminal.settings_before


def test_keys_reach_the_guest_and_its_end_restores_the_terminal() -> None:
    with Terminal(*ECHO) as terminal:
        terminal.wait_until_raw()
        # What a terminal would otherwise act on: Ctrl-Z, Ctrl-S, Ctrl-D, Ctrl-\, Ctrl-V, carriage return
        for keys in (b"abc", b"\x1a", b"\x13\x11", b"\x04", b"\x1c", b"\x16", b"\r", b"\xc3\xa4"):
            terminal.send(keys)
            terminal.read_until(keys)
        terminal.send(b"q")
        assert terminal.wait() == 0
        assert_restored(terminal)


def test_what_a_guest_does_not_take_is_not_dropped_without_a_word() -> None:
    with Terminal("run", "spin") as terminal:
        terminal.wait_until_raw()
        for _ in range(300):  # more than the pipe has room for, and more than is kept
            terminal.send(b"x" * 4096)
        terminal.read_until(b"the guest does not take its input: what goes beyond 1 MiB of it is lost")
        terminal.send(b"\x01x")
        assert terminal.wait() == 130
        assert_restored(terminal)


@pytest.mark.parametrize("name", [(), ("--name", "t")])
def test_a_long_paste_reaches_the_guest_whole(name: tuple[str, ...], tmp_path: Path, base: Path) -> None:
    (tmp_path / "sums").write_bytes(SUMS)
    with Terminal("run", str(tmp_path / "sums"), "--boot", "flat", "--mem", "2M", "--accel", "kvm", *name) as terminal:
        terminal.wait_until_raw()
        terminal.paste(LONG)
        assert terminal.wait() == 0
        assert terminal.output == summed(LONG)
        assert_restored(terminal)


def test_a_long_paste_is_echoed_whole() -> None:
    text = LONG[-(1 << 16) - 1 :]
    with Terminal(*ECHO) as terminal:
        terminal.wait_until_raw()
        terminal.paste(text)
        assert terminal.wait() == 0
        assert terminal.output == text


def test_a_lone_newline_starts_a_line() -> None:
    with Terminal("run", "hello") as terminal:
        assert terminal.wait() == 0
        assert b"hello from a pyhv guest\r\n" in terminal.output
        assert_restored(terminal)


def test_escape_key() -> None:
    with Terminal(*ECHO) as terminal:
        terminal.wait_until_raw()
        terminal.send(b"\x01h")
        terminal.read_until(b"Ctrl-A x: end the VM")
        terminal.send(b"\x01\x01.")
        assert terminal.read_until(b".").endswith(b"\x01.")
        terminal.send(b"\x03")
        found = terminal.read_until(b"Ctrl-C went to the guest; Ctrl-A x ends the VM")
        if b"\x03" not in found:  # the guest's echo may come first or second
            terminal.read_until(b"\x03")
        terminal.send(b"\x01x")
        assert terminal.wait() == 130
        assert b"pyhv: interrupted; vCPU 0 at rip 0x1" in terminal.output
        assert_restored(terminal)


def test_escape_key_ends_a_guest_that_reads_nothing() -> None:
    with Terminal("run", "spin") as terminal:
        terminal.wait_until_raw()
        for _ in range(40):  # far more than the guest's FIFO and the pipe in front of it hold
            terminal.send(b"k" * 4000)
            time.sleep(0.002)
        terminal.send(b"\x01x")
        assert terminal.wait() == 130
        assert_restored(terminal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_signals_restore_the_terminal(number: signal.Signals) -> None:
    with Terminal("run", "ticker") as terminal:
        terminal.wait_until_raw()
        terminal.process.send_signal(number)
        assert terminal.wait() == 128 + number
        assert_restored(terminal)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("run", "spin", "--timeout", "0.1"), 124),
        (("run", "faults", "--append", "triple-fault"), 121),
        (("run", "faults", "--append", "status=7"), 7),
        (("trace", "hello"), 0),
        (("run", "nosuch"), 2),
    ],
)
def test_every_end_restores_the_terminal(words: tuple[str, ...], status: int) -> None:
    with Terminal(*words) as terminal:
        assert terminal.wait() == status
        assert_restored(terminal)


def test_an_internal_error_restores_the_terminal() -> None:
    code = """
import sys
from pyhv.cli import main
from pyhv.vm.vm import Vm
def fail(self, timeout):
    raise RuntimeError("raw now")
Vm.wait = fail
sys.exit(main(["run", "hello"]))
"""
    with Terminal(command=[sys.executable, "-c", code]) as terminal:
        assert terminal.wait() == 125
        assert b"pyhv: internal error: RuntimeError: raw now; please report" in terminal.output
        assert_restored(terminal)


def test_the_checker_sees_a_terminal_that_stayed_raw() -> None:
    """Nobody can do anything after SIGKILL: the one way out that leaves the terminal as it is."""
    with Terminal("run", "ticker") as terminal:
        terminal.wait_until_raw()
        terminal.process.kill()
        assert terminal.wait() == -signal.SIGKILL
        with pytest.raises(AssertionError):
            assert_restored(terminal)


def test_signals_at_any_moment() -> None:
    """From before the first line of Python to after the guest's end; several at once."""
    moments = random.Random(1)
    seen = set()
    for _ in range(30):
        with Terminal("run", "ticker", "--append", "rounds=1", "--mem", "4M") as terminal:
            time.sleep(moments.uniform(0, 0.25))
            for number in moments.choices([signal.SIGTERM, signal.SIGHUP, signal.SIGINT], k=moments.randint(1, 3)):
                if terminal.process.poll() is None:
                    terminal.process.send_signal(number)
            status = terminal.wait()
            seen.add(status)
            # Python itself has status 1 for a SIGINT while it starts.
            assert status in (0, 129, 130, 143, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT, 1), terminal.output
            assert b"internal error" not in terminal.output
            assert_restored(terminal)
    assert len(seen) > 1  # the moments were not all the same


def test_stopped_and_continued() -> None:
    """What stops a program gives the terminal back to a shell, which makes it an ordinary one."""
    with Terminal(*ECHO) as terminal:
        terminal.wait_until_raw()
        terminal.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, terminal.process.pid, os.WSTOPPED)
        terminal.change(terminal.settings_before)
        terminal.process.send_signal(signal.SIGCONT)
        terminal.wait_until_raw()
        terminal.send(b"x")
        terminal.read_until(b"x")
        terminal.send(b"q")
        assert terminal.wait() == 0
        assert_restored(terminal)


def test_in_the_background_the_terminal_is_left_alone() -> None:
    words = " ".join([*COMMAND, "run", "ticker", "--append", "rounds=2", "--mem", "4M"])
    script = f"set -m; {words} & wait $!; echo status $?"
    with Terminal(command=["bash", "-c", script]) as terminal:
        while b"status" not in terminal.output and terminal.process.poll() is None:
            assert terminal.settings == terminal.settings_before
            terminal._read(0.005)
        assert terminal.wait() == 0
        assert b"status 0" in terminal.output


def test_captured_output_leaves_the_terminal_alone() -> None:
    with Terminal("run", "ticker", "--json", "--append", "rounds=2", "--mem", "4M") as terminal:
        while terminal.process.poll() is None:
            assert terminal.settings == terminal.settings_before
            terminal._read(0.005)
        assert terminal.wait() == 0
        assert b'"cause": "guest-exit"' in terminal.output


def test_a_hangup_ends_the_run() -> None:
    with Terminal("run", "spin") as terminal:
        terminal.wait_until_raw()
        # The terminal's end is near: its foreground is told.
        os.killpg(os.getpgid(terminal.process.pid), signal.SIGHUP)
        assert terminal.wait() == 129
        assert terminal.settings[3] & termios.ICANON

"""A Linux guest that checks its own work (tests/lab/guest/work.c), on pyhv's emulator beside QEMU's TCG: both must find
it right, and find the same. It needs no host of the lab, only its kernel and its QEMU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.lab import linux, packages

#: For the emulator about a minute on a processor of its own, for QEMU half of it.
ROUNDS = 60
LINE = f"console=ttyS0 quiet panic=-1 no_timer_check rounds={ROUNDS}"
LIMIT = 900


def lines(console: str) -> list[str]:
    return re.findall(r"^(work: .*?)\r?$", console, re.MULTILINE)


def on_the_emulator(guest: Path) -> str:
    command = [sys.executable, "-m", "pyhv", "run", str(guest / "vmlinux"), "--initrd", str(guest / "initrd")]
    command += ["--mem", "128M", "--accel", "emulator", "--append", LINE, "--timeout", str(LIMIT), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT + 60)
    result = json.loads(done.stdout)
    assert (done.returncode, result["cause"]) == (0, "reset"), result
    return str(result["console"])


def on_tcg(guest: Path) -> str:
    command = ["qemu-system-x86_64", "-accel", "tcg", "-M", "pc", "-cpu", "qemu64", "-m", "128"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]
    command += ["-kernel", str(guest / "vmlinux"), "-initrd", str(guest / "initrd"), "-append", LINE]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    return done.stdout.decode(errors="replace")


def test_the_emulator_and_tcg_do_the_same_work() -> None:
    packages.provide({"amd"})
    guest = linux.worker()
    expected = lines(on_tcg(guest))
    assert expected[-1] == "work: end right"
    assert len(expected) == 8 + 300 * ROUNDS + 1
    assert lines(on_the_emulator(guest)) == expected

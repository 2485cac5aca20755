"""The examples run as they are, and do what they say. Each is a program of its own, started as a user would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .cli import NOT_IN_THE_LAB, TIMEOUT, environment
from .named import TICKER, detach, ok

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = NOT_IN_THE_LAB

# What each prints, whatever the host; control_socket.py and boot_kernel.py have tests of their own.
PRINTS = {
    "can_it_move": r"host.pyhv can run on this host\n(.*\n)*.*compat.pyhv can run on this host",
    "console_dialogue": r"repeated the number 17\nit ended: guest-exit 0\n$",
    "custom_profile": r"hidden: .*\bsse4_2\b.*\nrefuse: this program needs SSE4.2\nstatus 42\n$",
    "live_migration": r"moved in \d+ ms, .*\nthere it ended: guest-exit 0, .*: done, all was well\n$",
    "parallel_suite": r"^(ok   .*\n){5}$",
    "snapshot_clones": r"^4 copies went on\n$",
    "test_guest": r"4 passed",
    "trace_cpuid": r"leaf 0x7.0: read \d+ times\n    ebx  processor [0-9a-f]{8}  guest 00000000\n",
}


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    how = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if name.startswith("test_") else []
    return subprocess.run(
        [sys.executable, *how, str(EXAMPLES / f"{name}.py"), *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment(),
    )


@pytest.mark.parametrize("name", PRINTS)
def test_an_example(name: str) -> None:
    done = run(name)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(PRINTS[name], done.stdout), done.stdout


def test_boot_kernel() -> None:
    done = run("boot_kernel", "pvh", "--until", "pvh: ")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("boot_kernel", "hello", "--until", "never said")
    assert done.returncode == 1
    assert "hello from a pyhv guest" in done.stderr and "never said" in done.stderr


def test_control_socket(base: Path, tmp_path: Path) -> None:
    detach("t", *TICKER)
    done = run("control_socket", "t", "status")
    assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "running")
    assert run("control_socket", "t", "save", f"path={tmp_path / 't.pyhv'}").returncode == 0
    assert (tmp_path / "t.pyhv").exists()
    done = run("control_socket", "t", "no-such-method")
    assert done.returncode == 1 and done.stderr.startswith("control_socket: t: ")
    ok("stop", "t")


def test_every_example_is_tried_and_listed() -> None:
    there = {path.stem for path in EXAMPLES.glob("*.py")}
    assert there == {*PRINTS, "boot_kernel", "control_socket"}
    assert set(re.findall(r"^\| `(\w+)\.py`", (EXAMPLES / "README.md").read_text(), re.MULTILINE)) == there

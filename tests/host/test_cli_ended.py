"""What can be learned of a VM with a name once it has ended: pyhv status, wait, log, ls --all, clear; and --reboot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pyhv.control import client, ended

from .cli import COMMAND, IN_THE_LAB, LAB_REASON, TIMEOUT, call, environment
from .named import ECHO, TICKER, detach, ok, status, wait_for

if IN_THE_LAB:
    pytest.skip(LAB_REASON, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("base")


def gone(pid: int) -> None:
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))


def test_the_result_the_registers_and_the_console_are_kept() -> None:
    pid = detach("t", "run", "faults", "--append", "triple-fault")
    assert call("wait", "t").returncode == 121
    gone(pid)
    kept = json.loads(ok("status", "t", "--json"))
    assert (kept["state"], kept["cause"], kept["status"], kept["pid"]) == ("ended", "triple-fault", 121, pid)
    assert "triple fault" in kept["message"] and "rip" in kept["registers"] and kept["counters"]
    shown = ok("status", "t")
    assert "triple-fault" in shown and kept["registers"] in shown
    assert call("log", "t").returncode == 0
    line = ok("ls", "--all").splitlines()[1]
    assert line.startswith("t     ended: triple-fault, 121")
    assert ok("ls").splitlines()[1:] == []
    done = call("pause", "t")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("pyhv: t: has ended: vCPU 0: triple fault")
    assert done.stderr.endswith("; pyhv status t and pyhv log t tell more\n")
    assert ok("clear", "t") == ""
    assert "there is no running VM of this name" in call("status", "t").stderr
    assert ok("ls", "--all").splitlines()[1:] == []


def test_wait_waits_and_has_the_guests_status() -> None:
    detach("t", *ECHO)
    assert call("wait", "t", "--timeout", "0.2").returncode == 124
    with subprocess.Popen([*COMMAND, "wait", "t"], env=environment()) as waiting:
        ok("stop", "t")
        assert waiting.wait(TIMEOUT) == 0


def test_notes_are_kept(unfaithful: None) -> None:
    call("run", "hello", "--compat", "--accel", "kvm", "--intercept", "trap", "--name", "t", "--detach")
    assert call("wait", "t").returncode == 0
    (note,) = status("t")["notes"]
    assert "trap" in note


def test_the_log_of_a_vm_that_runs_and_of_one_that_has_ended() -> None:
    detach("t", *TICKER)
    wait_for(lambda: "round 1\n" in ok("log", "t"))
    ok("stop", "t")
    assert "round 1\n" in ok("log", "t")


def test_one_that_was_killed_is_known() -> None:
    pid = detach("t", *TICKER)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    assert ok("ls").splitlines()[1:] == []
    assert call("wait", "t").returncode == 125
    assert "was killed or has crashed" in ok("status", "t")


def test_a_vm_that_is_killed_while_somebody_waits() -> None:
    pid = detach("t", *TICKER)
    waiting = subprocess.Popen([*COMMAND, "wait", "t", "--json"], stdout=subprocess.PIPE, env=environment())
    wait_for(lambda: any(name.startswith("socket") for name in links(waiting.pid)))
    os.kill(pid, signal.SIGKILL)
    out, _ = waiting.communicate(timeout=TIMEOUT)
    assert (waiting.returncode, json.loads(out)["cause"]) == (125, "internal-error")


def links(pid: int) -> list[str]:
    folder = Path(f"/proc/{pid}/fd")
    return [os.readlink(entry) for entry in folder.iterdir() if entry.is_symlink()]


def test_a_name_that_is_used_again_has_nothing_of_the_last_vm(base: Path) -> None:
    detach("t", "run", "hello")
    call("wait", "t")
    detach("t", *TICKER)
    assert status("t")["state"] == "running"
    assert [path.name for path in (base / "pyhv").iterdir()] == ["t.sock"]
    ok("stop", "t")


def test_only_so_many_are_kept(base: Path) -> None:
    (base / "pyhv").mkdir(mode=0o700)
    fd = os.open(base / "pyhv", os.O_RDONLY)
    for number in range(ended.KEPT + 3):
        ended.leave(fd, f"vm{number}", {"name": f"vm{number}", "state": "ended"})
    os.close(fd)
    kept = [name for name, _ in client.all_ended([])]
    assert sorted(kept) == sorted(f"vm{number}" for number in range(3, ended.KEPT + 3))
    assert ok("clear", "--all") == "" and client.all_ended([]) == []


def test_what_is_kept_is_no_trap(base: Path) -> None:
    """A file that is damaged, or somebody's link, is as good as none."""
    (base / "pyhv").mkdir(mode=0o700)
    for name, content in (("a", "{"), ("b", "[1]"), ("c", "[" * 100000), ("d", "\xff")):
        (base / "pyhv" / f"{name}.ended").write_text(content, encoding="latin-1")
    (base / "pyhv" / "e.ended").symlink_to("/etc/passwd")
    for name in "abcde":
        assert "there is no running VM of this name" in call("status", name).stderr
    assert ok("ls", "--all").splitlines()[1:] == []


def test_stop_of_one_that_has_ended_is_no_failure() -> None:
    detach("t", "run", "hello")
    call("wait", "t")
    done = call("stop", "t", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["cause"] == "guest-exit"


def test_two_stops_at_once() -> None:
    for _ in range(5):
        detach("t", *TICKER)
        stops = [subprocess.Popen([*COMMAND, "stop", "t"], env=environment()) for _ in range(3)]
        assert [stop.wait(TIMEOUT) for stop in stops] == [0, 0, 0]


# --------------------------------------------------------------------------------------------------------- reboots

# mov dx, 0x3f8; mov al, "x"; out dx, al; mov al, 0xfe; out 0x64, al; hlt
PRINTS_AND_RESETS = bytes.fromhex("66baf803 b078 ee b0fe e664 f4")


@pytest.fixture
def resets(tmp_path: Path) -> tuple[str, ...]:
    """A guest that prints a letter and resets itself."""
    (tmp_path / "resets").write_bytes(PRINTS_AND_RESETS)
    return ("run", str(tmp_path / "resets"), "--boot", "flat", "--mem", "2M", "--accel", "kvm", "--reboot")


def test_a_named_vm_can_be_started_again(resets: tuple[str, ...]) -> None:
    pid = detach("t", *resets)
    wait_for(lambda: ok("log", "t").count("x") > 3)
    assert status("t")["pid"] == pid and status("t")["state"] == "running"
    assert json.loads(ok("stop", "t", "--json"))["cause"] == "stopped"


@pytest.mark.parametrize("named", [(), ("--name", "t")])
def test_the_console_of_all_boots_is_captured(resets: tuple[str, ...], named: tuple[str, ...]) -> None:
    done = call(*resets, "--timeout", "1.5", "--json", *named)
    value = json.loads(done.stdout)
    assert (done.returncode, value["cause"]) == (124, "timeout")
    boots = done.stderr.count("the guest has reset itself and is started again")
    assert boots > 1
    assert value["console"].strip("x") == "" and len(value["console"]) - boots in (0, 1)
